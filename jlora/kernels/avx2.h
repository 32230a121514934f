// Contraction steps in registers of 32 bytes, for processors without AMX and AVX-512's bf16: bf16 becomes float32 by
// a shift, int8 goes by AVX-VNNI or becomes 16 bits; see tiles.h.
#pragma once
#include <immintrin.h>
#include <algorithm>
#include <cstdint>
#include <cstring>
#include "buffer.h"

namespace jlora::tiles {
inline bool permitted() { return true; }
struct TileScope {};  // there is nothing to configure
constexpr bool unsigned_rows = false;  // of int8

#if defined(__AVXVNNI__)
#define JLORA_VNNI _mm256_dpbusd_avx_epi32
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define JLORA_VNNI _mm256_dpbusd_epi32
#endif

inline __m256i load_line(const void* p) { return _mm256_load_si256((const __m256i*)p); }
inline void store_line(void* p, __m256i v) { _mm256_store_si256((__m256i*)p, v); }
inline __m256i spread(const void* p) {
    int pair;
    std::memcpy(&pair, p, 4);
    return _mm256_set1_epi32(pair);
}

// The columns of b0 and b1, `count` tiles of each, for the steps below: `wide_step` bytes a step. Of a row of a
// tile, pairs or fours of inputs k, become two rows of 32 columns:
// bf16: floats, of the even inputs and of the odd ones; int8: pairs of 16 bits, inputs 0 and 2 of four, then 1 and 3.
constexpr int64_t wide_step = 4096, chunk_steps = 5;
template <bool int8>
inline void widen(const char* b0, const char* b1, int64_t count, char* wide) {
#if defined(JLORA_VNNI)
    if (int8) return;
#endif
    const __m256i upper = _mm256_set1_epi32((int)0xffff0000);
    for (int64_t row = 0; row < count * 16; row++)
        for (int64_t part = 0; part < 4; part++) {
            const __m256i x = load_line((part < 2 ? b0 : b1) + row * 64 + part % 2 * 32);
            char* to = wide + row * 256 + part * 32;
            if constexpr (int8) {
                store_line(to, _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
                store_line(to + 128, _mm256_srai_epi16(x, 8));
            } else {
                store_line(to, _mm256_slli_epi32(x, 16));
                store_line(to + 128, _mm256_and_si256(x, upper));
            }
        }
}

// sums += x w. In assembler, since GCC would read the columns from memory for each row anew, and change the order
// of integer sums, and with it the registers needed.
inline __m256i add_floats(__m256i sums, __m256i x, __m256i w) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sums) : "x"(x), "x"(w));
    return sums;
}
inline __m256i add_pairs(__m256i sums, __m256i x, __m256i w) {
    __m256i products;
    asm("vpmaddwd %2, %1, %0" : "=x"(products) : "x"(x), "x"(w));
    asm("vpaddd %1, %0, %0" : "+x"(sums) : "x"(products));
    return sums;
}
// R rows of 64 bytes, at a[i], with 32 columns; sums of a row and 8 columns in a register.
template <bool int8, int R>
inline void some_rows(const char* const* a, const char* b0, const char* b1, const char* wide, int64_t count, bool first,
        float* const* own, const __m256i* offset) {
    const auto place = [&](int i, int j) { return own[i] + j / 2 * 256 + j % 2 * 8; };
    __m256i sums[R][4];
    for (int i = 0; i < R; i++)
        for (int j = 0; j < 4; j++) {
            sums[i][j] = first ? __m256i{} : load_line(place(i, j));
#if defined(JLORA_VNNI)
            if (int8) sums[i][j] = _mm256_sub_epi32(sums[i][j], offset[j]);
#endif
        }
    for (int64_t k = 0; k < count; k++) {
        const auto row = [&](int i, int64_t pair) { return a[i] + k * 1024 + pair * 4; };
        if constexpr (!int8) {
            alignas(32) float x[R][32];
            for (int i = 0; i < R; i++)
                for (int part = 0; part < 4; part++) {
                    const __m256i v = _mm256_cvtepu16_epi32(_mm_load_si128((const __m128i*)row(i, part * 4)));
                    store_line(x[i] + part * 8, _mm256_slli_epi32(v, 16));
                }
            for (int64_t n = 0; n < 32; n++) {
                __m256i own_x[R];
                for (int i = 0; i < R; i++) own_x[i] = spread(x[i] + n);
                for (int j = 0; j < 4; j++) {
                    const __m256i w = load_line(wide + k * wide_step + n * 128 + j * 32);
                    for (int i = 0; i < R; i++) sums[i][j] = add_floats(sums[i][j], own_x[i], w);
                }
            }
        } else {
#if defined(JLORA_VNNI)
            for (int64_t four = 0; four < 16; four++) {
                __m256i x[R];
                for (int i = 0; i < R; i++) x[i] = _mm256_xor_si256(spread(row(i, four)), _mm256_set1_epi32((int)0x80808080));
                for (int j = 0; j < 4; j++) {
                    const __m256i w = load_line((j < 2 ? b0 : b1) + k * 1024 + four * 64 + j % 2 * 32);
                    for (int i = 0; i < R; i++) sums[i][j] = JLORA_VNNI(sums[i][j], x[i], w);
                }
            }
#else
            alignas(32) int16_t x[R][64];  // as the columns
            for (int i = 0; i < R; i++)
                for (int half = 0; half < 2; half++) {
                    const __m256i v = load_line(row(i, half * 8));
                    store_line(x[i] + half * 32, _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8));
                    store_line(x[i] + half * 32 + 16, _mm256_srai_epi16(v, 8));
                }
            for (int64_t four = 0; four < 16; four++)
                for (int odd = 0; odd < 2; odd++) {
                    __m256i own_x[R];
                    for (int i = 0; i < R; i++) own_x[i] = spread(x[i] + four / 8 * 32 + odd * 16 + four % 8 * 2);
                    for (int j = 0; j < 4; j++) {
                        const __m256i w = load_line(wide + k * wide_step + four * 256 + odd * 128 + j * 32);
                        for (int i = 0; i < R; i++) sums[i][j] = add_pairs(sums[i][j], own_x[i], w);
                    }
                }
#endif
        }
    }
    for (int i = 0; i < R; i++)
        for (int j = 0; j < 4; j++) store_line(place(i, j), sums[i][j]);
}

#if defined(JLORA_VNNI)
constexpr bool from_zero = true;       // see `dot`
#else
constexpr bool from_zero = false;
#endif
// Sums of x times w, four bytes a number. With VNNI also 128 times the sums of w, which x = 0 gives alone.
typedef __m256i Line;
inline Line dot(Line sums, Line x, Line w) {
#if defined(JLORA_VNNI)
    return JLORA_VNNI(sums, _mm256_xor_si256(x, _mm256_set1_epi32((int)0x80808080)), w);
#else
    const auto even = [](Line v) { return _mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8); };
    return add_pairs(add_pairs(sums, even(x), even(w)), _mm256_srai_epi16(x, 8), _mm256_srai_epi16(w, 8));
#endif
}
// The same of pairs of bf16.
inline Line dot_bf16(Line sums, Line x, Line w) {
    const auto odd = [](Line v) { return _mm256_and_si256(v, _mm256_set1_epi32((int)0xffff0000)); };
    return add_floats(add_floats(sums, _mm256_slli_epi32(x, 16), _mm256_slli_epi32(w, 16)), odd(x), odd(w));
}

// Rows whose sums stay in registers: with three, 12 of 16 have sums; int8 needs more for products.
template <bool int8> constexpr int64_t together = int8 ? 2 : 3;
// How often `steps` goes through the contraction.
template <bool int8>
inline int64_t passes(int64_t rows) { return (rows + together<int8> - 1) / together<int8>; }
// As the steps of amx.h, with columns that are wide already. A row's sums are the same whichever rows stand
// beside it.
template <bool int8, typename Between>
inline void wide_steps(const char* a0, const char* a1, const char* b0, const char* b1, const char* wide, int64_t count,
        bool first, float* c, Between between, int64_t rows = 32) {
    __m256i offset[4] = {};
#if defined(JLORA_VNNI)
    // VNNI's left factor has no sign: 128 is added to it, and taken off the sums again.
    for (int64_t k = 0; int8 && k < count * 1024; k += 64)
        for (int j = 0; j < 4; j++)
            offset[j] = JLORA_VNNI(offset[j], _mm256_set1_epi32((int)0x80808080), load_line((j < 2 ? b0 : b1) + k + j % 2 * 32));
#endif
    for (int64_t row = 0; row < rows; row += together<int8>) {
        const char* a[together<int8>];
        float* own[together<int8>];
        const int64_t n = std::min(together<int8>, rows - row);
        for (int64_t i = 0, m = row; i < n; i++, m++)
            a[i] = (m < 16 ? a0 : a1) + m % 16 * 64, own[i] = c + m / 16 * 512 + m % 16 * 16;
        if (n == together<int8>) some_rows<int8, together<int8>>(a, b0, b1, wide, count, first, own, offset);
        else if (n == 2) some_rows<int8, 2>(a, b0, b1, wide, count, first, own, offset);
        else some_rows<int8, 1>(a, b0, b1, wide, count, first, own, offset);
        // Not among the products, where it would take the registers of the sums.
        for (int64_t k = 0; k < count; k++) between();
    }
}
template <bool int8, typename Between>
inline void steps(const char* a0, const char* a1, const char* b0, const char* b1, int64_t count, bool first,
        float* c, Between between, int64_t rows = 32) {
    thread_local Buffer<char> memory;
    char* wide = memory.of(count * wide_step);
    widen<int8>(b0, b1, count, wide);
    wide_steps<int8>(a0, a1, b0, b1, wide, count, first, c, between, rows);
}
}  // namespace jlora::tiles
