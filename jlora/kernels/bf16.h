// bfloat16: the upper half of a float.
#pragma once
#include <cstdint>
#include <cstring>

namespace jlora {
// To the nearest, ties to even; NaN stays NaN.
inline uint16_t bf16_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
inline float float_of(uint16_t x) {
    const uint32_t bits = (uint32_t)x << 16;
    float result;
    std::memcpy(&result, &bits, 4);
    return result;
}
inline void to_bf16(const float* x, uint16_t* y, int64_t n) {
    #pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = bf16_of(x[i]);
}
inline void to_float(const uint16_t* x, float* y, int64_t n) {
    #pragma omp simd
    for (int64_t i = 0; i < n; i++) y[i] = float_of(x[i]);
}
}  // namespace jlora
