// Gradients of trained parameters: of weights, dW = dy^T x, a product contracted over the rows, and of
// biases, sums over the rows. Factors are the `Rows` that the other products read; sums are float32.
#pragma once
#include <algorithm>
#include <vector>
#include "product.h"

namespace jlora {
// Columns `first` to first + width of rows; `first` is a multiple of 32.
struct Columns {
    Rows rows;
    int64_t first, width;
    Columns(const Rows& rows, int64_t first, int64_t width) : rows(rows), first(first), width(width) {}
    Columns(const Rows& rows) : Columns(rows, 0, rows.width) {}
};

// y[j] = the sum of column j
inline void sum_columns(const Columns& x, float* y) {
    #pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < x.width; j += 32) {
        const int64_t count = std::min<int64_t>(32, x.width - j);
        float run[32] = {}, sums[32] = {};
        for (int64_t m = 0; m < x.rows.rows; m++) {
            to_float(x.rows.at(m, x.first + j), run, count);
            for (int64_t i = 0; i < 32; i++) sums[i] += run[i];
        }
        std::copy_n(sums, count, y + j);
    }
}

#if defined(JLORA_TILES)
// A weight's gradient contracts over the rows, where tiles are filled up to 32 with what was there before.
inline void clear_end(const Rows& x) {
    for (int64_t m = x.rows; m < up_to(x.rows, 32); m++)
        for (int64_t k = 0; k < up_to(x.width, 32); k += 32) std::fill_n(x.at(m, k), 32, (uint16_t)0);
}
struct RowPanels {
    const Columns& x;
    const uint16_t* tile(int64_t p, int64_t step) const { return x.rows.at(step * 32, x.first + p * 32); }
    int64_t to_lower() const { return x.rows.steps() * 512; }
    static constexpr bool by_columns = false;
    void panel(int64_t p, int64_t s, int64_t n, char* room, const char*& b0, const char*& b1) const {
        uint16_t *left = (uint16_t*)room, *right = left + n * 512;
        for (int64_t i = 0; i < n; i++)
            pair_tiles(tile(p, s + i), tile(p, s + i) + to_lower(), left + i * 512, right + i * 512);
        b0 = (const char*)left, b1 = (const char*)right;
    }
    void fetch(int64_t p, int64_t s, int64_t line) const {
        const uint16_t* at = tile(p, s + line / 16) + line % 16 * 32;
        tiles::fetch_line(at);
        tiles::fetch_line(at + to_lower());
    }
};
// y (left.width, right.width) = left^T right, or y += it.
inline void product_over_rows(const Columns& left, const Columns& right, float* y, bool add) {
    const int64_t rows = left.rows.rows, steps = up_to(rows, 32) / 32;
    if (!rows) {
        if (!add) std::fill_n(y, left.width * right.width, 0.0f);
        return;
    }
    clear_end(left.rows), clear_end(right.rows);
    static Buffer<uint16_t> for_turned;
    uint16_t* turned = for_turned.of(up_to(left.width, 32) * steps * 32);
    #pragma omp parallel for collapse(2) schedule(static)
    for (int64_t c = 0; c < up_to(left.width, 32) / 32; c++)
        for (int64_t s = 0; s < steps; s++) {
            alignas(64) uint16_t pairs[2][512];
            const uint16_t* upper = left.rows.at(s * 32, left.first + c * 32);
            pair_tiles(upper, upper + left.rows.steps() * 512, pairs[0], pairs[1]);
            for (int64_t half = 0; half < 2; half++) turn_tile(pairs[half], turned + ((2 * c + half) * steps + s) * 512);
        }
    const int64_t width = right.width;
    tiles::product<false>((const char*)turned, left.width, up_to(width, 32) / 32, steps, RowPanels{right},
        [&](int64_t m, int64_t n, F16 l, F16 r) {
            const int64_t count = std::min<int64_t>(32, width - n);
            float* to = y + m * width + n;
            F16 before{}, after{};
            if (add) load_some(to, before, after, count);
            store_some(to, l + before, r + after, count);
        });
}
// x (rows, k), dy (rows, n) -> dw, (n, k) as nn.Linear holds it or (k, n) as Conv1D does (transposed).
inline void weight_gradient(const Columns& x, const Columns& dy, bool transposed, float* dw) {
    if (transposed) product_over_rows(x, dy, dw, false);
    else product_over_rows(dy, x, dw, false);
}
// A weight packed by a call before, and handed over as an array.
inline Weight weight_of(void* memory, int64_t n, int64_t k) {
    return weight_in((char*)up_to((int64_t)(uintptr_t)memory, line), n, k, bf16_kind);
}
#endif
}  // namespace jlora
