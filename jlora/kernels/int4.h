// int4 weights: 32 inputs of an output share a scale d and a minimum m, and a number is q d + m, q from 0 to
// 15. On the way into L1 they become tiles of int8 forward, in steps of a scale for each output, and of bf16 on
// the way back. GGUF's Q4_0, Q4_1 and Q4_K have this form too.
#pragma once
#include <cmath>
#include "lanes.h"
#include "tile_turns.h"
#include "tile_weights.h"

namespace jlora::int4 {
// Of 16 outputs by 32 inputs: 16 rows [k / 2][n] of a byte each, the even input in its lower half; then the
// scales and the minima of the outputs, float16.
constexpr int64_t numbers_bytes = 256, block_bytes = 320;
inline char* block(const Weight& w, int64_t n_tile, int64_t k_tile) {
    return w.tiles + n_tile * w.stride + k_tile * block_bytes;
}
// Behind the blocks: the largest number of each output / 127, its step in int8.
inline float* steps_of(const Weight& w) { return (float*)(w.tiles + up_to(w.n, 32) / 16 * w.stride); }
inline __m512 halves(const char* at) { return _mm512_cvtph_ps(_mm256_load_si256((const __m256i*)at)); }

inline float at(const Weight& w, int64_t n, int64_t k) {
    const char* own = block(w, n / 16, k / 32);
    const int q = (uint8_t)own[k % 32 / 2 * 16 + n % 16] >> (k % 2 * 4) & 15;
    const auto half = [&](int64_t i) { return _cvtsh_ss(((const uint16_t*)(own + numbers_bytes))[i * 16 + n % 16]); };
    return (float)q * half(0) + half(1);
}

// A block as a tile of bf16, [k / 2][n][k % 2].
inline void widen(const char* own, uint16_t* tile) {
    const __m512i mix = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
        21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512 scale = halves(own + numbers_bytes), least = halves(own + numbers_bytes + 32);
    const __m512i low = _mm512_set1_epi32(15);
    for (int row = 0; row < 16; row++) {
        const __m512i both = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i*)(own + row * 16)));
        const __m512 even = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_and_si512(both, low)), scale, least);
        const __m512 odd = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(both, 4)), scale, least);
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
        _mm512_store_si512(tile + row * 32, _mm512_permutexvar_epi16(mix, rounded));
    }
}

// Of n_tile's outputs, once its blocks are there.
inline void set_steps(const Weight& w, int64_t n_tile) {
    __m512 most = _mm512_setzero_ps();
    for (int64_t k = 0; k < up_to(w.k, 32) / 32; k++) {
        const char* own = block(w, n_tile, k);
        const __m512 scale = halves(own + numbers_bytes), least = halves(own + numbers_bytes + 32);
        for (int row = 0; row < 16; row++) {
            const __m512i both = _mm512_cvtepu8_epi32(_mm_load_si128((const __m128i*)(own + row * 16)));
            for (const __m512i q : {_mm512_and_si512(both, _mm512_set1_epi32(15)), _mm512_srli_epi32(both, 4)})
                most = _mm512_max_ps(most, _mm512_abs_ps(_mm512_fmadd_ps(_mm512_cvtepi32_ps(q), scale, least)));
        }
    }
    const __mmask16 some = _mm512_cmp_ps_mask(most, _mm512_setzero_ps(), _CMP_GT_OQ);
    _mm512_store_ps(steps_of(w) + n_tile * 16, _mm512_mask_div_ps(_mm512_set1_ps(1), some, most, _mm512_set1_ps(127)));
}
// A block as half a tile of int8, [k / 4][n][k % 4], in 256ths of the outputs' steps until the last instruction;
// what overflows 16 bits on the way comes back with the sum.
inline void to_bytes(const char* own, const float* steps, char* tile) {
    const __m512 fine = _mm512_div_ps(_mm512_set1_ps(256), _mm512_load_ps(steps));
    const auto twice = [](__m512 v) {
        const __m512i words = _mm512_and_si512(_mm512_cvtps_epi32(v), _mm512_set1_epi32(0xffff));
        return _mm512_or_si512(words, _mm512_slli_epi32(words, 16));
    };
    const __m512i scale = twice(_mm512_mul_ps(halves(own + numbers_bytes), fine));
    const __m512i least = twice(_mm512_fmadd_ps(halves(own + numbers_bytes + 32), fine, _mm512_set1_ps(128)));
    const __m512i low = _mm512_set1_epi32(0x000f), second = _mm512_set1_epi32(0x0f00), last = _mm512_set1_epi32(0xf000);
    for (int row = 0; row < 8; row++) {
        const __m128i a = _mm_load_si128((const __m128i*)(own + row * 32)), b = _mm_load_si128((const __m128i*)(own + row * 32 + 16));
        const __m512i x = _mm512_cvtepu16_epi32(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b)));
        const __m512i even = _mm512_or_si512(_mm512_and_si512(x, low), _mm512_slli_epi32(_mm512_and_si512(x, second), 8));
        const __m512i odd = _mm512_or_si512(_mm512_and_si512(_mm512_srli_epi32(x, 4), low), _mm512_slli_epi32(_mm512_and_si512(x, last), 4));
        const auto number = [&](__m512i q) { return _mm512_add_epi16(_mm512_mullo_epi16(q, scale), least); };
        const __m512i upper = _mm512_and_si512(number(odd), _mm512_set1_epi16((short)0xff00));
        _mm512_store_si512(tile + row * 64, _mm512_or_si512(_mm512_srli_epi16(number(even), 8), upper));
    }
}
// The numbers of 16 outputs for input k, in their steps.
inline F16 outputs(const Weight& w, int64_t n_tile, int64_t k) {
    F16 v;
    for (int i = 0; i < 16; i++) v[i] = at(w, n_tile * 16 + i, k);
    return v / load16(steps_of(w) + n_tile * 16);
}

// Scales and minima for the 16 columns of v, and how far their numbers are from it.
struct Fit {
    __m512 scale, least, error;
    // Of columns that lie between low and high, in `steps` steps.
    Fit(const __m512* v, __m512 low, __m512 high, float steps) {
        const auto rounded = [](__m512 x) { return _mm512_cvtph_ps(_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT)); };
        scale = rounded(_mm512_div_ps(_mm512_sub_ps(high, low), _mm512_set1_ps(steps)));
        least = rounded(low);
        error = _mm512_setzero_ps();
        for (int k = 0; k < 32; k++) {
            const __m512 off = _mm512_sub_ps(v[k], _mm512_fmadd_ps(number(v[k]), scale, least));
            error = _mm512_fmadd_ps(off, off, error);
        }
    }
    __m512 number(__m512 v) const {
        const __mmask16 some = _mm512_cmp_ps_mask(scale, _mm512_setzero_ps(), _CMP_GT_OQ);
        const __m512 q = _mm512_roundscale_ps(_mm512_maskz_div_ps(some, _mm512_sub_ps(v, least), scale), 0);
        return _mm512_min_ps(_mm512_max_ps(q, _mm512_setzero_ps()), _mm512_set1_ps(15));
    }
    void take_better(const Fit& other) {
        const __mmask16 better = _mm512_cmp_ps_mask(other.error, error, _CMP_LT_OQ);
        scale = _mm512_mask_mov_ps(scale, better, other.scale);
        least = _mm512_mask_mov_ps(least, better, other.least);
        error = _mm512_mask_mov_ps(error, better, other.error);
    }
};
// The whole range in 15 steps; or in fewer, as numbers that were in 4 bits before may need to come back as
// they were; or a part of the range, where a few lie far out.
inline Fit best_fit(const __m512* v) {
    __m512 low = v[0], high = v[0];
    for (int k = 1; k < 32; k++) low = _mm512_min_ps(low, v[k]), high = _mm512_max_ps(high, v[k]);
    Fit best(v, low, high, 15);
    for (int steps = 14; steps > 1; steps--) best.take_better(Fit(v, low, high, (float)steps));
    const __m512 range = _mm512_sub_ps(high, low);
    for (const float cut : {0.02f, 0.04f, 0.07f}) {
        const __m512 off = _mm512_mul_ps(range, _mm512_set1_ps(cut));
        best.take_better(Fit(v, _mm512_add_ps(low, off), _mm512_sub_ps(high, off), 15));
    }
    return best;
}
inline void pack(const float* from, const Weight& w, int64_t along_n, int64_t along_k) {
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < up_to(w.n, 32); n += 16) {
        for (int64_t k = 0; k < up_to(w.k, 32); k += 32) {
            alignas(64) float columns[32][16] = {};
            for (int64_t i = 0; i < std::min<int64_t>(16, w.n - n); i++)
                for (int64_t j = 0; j < std::min<int64_t>(32, w.k - k); j++)
                    columns[j][i] = from[(n + i) * along_n + (k + j) * along_k];
            __m512 v[32];
            for (int j = 0; j < 32; j++) v[j] = _mm512_load_ps(columns[j]);
            const Fit fit = best_fit(v);
            char* own = block(w, n / 16, k / 32);
            for (int j = 0; j < 32; j += 2) {
                const __m512i even = _mm512_cvtps_epi32(fit.number(v[j])), odd = _mm512_cvtps_epi32(fit.number(v[j + 1]));
                const __m512i both = _mm512_or_si512(even, _mm512_slli_epi32(odd, 4));
                _mm_store_si128((__m128i*)(own + j / 2 * 16), _mm512_cvtepi32_epi8(both));
            }
            _mm256_store_si256((__m256i*)(own + numbers_bytes), _mm512_cvtps_ph(fit.scale, 0));
            _mm256_store_si256((__m256i*)(own + numbers_bytes + 32), _mm512_cvtps_ph(fit.least, 0));
        }
        set_steps(w, n / 16);
    }
}

// Rows of blocks as GGUF has them: of 32 numbers a scale, of Q4_1 a minimum, and 16 bytes, the lower halves of
// which are the first 16 numbers; Q4_K has 8 such groups together, their scales and minima as 6 bits of two
// others. All but Q4_K's scales, which are rounded to float16, stay as they are.
enum Form : int64_t { q4_0, q4_1, q4_k };
struct Group4 {
    float scale, least;
    const uint8_t* bytes;  // of numbers
    bool k_form, upper;    // of Q4_K: each byte has a number of two neighbouring groups
    int number(int i) const {
        if (k_form) return bytes[i] >> (upper ? 4 : 0) & 15;
        return bytes[i % 16] >> (i < 16 ? 0 : 4) & 15;
    }
};
inline Group4 group_of(const uint8_t* row, int64_t group, Form form) {
    const auto half = [](const uint8_t* at) { uint16_t bits; std::memcpy(&bits, at, 2); return _cvtsh_ss(bits); };
    if (form == q4_0) {
        const uint8_t* own = row + group * 18;
        return {half(own), -8 * half(own), own + 2, false, false};
    }
    if (form == q4_1) {
        const uint8_t* own = row + group * 20;
        return {half(own), half(own + 2), own + 4, false, false};
    }
    const uint8_t *own = row + group / 8 * 144, *six = own + 4;
    const int64_t i = group % 8;
    const int scale = i < 4 ? six[i] & 63 : (six[i + 4] & 15) | (six[i - 4] >> 6) << 4;
    const int least = i < 4 ? six[i + 4] & 63 : six[i + 4] >> 4 | (six[i] >> 6) << 4;
    return {half(own) * scale, -half(own + 2) * least, own + 16 + i / 2 * 32, true, i % 2 != 0};
}
// from: rows of `stride` bytes.
inline void pack_blocks(const uint8_t* from, int64_t stride, Form form, const Weight& w) {
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < up_to(w.n, 32); n += 16) {
        for (int64_t k = 0; k < w.k; k += 32) {
            alignas(64) uint8_t numbers[256] = {};
            alignas(64) uint16_t scales[32] = {};
            for (int64_t i = 0; i < std::min<int64_t>(16, w.n - n); i++) {
                const Group4 group = group_of(from + (n + i) * stride, k / 32, form);
                scales[i] = _cvtss_sh(group.scale, 0), scales[16 + i] = _cvtss_sh(group.least, 0);
                for (int j = 0; j < 16; j++) numbers[j * 16 + i] = group.number(2 * j) | group.number(2 * j + 1) << 4;
            }
            char* own = block(w, n / 16, k / 32);
            std::memcpy(own, numbers, sizeof numbers);
            std::memcpy(own + numbers_bytes, scales, sizeof scales);
        }
        set_steps(w, n / 16);
    }
}
}  // namespace jlora::int4
