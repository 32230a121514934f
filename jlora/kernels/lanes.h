// Sixteen floats at a time, on any processor: GCC splits them where its registers are smaller.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif
#include "bf16.h"

// A call in the middle of a product's steps would take all their sums out of the registers and back.
#define JLORA_INLINE inline __attribute__((always_inline))

namespace jlora {
typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t Half16 __attribute__((vector_size(32)));

JLORA_INLINE F16 load16(const float* p) { F16 v; std::memcpy(&v, p, 64); return v; }
JLORA_INLINE void store16(float* p, F16 v) { std::memcpy(p, &v, 64); }
JLORA_INLINE F16 load16(const uint16_t* p) {
    Half16 half;
    std::memcpy(&half, p, 32);
    return (F16)(__builtin_convertvector(half, U16) << 16);
}
inline void store_some(float* p, F16 left, F16 right, int64_t count) {  // at most 32
    if (count == 32) return store16(p, left), store16(p + 16, right);
    float all[32];
    store16(all, left), store16(all + 16, right);
    std::memcpy(p, all, count * sizeof(float));
}
inline void load_some(const float* p, F16& left, F16& right, int64_t count) {  // zeros beyond
    float all[32] = {};
    if (count < 32) std::memcpy(all, p, count * sizeof(float)), p = all;
    left = load16(p), right = load16(p + 16);
}
// Rounds 32 numbers; see bf16_of.
JLORA_INLINE void store32(uint16_t* p, F16 left, F16 right) {
#if defined(__AVX512BF16__)
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)right, (__m512)left);
    std::memcpy(p, &both, 64);
#else
    for (F16 v : {left, right}) {
        const U16 bits = (U16)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
        const Half16 half = __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded, Half16);
        std::memcpy(p, &half, 32);
        p += 16;
    }
#endif
}
// As fast_exp in vector_math.h.
JLORA_INLINE F16 exp16(F16 x) {
    x = x < -87.0f ? F16{} - 87.0f : x;
    x = x > 88.0f ? F16{} + 88.0f : x;
    const F16 scaled = x * 1.44269504f;
    const I16 n = __builtin_convertvector(scaled + (scaled < 0.0f ? F16{} - 0.5f : F16{} + 0.5f), I16);
    const F16 whole = __builtin_convertvector(n, F16);
    const F16 r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    F16 p = r * (1.0f / 5040) + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * (F16)((n + 127) << 23);
}
JLORA_INLINE F16 sigmoid16(F16 x) { return 1.0f / (1.0f + exp16(-x)); }
constexpr I16 lane_numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
#if defined(__AVX512BF16__)
JLORA_INLINE float largest16(F16 v) { return _mm512_reduce_max_ps((__m512)v); }
JLORA_INLINE float sum16(F16 v) { return _mm512_reduce_add_ps((__m512)v); }
JLORA_INLINE bool any16(I16 lanes) { return _mm512_test_epi32_mask((__m512i)lanes, (__m512i)lanes); }
#else
JLORA_INLINE float largest16(F16 v) {
    float most = v[0];
    for (int i = 1; i < 16; i++) most = v[i] > most ? v[i] : most;
    return most;
}
// By halves: one lane after the other would wait for 15 additions.
JLORA_INLINE float sum16(F16 v) {
    float all[16];
    store16(all, v);
    for (int half = 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) all[i] += all[i + half];
    return all[0];
}
JLORA_INLINE bool any16(I16 lanes) {  // whether a comparison holds for any
    int32_t all = 0;
    for (int i = 0; i < 16; i++) all |= lanes[i];
    return all != 0;
}
#endif
}  // namespace jlora
