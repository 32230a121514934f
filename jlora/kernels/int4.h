// int4 weights: 32 inputs of an output share a scale d and a minimum m, and a number is q d + m, q from 0 to
// 15. They become tiles of bf16 on the way into L1; GGUF's Q4_0, Q4_1 and Q4_K have this form too.
#pragma once
#include <cmath>
#include "tile_turns.h"
#include "tile_weights.h"

namespace jlora::int4 {
// Of 16 outputs by 32 inputs: 16 rows [k / 2][n] of a byte each, the even input in its lower half; then the
// scales and the minima of the outputs, float16.
constexpr int64_t numbers_bytes = 256, block_bytes = 320;
inline char* block(const Weight& w, int64_t n_tile, int64_t k_tile) {
    return w.tiles + n_tile * w.stride + k_tile * block_bytes;
}
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
    for (int64_t n = 0; n < up_to(w.n, 32); n += 16)
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
}
}  // namespace jlora::int4
