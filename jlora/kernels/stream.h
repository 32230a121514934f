// What a block's attention reads and writes: heads over a stream of sequences.
#pragma once
#include <cmath>
#include "activation.h"
#include "attention.h"
#include "product.h"

namespace jlora {
// Sequence i is rows starts[i] to starts[i + 1]. A row of qkv: all query heads, key heads, value heads.
struct Stream {
    int64_t rows, sequences;
    const int* starts;
    int64_t heads, key_heads, D;
    const float *cos, *sin;  // (rows, turn.size / 2); null: no rotary embedding
    Turn turn;
    Scores scores;
    int64_t grouped;         // a row of qkv has of each key head its query heads, itself, its value
    Rows qkv, attended;      // qkv: before rotary embedding
    float* lse;              // (heads, rows)
    int64_t per() const { return heads / key_heads; }
    // Where head h of the queries stands, and the key head g and its values.
    int64_t query_column(int64_t h) const { return (h + (grouped ? h / per() * 2 : 0)) * D; }
    int64_t key_column(int64_t g) const { return (grouped ? g * (per() + 2) + per() : heads + g) * D; }
    int64_t value_column(int64_t g) const { return key_column(g) + (grouped ? 1 : key_heads) * D; }
};
}  // namespace jlora
