// Tiles of bf16 numbers from one of the forms that products read to another.
#pragma once
#include <cstdint>
#include "native.h"
#if defined(JLORA_AVX512_FORMS)
#include <immintrin.h>

namespace jlora {
// 8 x 8 numbers of 64 bits.
inline void transpose8(__m512i* x) {
    __m512i y[8];
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm512_unpacklo_epi64(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi64(x[i], x[i + 1]);
    }
    for (int i = 0; i < 2; i++)
        for (int half = 0; half < 8; half += 4) {
            const __m512i a = y[half + i], b = y[half + 2 + i];
            x[half + i] = _mm512_shuffle_i64x2(a, b, 0x88);
            x[half + 2 + i] = _mm512_shuffle_i64x2(a, b, 0xdd);
        }
    for (int i = 0; i < 4; i++) {
        const __m512i a = x[i], b = x[i + 4];
        y[i] = _mm512_shuffle_i64x2(a, b, 0x88);
        y[i + 4] = _mm512_shuffle_i64x2(a, b, 0xdd);
    }
    for (int i = 0; i < 8; i++) x[i] = y[i];
}

// Rows [x][d] become turned, [d / 2][x][d % 2], or turned ones rows: a matrix of 16 x 16 pairs.
inline void turn_tile(const uint16_t* from, uint16_t* to) {
    __m512i low[8], high[8];
    for (int i = 0; i < 8; i++) {
        const __m512i a = _mm512_load_si512(from + 2 * i * 32), b = _mm512_load_si512(from + (2 * i + 1) * 32);
        low[i] = _mm512_unpacklo_epi32(a, b);   // columns 0, 1, 4, 5, 8, ...
        high[i] = _mm512_unpackhi_epi32(a, b);  // columns 2, 3, 6, 7, 10, ...
    }
    transpose8(low), transpose8(high);
    for (int i = 0; i < 8; i++) {
        uint16_t* column = to + (i / 2 * 4 + i % 2) * 32;
        _mm512_store_si512(column, low[i]);
        _mm512_store_si512(column + 64, high[i]);
    }
}
// Rows [x][d] become paired, [x / 2][d][x % 2]: 32 rows of 32 columns.
inline void pair_tiles(const uint16_t* upper, const uint16_t* lower, uint16_t* left, uint16_t* right) {
    alignas(64) static constexpr uint16_t places[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39,
        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const __m512i first = _mm512_load_si512(places), last = _mm512_add_epi16(first, _mm512_set1_epi16(16));
    for (int i = 0; i < 16; i++) {
        const uint16_t* from = (i < 8 ? upper : lower) + i % 8 * 64;
        const __m512i a = _mm512_load_si512(from), b = _mm512_load_si512(from + 32);
        _mm512_store_si512(left + i * 32, _mm512_permutex2var_epi16(a, first, b));
        _mm512_store_si512(right + i * 32, _mm512_permutex2var_epi16(a, last, b));
    }
}
}  // namespace jlora
#else
#include "any_turns.h"
#endif
