// int4 weights: 32 inputs of an output share a scale d and a minimum m, and a number is q d + m, q from 0 to
// 15. On the way into L1 or registers they become tiles of int8 forward, in steps of a scale for each output, and
// of bf16 on the way back. GGUF's Q4_0, Q4_1 and Q4_K have this form too.
#pragma once
#include <cmath>
#include "tile_turns.h"
#include "tile_weights.h"

namespace jlora::int4 {
// Of 16 outputs by 32 inputs: 4 rows [k / 8][n][k % 4] of bytes, the lower half of which is one of the first four
// inputs and the upper half that of the other four; then the scales and the minima of the outputs, float16.
constexpr int64_t numbers_bytes = 256, block_bytes = 320;
inline char* block(const Weight& w, int64_t n_tile, int64_t k_tile) {
    return w.tiles + n_tile * w.stride + k_tile * block_bytes;
}
// Behind the blocks: the largest number of each output / 127, its step in int8.
inline float* steps_of(const Weight& w) { return (float*)(w.tiles + up_to(w.n, 32) / 16 * w.stride); }
// Behind these: `bias` times the sums of the outputs' numbers in int8.
inline int* offsets_of(const Weight& w) { return (int*)(steps_of(w) + up_to(w.n, 64)); }
inline int64_t bytes(int64_t n, int64_t k) { return up_to(n, 32) / 16 * up_to(k, 32) / 32 * block_bytes + up_to(n, 64) * 8; }
inline const uint16_t* scales_of(const char* own) { return (const uint16_t*)(own + numbers_bytes); }

// Where the number for input k (of 32) is in the 32 bits of an output.
constexpr int shift_of(int64_t k) { return k % 4 * 8 + k % 8 / 4 * 4; }
// Input k of 16 outputs.
inline I16 numbers(const char* own, int64_t k) { return load_integers((const int32_t*)(own + k / 8 * 64)) >> shift_of(k) & 15; }
inline float at(const Weight& w, int64_t n, int64_t k) {
    const char* own = block(w, n / 16, k / 32);
    const int q = numbers(own, k % 32)[n % 16];
    return (float)q * load_float16(scales_of(own))[n % 16] + load_float16(scales_of(own) + 16)[n % 16];
}

// A block as a tile of bf16, [k / 2][n][k % 2].
inline void widen(const char* own, uint16_t* tile) {
    const F16 scale = load_float16(scales_of(own)), least = load_float16(scales_of(own) + 16);
#if defined(JLORA_AVX512_FORMS)
    const __m512i mix = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
        21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#endif
    for (int k = 0; k < 32; k += 2) {
        const F16 even = fma16(floats(numbers(own, k)), scale, least), odd = fma16(floats(numbers(own, k + 1)), scale, least);
#if defined(JLORA_AVX512_FORMS)
        const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
        _mm512_store_si512(tile + k * 16, _mm512_permutexvar_epi16(mix, rounded));
#else
        store_pairs(tile + k * 16, rounded16(even) | rounded16(odd) << 16);
#endif
    }
}

constexpr int word_bytes = JLORA_TILES <= 2 ? 64 : JLORA_TILES == 3 ? 32 : 16;  // a register
typedef uint16_t Words __attribute__((vector_size(word_bytes)));
// What numbers of 4 bits become in int8: q `scale` + `least`, of which the upper bytes of words stay; what overflows
// the words on the way comes back with the sum. In 256ths of the outputs' steps.
struct ToBytes {
    alignas(64) uint32_t scale[16], least[16];  // each twice, in words
    static F16 fine(const float* steps) { return quotient16(F16{} + 256.0f, load16(steps)); }
    ToBytes(const char* own, F16 fine) {
        put(scale, integers(even16(load_float16(scales_of(own)) * fine)));
        put(least, integers(even16(fma16(load_float16(scales_of(own) + 16), fine, F16{} + 128.0f))));
    }
    static void put(uint32_t* to, I16 v) {
        const U16 both = ((U16)v & 0xffffu) | (U16)v << 16;
        std::memcpy(to, &both, 64);
    }
    static Words load(const void* p) { Words v; std::memcpy(&v, p, word_bytes); return v; }
    // A row of a block, from byte `part` on, becomes two of the tile, [k / 4][n][k % 4].
    void operator()(const char* row, int part, Words& first, Words& second) const {
        const Words x = load(row + part), times = load((const char*)scale + part), plus = load((const char*)least + part);
        const auto number = [&](Words q) { return q * times + plus; };
        const auto pair = [](Words even, Words odd) { return even >> 8 | (odd & 0xff00); };
        first = pair(number(x & 15), number(x >> 8 & 15)), second = pair(number(x >> 4 & 15), number(x >> 12));
    }
};
inline void to_bytes(const char* own, F16 fine, char* tile) {
    const ToBytes all(own, fine);
    for (int row = 0; row < 4; row++)
        for (int part = 0; part < 64; part += word_bytes) {
            Words first, second;
            all(own + row * 64, part, first, second);
            std::memcpy(tile + row * 128 + part, &first, word_bytes);
            std::memcpy(tile + row * 128 + 64 + part, &second, word_bytes);
        }
}
#if defined(JLORA_COLUMNS)
template <int R>
inline tiles::Column<true, R> column(const Weight& w, int64_t n_tile, const char* a) {
    const F16 fine = ToBytes::fine(steps_of(w) + n_tile * 16);
    tiles::Column<true, R> column;
    for (int64_t k = 0; k < up_to(w.k, 32) / 32; k++) {
        const char *own = block(w, n_tile, k), *x = a + k / 2 * tiles::tile_bytes + k % 2 * 32;
        const ToBytes all(own, fine);
        for (int64_t line = 0; line < block_bytes; line += 64) _mm_prefetch(own + column.ahead + line, _MM_HINT_T0);
        for (int row = 0; row < 4; row++)
            for (int64_t at = 0; at < tiles::lines; at++) {
                Words first, second;
                all(own + row * 64, at * tiles::line_bytes, first, second);
                column.add(x + row * 8, at, (tiles::Line)first), column.add(x + row * 8 + 4, at, (tiles::Line)second);
            }
    }
    return column;
}
#endif
// By the bits: with -fassociative-math GCC takes x - x for 0, whatever x is.
inline I16 not_finite(F16 v) { return ((U16)v & 0x7fffffffu) > 0x7f7fffffu; }
// Of n_tile's outputs, once its blocks are there.
inline void set_steps(const Weight& w, int64_t n_tile) {
    F16 most{}, none{};  // none: 0, or NaN where a number is not finite, which int8 cannot say
    for (int64_t k = 0; k < up_to(w.k, 32) / 32; k++) {
        const char* own = block(w, n_tile, k);
        const F16 scale = load_float16(scales_of(own)), least = load_float16(scales_of(own) + 16);
        none = blend(not_finite(scale) | not_finite(least), F16{} + NAN, none);
        for (int j = 0; j < 32; j++) {
            const F16 v = fma16(floats(numbers(own, j)), scale, least);
            most = larger(most, larger(v, -v));
        }
    }
    float* steps = steps_of(w) + n_tile * 16;
    store16(steps, blend(most > 0.0f, quotient16(most, F16{} + 127.0f), 1.0f) + none);
    const F16 fine = ToBytes::fine(steps);
    int sums[16] = {};
    for (int64_t k = 0; k < up_to(w.k, 32) / 32; k++) {
        alignas(64) char half[512];
        to_bytes(block(w, n_tile, k), fine, half);
        for (int i = 0; i < 512; i++) sums[i / 4 % 16] += (int8_t)half[i];
    }
    for (int i = 0; i < 16; i++) offsets_of(w)[n_tile * 16 + i] = bias * sums[i];
}
// The numbers of 16 outputs for input k, in their steps.
inline F16 outputs(const Weight& w, int64_t n_tile, int64_t k) {
    float v[16];
    for (int i = 0; i < 16; i++) v[i] = at(w, n_tile * 16 + i, k);
    return quotient16(load16(v), load16(steps_of(w) + n_tile * 16));
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
    for (int64_t n = 0; n < up_to(w.n, 32); n += 16) {
        for (int64_t k = 0; k < up_to(w.k, 32); k += 32) {
            F16 v[32], none{};  // none: NaN where a number is not finite, which 4 bits cannot say
            for (int64_t j = 0; j < 32; j++) {
                float column[16] = {};
                for (int64_t i = 0; i < std::min<int64_t>(16, w.n - n) && k + j < w.k; i++)
                    column[i] = from[(n + i) * along_n + (k + j) * along_k];
                v[j] = load16(column), none = blend(not_finite(v[j]), F16{} + NAN, none);
            }
            const Fit fit = best_fit(v);
            char* own = block(w, n / 16, k / 32);
            for (int row = 0; row < 4; row++) {
                I16 all{};
                for (int j = 8 * row; j < 8 * row + 8; j++) all = all | integers(fit.number(v[j])) << shift_of(j);
                std::memcpy(own + row * 64, &all, 64);
            }
            store_float16((uint16_t*)(own + numbers_bytes), fit.scale);
            store_float16((uint16_t*)(own + numbers_bytes) + 16, fit.least + none);
        }
        set_steps(w, n / 16);
    }
}

// Rows of blocks as GGUF has them: of 32 numbers a scale, of Q4_1 a minimum, and 16 bytes, the lower halves of
// which are the first 16 numbers; Q4_K has 8 such groups together, whose scales and minima are 6 bits each of two
// others. All but Q4_K's scales and minima, which are rounded to float16, stay as they are.
enum Form : int64_t { q4_0, q4_1, q4_k };
// Of 16 outputs: halves that scale and minimum are multiples of, and of which.
struct Groups {
    alignas(64) uint16_t scale[16] = {}, least[16] = {};
    alignas(64) int32_t times[16] = {}, least_times[16] = {};
    alignas(64) uint8_t packed[256] = {};
    void read(int64_t i, const uint8_t* row, int64_t group, Form form) {
        if (form == q4_k) {
            const uint8_t *own = row + group / 8 * 144, *six = own + 4;
            const int64_t g = group % 8;
            times[i] = g < 4 ? six[g] & 63 : (six[g + 4] & 15) | (six[g - 4] >> 6) << 4;
            least_times[i] = -(g < 4 ? six[g + 4] & 63 : six[g + 4] >> 4 | (six[g] >> 6) << 4);
            std::memcpy(scale + i, own, 2), std::memcpy(least + i, own + 2, 2);
            const uint8_t* bytes = own + 16 + g / 2 * 32;
            for (int k = 0; k < 32; k++) put(i, k, bytes[k] >> (g % 2 * 4) & 15);
            return;
        }
        const uint8_t* own = row + group * (form == q4_0 ? 18 : 20);
        const uint8_t* bytes = own + (form == q4_0 ? 2 : 4);
        times[i] = 1, least_times[i] = form == q4_0 ? -8 : 1;
        std::memcpy(scale + i, own, 2), std::memcpy(least + i, form == q4_0 ? own : own + 2, 2);
        for (int k = 0; k < 32; k++) put(i, k, bytes[k % 16] >> (k / 16 * 4) & 15);
    }
    void put(int64_t i, int k, int number) { packed[k / 8 * 64 + i * 4 + k % 4] |= number << (k % 8 / 4 * 4); }
};
// from: rows of `stride` bytes.
inline void pack_blocks(const uint8_t* from, int64_t stride, Form form, const Weight& w) {
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < up_to(w.n, 32); n += 16) {
        for (int64_t k = 0; k < w.k; k += 32) {
            Groups all;
            for (int64_t i = 0; i < std::min<int64_t>(16, w.n - n); i++) all.read(i, from + (n + i) * stride, k / 32, form);
            char* own = block(w, n / 16, k / 32);
            std::memcpy(own, all.packed, sizeof all.packed);
            uint16_t* halves = (uint16_t*)(own + numbers_bytes);
            store_float16(halves, load_float16(all.scale) * floats(load_integers(all.times)));
            store_float16(halves + 16, load_float16(all.least) * floats(load_integers(all.least_times)));
        }
        set_steps(w, n / 16);
    }
}
}  // namespace jlora::int4
