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
inline const uint16_t* scales_of(const char* own) { return (const uint16_t*)(own + numbers_bytes); }

inline float at(const Weight& w, int64_t n, int64_t k) {
    const char* own = block(w, n / 16, k / 32);
    const int q = (uint8_t)own[k % 32 / 2 * 16 + n % 16] >> (k % 2 * 4) & 15;
    return (float)q * load_float16(scales_of(own))[n % 16] + load_float16(scales_of(own) + 16)[n % 16];
}

// A block as a tile of bf16, [k / 2][n][k % 2].
inline void widen(const char* own, uint16_t* tile) {
    const F16 scale = load_float16(scales_of(own)), least = load_float16(scales_of(own) + 16);
#if defined(JLORA_AVX512_FORMS)
    const __m512i mix = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
        21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#endif
    for (int row = 0; row < 16; row++) {
        const I16 both = load_bytes((const uint8_t*)own + row * 16);
        const F16 even = fma16(floats(both & 15), scale, least), odd = fma16(floats(both >> 4), scale, least);
#if defined(JLORA_AVX512_FORMS)
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
        _mm512_store_si512(tile + row * 32, _mm512_permutexvar_epi16(mix, rounded));
#else
        store_pairs(tile + row * 32, rounded16(even) | rounded16(odd) << 16);
#endif
    }
}

// Scales and minima for the 16 columns of v, and how far their numbers are from it.
struct Fit {
    F16 scale, least, error;
    // Of columns that lie between low and high, in `steps` steps.
    Fit(const F16* v, F16 low, F16 high, float steps) {
        const auto rounded = [](F16 x) {
            uint16_t half[16];
            store_float16(half, x);
            return load_float16(half);
        };
        scale = rounded(quotient16(high - low, F16{} + steps));
        least = rounded(low);
        error = F16{};
        for (int k = 0; k < 32; k++) {
            const F16 off = v[k] - fma16(number(v[k]), scale, least);
            error = fma16(off, off, error);
        }
    }
    F16 number(F16 v) const {
        const F16 q = even16(blend(scale > 0.0f, quotient16(v - least, scale), 0.0f));
        return blend(q < 0.0f, F16{}, blend(q > 15.0f, F16{} + 15.0f, q));
    }
    void take_better(const Fit& other) {
        const I16 better = other.error < error;
        scale = blend(better, other.scale, scale), least = blend(better, other.least, least);
        error = blend(better, other.error, error);
    }
};
// The whole range in 15 steps; or in fewer, as numbers that were in 4 bits before may need to come back as
// they were; or a part of the range, where a few lie far out.
inline Fit best_fit(const F16* v) {
    F16 low = v[0], high = v[0];
    for (int k = 1; k < 32; k++) low = blend(v[k] < low, v[k], low), high = larger(high, v[k]);
    Fit best(v, low, high, 15);
    for (int steps = 14; steps > 1; steps--) best.take_better(Fit(v, low, high, (float)steps));
    const F16 range = high - low;
    for (const float cut : {0.02f, 0.04f, 0.07f}) {
        const F16 off = range * cut;
        best.take_better(Fit(v, low + off, high - off, 15));
    }
    return best;
}
inline void pack(const float* from, const Weight& w, int64_t along_n, int64_t along_k) {
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < up_to(w.n, 32); n += 16)
        for (int64_t k = 0; k < up_to(w.k, 32); k += 32) {
            F16 v[32];
            for (int64_t j = 0; j < 32; j++) {
                float column[16] = {};
                for (int64_t i = 0; i < std::min<int64_t>(16, w.n - n) && k + j < w.k; i++)
                    column[i] = from[(n + i) * along_n + (k + j) * along_k];
                v[j] = load16(column);
            }
            const Fit fit = best_fit(v);
            char* own = block(w, n / 16, k / 32);
            for (int j = 0; j < 32; j += 2)
                store_bytes(own + j / 2 * 16, integers(fit.number(v[j])) | integers(fit.number(v[j + 1])) << 4);
            store_float16((uint16_t*)(own + numbers_bytes), fit.scale);
            store_float16((uint16_t*)(own + numbers_bytes) + 16, fit.least);
        }
}
}  // namespace jlora::int4
