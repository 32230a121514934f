// What attention does with tiles: their forms, products of blocks of 32 rows, powers of two.
//
// Rows of a head (x: query or key, d: place in the head) become tiles in the forms that products read:
//   rows    [x][d]             left factors, as in `Rows`
//   turned  [d / 2][x][d % 2]  right factors, contracted over d
//   paired  [x / 2][d][x % 2]  right factors, contracted over x
#pragma once
#include "product.h"

namespace jlora {
constexpr int64_t tile = 512;  // bf16 numbers

// 2^x to about 1e-7 relative; 0 far below.
JLORA_INLINE F16 exp2_16(F16 x) {
#if defined(__AVX512F__)
    const F16 n = (F16)_mm512_roundscale_ps((__m512)x, 0);
#else
    const I16 whole = nearest16(x);
    const F16 n = floats(whole);
#endif
    const F16 r = x - n;
    F16 p = r * 1.3276472e-3f + 9.67554148e-3f;
    p = p * r + 5.55071327e-2f;
    p = p * r + 2.40221197e-1f;
    p = p * r + 6.93146967e-1f;
    p = p * r + 1.0f;
#if defined(__AVX512F__)
    return (F16)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    return blend(x < -126.0f, F16{}, p * (F16)((whole + 127) << 23));
#endif
}

// Tiles of a factor: of 16 rows (or outputs) those that a product contracts, one after the other.
struct Tiles {
    uint16_t* data;
    int64_t steps;
    Tiles(Buffer<uint16_t>& memory, int64_t count, int64_t steps)
        : data(memory.of(count * steps * tile)), steps(steps) {}
    uint16_t* at(int64_t i, int64_t step) const { return data + (i * steps + step) * tile; }
};
// 32 x 32 results in four tiles at c: rows from 32 i on of a with outputs from 32 j on of b, `count` steps
// from a_step and b_step on; added to c unless these are the first.
inline void multiply(const Tiles& a, int64_t i, int64_t a_step, const Tiles& b, int64_t j, int64_t b_step,
        int64_t count, bool first, float* c) {
    tiles::steps<false>((const char*)a.at(2 * i, a_step), (const char*)a.at(2 * i + 1, a_step),
        (const char*)b.at(2 * j, b_step), (const char*)b.at(2 * j + 1, b_step), count, first, c, [] {});
}
// Where 16 results of row r, from column d on, stand in such blocks side by side.
inline float* result(float* c, int64_t r, int64_t d) {
    return c + d / 32 * tiles::block_floats + r / 16 * 512 + d % 32 / 16 * 256 + r % 16 * 16;
}
inline void turn_block(const Tiles& rows, const Tiles& to, int64_t b) {
    for (int64_t half = 0; half < 2; half++)
        for (int64_t d = 0; d < rows.steps; d++) turn_tile(rows.at(half, d), to.at(2 * b + half, d));
}
inline void pair_block(const Tiles& rows, const Tiles& to, int64_t b) {
    for (int64_t d = 0; d < rows.steps; d++)
        pair_tiles(rows.at(0, d), rows.at(1, d), to.at(2 * d, b), to.at(2 * d + 1, b));
}
}  // namespace jlora
