// Contraction steps by AVX-512's dot products of bf16 pairs and of four bytes, for processors without AMX;
// see tiles.h.
#pragma once
#include <immintrin.h>
#include <cstdint>
#include <type_traits>

namespace jlora::tiles {
inline bool permitted() { return true; }
struct TileScope {};  // there is nothing to configure

// R rows of `a`, 64 bytes each, with the columns of b0 and b1, `count` tiles of each.
template <bool int8, int R, typename Between>
inline void some_rows(const char* a, const char* b0, const char* b1, int64_t count, bool first, float* own,
        const __m512i* offset, Between between) {
    const __m512i sign = _mm512_set1_epi32((int)0x80808080);
    __m512i sums[R][2];
    for (int i = 0; i < R; i++)
        for (int half = 0; half < 2; half++) {
            const __m512i before = first ? __m512i{} : _mm512_load_si512(own + i * 16 + half * 256);
            sums[i][half] = int8 ? _mm512_sub_epi32(before, offset[half]) : before;
        }
    for (int64_t k = 0; k < count; k++) {
        for (int64_t pair = 0; pair < 16; pair++) {
            const __m512i left = _mm512_load_si512(b0 + k * 1024 + pair * 64);
            const __m512i right = _mm512_load_si512(b1 + k * 1024 + pair * 64);
            for (int i = 0; i < R; i++) {
                __m512i x = _mm512_set1_epi32(*(const int*)(a + k * 1024 + i * 64 + pair * 4));
                if constexpr (int8) {
                    x = _mm512_xor_si512(x, sign);
                    sums[i][0] = _mm512_dpbusd_epi32(sums[i][0], x, left);
                    sums[i][1] = _mm512_dpbusd_epi32(sums[i][1], x, right);
                } else {
                    sums[i][0] = (__m512i)_mm512_dpbf16_ps((__m512)sums[i][0], (__m512bh)x, (__m512bh)left);
                    sums[i][1] = (__m512i)_mm512_dpbf16_ps((__m512)sums[i][1], (__m512bh)x, (__m512bh)right);
                }
            }
        }
        between(k);
    }
    for (int i = 0; i < R; i++)
        for (int half = 0; half < 2; half++) _mm512_store_si512(own + i * 16 + half * 256, sums[i][half]);
}

// As the steps of amx.h. 8 rows at a time, whose 16 sums stay in registers; the last ones, as when a few
// rows decode, by fewer. A row's sums are the same whichever rows stand beside it.
template <bool int8, typename Between>
inline void steps(const char* a0, const char* a1, const char* b0, const char* b1, int64_t count, bool first,
        float* c, Between between, int64_t rows = 32) {
    // VNNI's left factor has no sign: 128 is added to it, and taken off the sums again.
    __m512i offset[2] = {};
    const __m512i sign = _mm512_set1_epi32((int)0x80808080);
    for (int64_t k = 0; int8 && k < count * 1024; k += 64) {
        offset[0] = _mm512_dpbusd_epi32(offset[0], sign, _mm512_load_si512(b0 + k));
        offset[1] = _mm512_dpbusd_epi32(offset[1], sign, _mm512_load_si512(b1 + k));
    }
    for (int64_t row = 0; row < rows; row += 8) {
        const char* a = (row < 16 ? a0 : a1) + row % 16 * 64;
        float* own = c + row / 16 * 512 + row % 16 * 16;
        const auto some = [&](auto size) {
            constexpr int R = decltype(size)::value;
            if (row) some_rows<int8, R>(a, b0, b1, count, first, own, offset, [](int64_t) {});
            else some_rows<int8, R>(a, b0, b1, count, first, own, offset, between);
        };
        if (rows - row > 4) some(std::integral_constant<int, 8>());
        else if (rows - row > 2) some(std::integral_constant<int, 4>());
        else if (rows - row == 2) some(std::integral_constant<int, 2>());
        else some(std::integral_constant<int, 1>());
    }
}
}  // namespace jlora::tiles
