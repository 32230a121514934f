// How an operator of the libraries is defined: JLORA_OPERATOR(name) { ... }, with the arguments of `Operator`.
#pragma once
#include <mutex>
#include "native.h"
#include "profile.h"

namespace jlora {
// Operators keep scratch memory from call to call, and each takes all processors or the card, so they run one at
// a time: another thread of Python, whose interpreter lock a call lets go, waits here.
static std::mutex running;
}  // namespace jlora
#define JLORA_OPERATOR(name) \
    static Operator name##_alone; \
    extern "C" void name(const Array* in, const Array* out, const int64_t* integer, const double* number) { \
        const std::lock_guard<std::mutex> alone(running); \
        JLORA_PART(#name); \
        name##_alone(in, out, integer, number); \
    } \
    static void name##_alone(const Array* in, const Array* out, const int64_t* integer, const double* number)
