// Sixteen floats at a time, on any processor: GCC splits them where its registers are smaller.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#include "bf16.h"

// A call in the middle of a product's steps would take all their sums out of the registers and back.
#define JLORA_INLINE inline __attribute__((always_inline))
#if defined(__AVX512F__)
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
// The lower halves of the numbers.
inline void store_halves(uint16_t* p, U16 v) {
    const Half16 half = __builtin_convertvector(v, Half16);
    std::memcpy(p, &half, 32);
}
inline F16 load16(const int8_t* p) { return (F16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }
inline void store_pairs(uint16_t* p, U16 v) { std::memcpy(p, &v, 64); }
// The lowest bytes of the numbers.
inline void store_bytes(char* p, I16 v) {
    typedef int8_t Byte16 __attribute__((vector_size(16)));
    const Byte16 bytes = __builtin_convertvector(v, Byte16);
    std::memcpy(p, &bytes, 16);
}
inline F16 kept(F16 v) {
    asm("" : "+v"(v));
    return v;
}
inline F16 blend(I16 mask, F16 yes, F16 no) { return mask ? yes : no; }
inline U16 blend(I16 mask, U16 yes, U16 no) { return mask ? yes : no; }
inline F16 floats(I16 v) { return __builtin_convertvector(v, F16); }
inline I16 integers(F16 v) { return __builtin_convertvector(v, I16); }  // towards zero
inline I16 load_integers(const int32_t* p) { I16 v; std::memcpy(&v, p, 64); return v; }
inline F16 shuffle(F16 v, const int32_t* from) { return __builtin_shuffle(v, load_integers(from)); }
constexpr I16 lane_numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
inline bool any16(I16 mask) { return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0; }
inline F16 even16(F16 v) { return (F16)_mm512_roundscale_ps((__m512)v, 0); }  // halves go to even numbers
inline F16 fma16(F16 a, F16 b, F16 c) { return (F16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline F16 quotient16(F16 a, F16 b) { return (F16)_mm512_div_ps((__m512)a, (__m512)b); }  // or by the reciprocal, as the flags allow
// float16.
inline F16 load_float16(const uint16_t* p) { return (F16)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
inline void store_float16(uint16_t* p, F16 v) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, 0)); }
inline float largest16(F16 v) { return _mm512_reduce_max_ps((__m512)v); }
inline float sum16(F16 v) { return _mm512_reduce_add_ps((__m512)v); }
}  // namespace jlora
#else
#include "sixteen.h"
#endif

namespace jlora {
JLORA_INLINE void store_some(float* p, F16 left, F16 right, int64_t count) {  // at most 32
    if (count == 32) return store16(p, left), store16(p + 16, right);
    float all[32];
    store16(all, left), store16(all + 16, right);
    std::memcpy(p, all, count * sizeof(float));
}
JLORA_INLINE void load_some(const float* p, F16& left, F16& right, int64_t count) {  // zeros beyond
    float all[32] = {};
    if (count < 32) std::memcpy(all, p, count * sizeof(float)), p = all;
    left = load16(p), right = load16(p + 16);
}
JLORA_INLINE F16 blend(I16 mask, F16 yes, float no) { return blend(mask, yes, F16{} + no); }
// -fassociative-math lets GCC choose the order of sums, in each copy of a function another one.
JLORA_INLINE F16 add_in_order(F16 a, F16 b) { return kept(a + b); }
JLORA_INLINE F16 larger(F16 a, F16 b) { return blend(a > b, a, b); }
// As bf16 in the lower halves; see bf16_of.
JLORA_INLINE U16 rounded16(F16 v) {
    const U16 bits = (U16)v, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return blend((bits & 0x7fffffffu) > 0x7f800000u, (bits >> 16) | 0x40u, rounded);
}
JLORA_INLINE void store16(uint16_t* p, F16 v) {
#if defined(__AVX512BF16__)
    const __m256bh half = _mm512_cvtneps_pbh((__m512)v);
    std::memcpy(p, &half, 32);
#else
    store_halves(p, rounded16(v));
#endif
}
// Rounds 32 numbers.
JLORA_INLINE void store32(uint16_t* p, F16 left, F16 right) {
#if defined(__AVX512BF16__)
    const __m512bh both = _mm512_cvtne2ps_pbh((__m512)right, (__m512)left);
    std::memcpy(p, &both, 64);
#else
    store_halves(p, rounded16(left)), store_halves(p + 16, rounded16(right));
#endif
}
// A likely word's 1 stands beside lanes of 1e-8, whose sum as floats would be a multiple of its last bit.
JLORA_INLINE double double_sum16(const F16& v) {
    double sum = 0;
    for (int i = 0; i < 16; i++) sum += v[i];
    return sum;
}
// Halves go away from zero.
JLORA_INLINE I16 nearest16(F16 x) { return integers(x + blend(x < 0.0f, F16{} - 0.5f, 0.5f)); }
// As fast_exp in vector_math.h.
JLORA_INLINE F16 exp16(F16 x) {
    x = blend(x < -87.0f, F16{} - 87.0f, x);
    x = blend(x > 88.0f, F16{} + 88.0f, x);
    const F16 scaled = x * 1.44269504f;
    const I16 n = nearest16(scaled);
    const F16 whole = floats(n);
    // By fma16, as -fassociative-math would add the two parts of ln 2 first and lose what the second is for.
    const F16 r = fma16(whole, F16{} + 2.12194440e-4f, fma16(whole, F16{} - 0.693359375f, x));
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
}  // namespace jlora
