// How an operator of this library is called: arrays in, arrays out, numbers. See native.py.
#pragma once
#include <cstdint>

namespace jlora {
struct Array {
    void* data;
    int64_t size;      // elements
    int64_t shape[6];
    int64_t dims;
    template <typename T> T* as() const { return (T*)data; }
    const float* in() const { return (const float*)data; }
    float* out() const { return (float*)data; }
};
}  // namespace jlora

#define JLORA_OPERATOR(name) \
    extern "C" void name(const jlora::Array* in, const jlora::Array* out, const double* number)
