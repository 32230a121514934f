// tile_turns.h and the turns of int8.h by vectors of 16 bytes, which every processor has.
#pragma once
#include <cstdint>
#include <cstring>
#include "lanes.h"

namespace jlora {
typedef uint32_t Four __attribute__((vector_size(16)));
inline Four load_four(const uint32_t* p) { Four v; std::memcpy(&v, p, 16); return v; }

// Numbers of 32 bits: 4 R rows of 4 C, `stride` apart, become rows `turned_stride` apart.
template <int R, int C>
inline void turn_numbers(const uint32_t* from, int64_t stride, uint32_t* to, int64_t turned_stride) {
    for (int r = 0; r < 4 * R; r += 4)
        for (int c = 0; c < 4 * C; c += 4) {
            Four x[4], y[4];
            for (int i = 0; i < 4; i++) x[i] = load_four(from + (r + i) * stride + c);
            for (int i = 0; i < 2; i++) {
                y[2 * i] = __builtin_shuffle(x[i], x[i + 2], Four{0, 4, 1, 5});
                y[2 * i + 1] = __builtin_shuffle(x[i], x[i + 2], Four{2, 6, 3, 7});
            }
            for (int i = 0; i < 2; i++) {
                const Four even = __builtin_shuffle(y[i], y[i + 2], Four{0, 4, 1, 5});
                const Four odd = __builtin_shuffle(y[i], y[i + 2], Four{2, 6, 3, 7});
                std::memcpy(to + (c + 2 * i) * turned_stride + r, &even, 16);
                std::memcpy(to + (c + 2 * i + 1) * turned_stride + r, &odd, 16);
            }
        }
}
// Rows [x][d] become turned, [d / 2][x][d % 2], or turned ones rows: a matrix of 16 x 16 pairs.
inline void turn_tile(const uint16_t* from, uint16_t* to) {
    turn_numbers<4, 4>((const uint32_t*)from, 16, (uint32_t*)to, 16);
}
// Rows [x][d] become paired, [x / 2][d][x % 2]: 32 rows of 32 columns.
inline void pair_tiles(const uint16_t* upper, const uint16_t* lower, uint16_t* left, uint16_t* right) {
    for (int i = 0; i < 16; i++) {
        const uint16_t* from = (i < 8 ? upper : lower) + i % 8 * 64;
        for (int d = 0; d < 16; d++) {
            left[i * 32 + 2 * d] = from[d], left[i * 32 + 2 * d + 1] = from[d + 32];
            right[i * 32 + 2 * d] = from[d + 16], right[i * 32 + 2 * d + 1] = from[d + 48];
        }
    }
}
// int8: half a tile, 8 rows [k / 4][n][k % 4], as rows of bf16 [n][k] times the outputs' scales.
inline void widen_half(const char* half, const float* scales, uint16_t* rows) {
    alignas(64) uint32_t turned[16 * 8];
    turn_numbers<2, 4>((const uint32_t*)half, 16, turned, 8);
    for (int n = 0; n < 16; n++) {
        const int8_t* own = (const int8_t*)(turned + n * 8);
        store32(rows + n * 32, load16(own) * scales[n], load16(own + 16) * scales[n]);
    }
}
// int8: 4 rows [k / 4][n][k % 4] become [n / 4][k][n % 4].
inline void turn_bytes(const char* rows, char* out) {
    typedef int8_t Bytes __attribute__((vector_size(16)));
    for (int q = 0; q < 4; q++)
        for (int i = 0; i < 4; i++) {
            Bytes v;
            std::memcpy(&v, rows + q * 64 + i * 16, 16);
            v = __builtin_shuffle(v, Bytes{0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15});
            std::memcpy(out + i * 64 + q * 16, &v, 16);
        }
}
}  // namespace jlora
