// What a block's attention reads and writes: heads over a stream of sequences.
#pragma once
#include <cmath>
#include "product.h"

namespace jlora {
// Sequence i is rows starts[i] to starts[i + 1]. A row of qkv: all query heads, key heads, value heads.
struct Stream {
    int64_t rows, sequences;
    const int* starts;
    int64_t heads, key_heads, D;
    const float *cos, *sin;  // (rows, D / 2); null: no rotary embedding
    Rows qkv, attended;      // qkv: before rotary embedding
    float* lse;              // (heads, rows)
    int64_t per() const { return heads / key_heads; }
    int64_t key_column(int64_t g) const { return (heads + g) * D; }
    int64_t value_column(int64_t g) const { return (heads + key_heads + g) * D; }
    float scale() const { return 1.0f / std::sqrt((float)D); }
};
}  // namespace jlora
