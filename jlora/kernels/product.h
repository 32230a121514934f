// Products with frozen weights in bf16: y = x W^T and back, dx = dy W.
//
// A weight is packed once. Activations come as `Rows`, bf16 in the layout that the product wants, and
// results go to a function, 32 columns of a row at a time, so that whatever is to be done with them
// (bias, activation, residual, rounding) costs no pass of its own.
#pragma once
#include <algorithm>
#include "bf16.h"
#include "buffer.h"
#include "lanes.h"
#include "native.h"
#if defined(JLORA_TILES)
#include "tile_product.h"
#else
#include "onednn_product.h"
#endif

namespace jlora {
// Rounds float rows; columns beyond the width become zero.
inline void round_rows(const float* x, const Rows& out) {
    #pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < out.rows; m++)
        for (int64_t k = 0; k < out.width; k += 32) {
            const int64_t n = std::min<int64_t>(32, out.width - k);
            const float* from = x + m * out.width + k;
            if (n == 32) {
                store32(out.at(m, k), load16(from), load16(from + 16));
                continue;
            }
            uint16_t* to = out.at(m, k);
            to_bf16(from, to, n);
            if (Rows::filled_up) std::fill(to + n, to + 32, 0);
        }
}
inline Rows rows_in(Buffer<uint16_t>& memory, int64_t rows, int64_t width) {
    return {memory.of(Rows::numbers(rows, width)), rows, width};
}
}  // namespace jlora
