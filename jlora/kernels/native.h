// How an operator of this library is called: arrays in, arrays out, integers, numbers. See native.py,
// which also puts this file at the head of what Jittor compiles.
#pragma once
#include <cstdint>

// Whether the library multiplies packed weights by itself (tiles.h), and how: 2: by AMX, 1: by AVX-512, 3: by
// AVX2, 4: by NEON.
// JLORA_AMX comes from native.py, which knows whether the system lets us use it.
#if defined(JLORA_AMX)
#define JLORA_TILES 2
#elif defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define JLORA_TILES 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define JLORA_TILES 3
#elif defined(__aarch64__) && defined(__ARM_NEON)
#define JLORA_TILES 4
#endif
// Whether tiles change their form by AVX-512's instructions; else by those of any processor (any_turns.h).
#if defined(JLORA_TILES) && JLORA_TILES <= 2
#define JLORA_AVX512_FORMS
#endif

namespace jlora {
// Mirrored in structs.py.
struct Array {
    void* data;
    int64_t size;      // elements
    int64_t shape[6];
    int64_t dims;
    template <typename T> T* as() const { return (T*)data; }
    const float* in() const { return (const float*)data; }
    float* out() const { return (float*)data; }
};
using Operator = void(const Array* in, const Array* out, const int64_t* integer, const double* number);
}  // namespace jlora
