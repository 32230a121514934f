// Contraction steps by AVX-512's dot products of bf16 pairs and of four bytes, for processors without AMX;
// see tiles.h.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <type_traits>

namespace jlora::tiles {
inline bool permitted() { return true; }
struct TileScope {};  // there is nothing to configure

constexpr bool unsigned_rows = true;  // of int8, see int8.h
inline __m512i spread(const void* p) { return _mm512_set1_epi32(*(const int*)p); }
// Sums of x times w, four bytes a number, and pairs of bf16.
typedef __m512i Line;
inline Line dot(Line sums, Line x, Line w) { return _mm512_dpbusd_epi32(sums, x, w); }
inline Line dot_bf16(Line sums, Line x, Line w) { return (Line)_mm512_dpbf16_ps((__m512)sums, (__m512bh)x, (__m512bh)w); }
constexpr bool from_zero = false;     // what x = 0 gives is 0
// R rows of `a`, 64 bytes each, with the columns of b0 and b1, `count` tiles of each.
template <bool int8, int R, typename Between>
inline void some_rows(const char* a, const char* b0, const char* b1, int64_t count, bool first, float* own,
        const char* next, Between between) {
    __m512i sums[R][2];
    for (int i = 0; i < R; i++)
        for (int half = 0; half < 2; half++)
            sums[i][half] = first ? __m512i{} : _mm512_load_si512(own + i * 16 + half * 256);
    for (int64_t k = 0; k < count; k++) {
        for (int64_t pair = 0; pair < 16; pair++) {
            const __m512i left = _mm512_load_si512(b0 + k * 1024 + pair * 64);
            const __m512i right = _mm512_load_si512(b1 + k * 1024 + pair * 64);
            for (int i = 0; i < R; i++) {
                const __m512i x = spread(a + k * 1024 + i * 64 + pair * 4);
                sums[i][0] = int8 ? dot(sums[i][0], x, left) : dot_bf16(sums[i][0], x, left);
                sums[i][1] = int8 ? dot(sums[i][1], x, right) : dot_bf16(sums[i][1], x, right);
            }
        }
        for (int i = 0; i < 8; i++) _mm_prefetch(next + k * 1024 + i * 64, _MM_HINT_T0);
        between();
    }
    for (int i = 0; i < R; i++)
        for (int half = 0; half < 2; half++) _mm512_store_si512(own + i * 16 + half * 256, sums[i][half]);
}

// How often `steps` goes through the contraction.
template <bool int8>
inline int64_t passes(int64_t rows) { return (rows + 7) / 8; }
// As the steps of amx.h. 8 rows at a time, whose 16 sums stay in registers; the last ones, as when a few
// rows decode, by fewer. A row's sums are the same whichever rows stand beside it.
template <bool int8, typename Between>
inline void steps(const char* a0, const char* a1, const char* b0, const char* b1, int64_t count, bool first,
        float* c, Between between, int64_t rows = 32) {
    for (int64_t row = 0; row < rows; row += 8) {
        const char* a = (row < 16 ? a0 : a1) + row % 16 * 64;
        const char* next = row == 0 ? a0 + 512 : row == 8 ? a1 : row == 16 ? a1 + 512 : a1 + (a1 - a0);
        float* own = c + row / 16 * 512 + row % 16 * 16;
        const auto some = [&](auto size) {
            some_rows<int8, decltype(size)::value>(a, b0, b1, count, first, own, next, between);
        };
        if (rows - row > 4) some(std::integral_constant<int, 8>());
        else if (rows - row > 2) some(std::integral_constant<int, 4>());
        else if (rows - row == 2) some(std::integral_constant<int, 2>());
        else some(std::integral_constant<int, 1>());
    }
}
}  // namespace jlora::tiles
