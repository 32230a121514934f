// Contraction steps by NEON, for Arm: by its dot products of bf16 pairs and of four bytes where the processor has
// them, else by float32 and by 16 bits; see tiles.h.
#pragma once
#include <arm_neon.h>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace jlora::tiles {
inline bool permitted() { return true; }
struct TileScope {};  // there is nothing to configure
constexpr bool unsigned_rows = false;  // of int8: dot products of Arm's first kind have two signs

// Sums of 4 columns += a row's numbers x times those of the columns, w: 64 bits a column at int8 without dot
// products, 32 else. Step<int8> says how.
template <bool int8>
struct Step;
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
template <>
struct Step<false> {
    typedef float32x4_t Sums;
    static Sums add(Sums sums, const char* x, uint8x16_t w) {
        const bfloat16x8_t pairs = vreinterpretq_bf16_u32(vld1q_dup_u32((const uint32_t*)x));
        return vbfdotq_f32(sums, pairs, vreinterpretq_bf16_u8(w));
    }
    static Sums load(const float* p) { return vld1q_f32(p); }
    static void store(float* p, Sums sums) { vst1q_f32(p, sums); }
};
#else
template <>
struct Step<false> {
    typedef float32x4_t Sums;
    static float32x4_t even(uint32x4_t pairs) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)); }
    static float32x4_t odd(uint32x4_t pairs) { return vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000u))); }
    static Sums add(Sums sums, const char* x, uint8x16_t w) {
        const uint32x4_t own = vld1q_dup_u32((const uint32_t*)x), columns = vreinterpretq_u32_u8(w);
        sums = vfmaq_f32(sums, even(own), even(columns));
        return vfmaq_f32(sums, odd(own), odd(columns));
    }
    static Sums load(const float* p) { return vld1q_f32(p); }
    static void store(float* p, Sums sums) { vst1q_f32(p, sums); }
};
#endif
#if defined(__ARM_FEATURE_DOTPROD)
template <>
struct Step<true> {
    typedef int32x4_t Sums;
    static Sums add(Sums sums, const char* x, uint8x16_t w) {
        const int8x16_t four = vreinterpretq_s8_u32(vld1q_dup_u32((const uint32_t*)x));
        return vdotq_s32(sums, four, vreinterpretq_s8_u8(w));
    }
    static Sums load(const float* p) { return vreinterpretq_s32_f32(vld1q_f32(p)); }
    static void store(float* p, Sums sums) { vst1q_f32(p, vreinterpretq_f32_s32(sums)); }
};
#else
template <>
struct Step<true> {
    struct Sums { int32x4_t low, high; };  // two a column
    static Sums add(Sums sums, const char* x, uint8x16_t w) {
        const int8x8_t four = vreinterpret_s8_u32(vld1_dup_u32((const uint32_t*)x));
        const int8x16_t columns = vreinterpretq_s8_u8(w);
        sums.low = vpadalq_s16(sums.low, vmull_s8(vget_low_s8(columns), four));
        sums.high = vpadalq_s16(sums.high, vmull_s8(vget_high_s8(columns), four));
        return sums;
    }
    static Sums load(const float* p) {
        const int32x4_t v = vreinterpretq_s32_f32(vld1q_f32(p)), none = vdupq_n_s32(0);
        return {vzip1q_s32(v, none), vzip2q_s32(v, none)};
    }
    static void store(float* p, Sums sums) { vst1q_f32(p, vreinterpretq_f32_s32(vpaddq_s32(sums.low, sums.high))); }
};
#endif

// R rows of `a`, 64 bytes each, with the 16 columns of b, `count` tiles of it.
template <bool int8, int R, typename Between>
inline void some_rows(const char* a, const char* b, int64_t count, bool first, float* own, Between between) {
    typename Step<int8>::Sums sums[R][4];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < 4; j++) sums[i][j] = first ? typename Step<int8>::Sums{} : Step<int8>::load(own + i * 16 + j * 4);
    for (int64_t k = 0; k < count; k++) {
        for (int64_t line = 0; line < 16; line++)
            for (int j = 0; j < 4; j++) {
                const uint8x16_t w = vld1q_u8((const uint8_t*)b + k * 1024 + line * 64 + j * 16);
                for (int i = 0; i < R; i++) sums[i][j] = Step<int8>::add(sums[i][j], a + k * 1024 + i * 64 + line * 4, w);
            }
        between();
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < 4; j++) Step<int8>::store(own + i * 16 + j * 4, sums[i][j]);
}

// How often `steps` goes through the contraction.
template <bool int8>
inline int64_t passes(int64_t rows) { return (rows + 3) / 4 * 2; }
// As the steps of amx.h. 4 rows by 16 columns at a time, whose sums stay in registers; the last rows one by one.
// A row's sums are the same whichever rows stand beside it.
template <bool int8, typename Between>
inline void steps(const char* a0, const char* a1, const char* b0, const char* b1, int64_t count, bool first,
        float* c, Between between, int64_t rows = 32) {
    for (int64_t half = 0; half < 2; half++)
        for (int64_t row = 0; row < rows; row += 4) {
            const char* a = (row < 16 ? a0 : a1) + row % 16 * 64;
            float* own = c + row / 16 * 512 + half * 256 + row % 16 * 16;
            if (rows - row >= 4) some_rows<int8, 4>(a, half ? b1 : b0, count, first, own, between);
            else for (int64_t i = 0; i < rows - row; i++) some_rows<int8, 1>(a + i * 64, half ? b1 : b0, count, first, own + i * 16, between);
        }
}
}  // namespace jlora::tiles
