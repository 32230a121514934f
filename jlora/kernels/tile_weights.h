// Rows and weights as the tiles that tiles.h multiplies.
#pragma once
#include "tiles.h"
#include "weights.h"

namespace jlora {
// Rows of bf16 numbers as tiles of 16 rows x 32 columns; an even number of row tiles.
struct Rows {
    uint16_t* data;
    int64_t rows, width;
    static constexpr bool filled_up = true;  // with zeros, to whole tiles
    static int64_t numbers(int64_t rows, int64_t width) { return up_to(rows, 32) * up_to(width, 32); }
    int64_t steps() const { return up_to(width, 32) / 32; }
    // 32 neighbours from column k, a multiple of 32, on.
    uint16_t* at(int64_t m, int64_t k) const { return data + (m / 16 * steps() + k / 32) * 512 + m % 16 * 32; }
};

// Added to int8 activations: most processors multiply bytes without a sign by bytes with one.
constexpr int bias = tiles::unsigned_rows ? 128 : 0;
// What a weight is kept in. int8_both: gradients, too, are multiplied in int8.
enum Kind : int64_t { bf16_kind, int8_kind, int8_both_kind, int4_kind };
// A tile of a weight: 16 outputs n by 32 inputs k, stored [k / 2][n][k % 2], or in int8 by 64 inputs,
// stored [k / 4][n][k % 4]; filled up with zeros. In int4: see int4.h.
struct Weight {
    char* tiles;
    int64_t n, k;         // outputs and inputs
    int64_t stride;       // bytes from the tiles of 16 outputs to the next 16
    const float* scales;  // of int8 numbers, one for each output; null: of other kinds
    int64_t kind;
    // Of the tiles that are multiplied forward.
    int64_t inputs_a_tile() const { return kind == bf16_kind ? 32 : 64; }
    int64_t steps() const { return up_to(k, inputs_a_tile()) / inputs_a_tile(); }
    uint16_t* tile(int64_t n_tile, int64_t k_tile) const {
        return (uint16_t*)(tiles + n_tile * stride + k_tile * tiles::tile_bytes);
    }
    uint16_t& at(int64_t n, int64_t k) const { return tile(n / 16, k / 32)[k % 32 / 2 * 32 + n % 16 * 2 + k % 2]; }
};

inline int64_t panels(const Weight& w) { return up_to(w.n, 32) / 32; }
inline int64_t panels(const Weights& all) {
    int64_t sum = 0;
    for (int64_t i = 0; i < all.count; i++) sum += panels(*all.list[i]);
    return sum;
}
// The weight to which panel p belongs; p becomes its number there.
inline const Weight& find(const Weights& all, int64_t& p) {
    int64_t i = 0;
    while (p >= panels(*all.list[i])) p -= panels(*all.list[i++]);
    return *all.list[i];
}
}  // namespace jlora
