// What product.h says, by oneDNN, with a packing of a weight for each direction.
#pragma once
#include <algorithm>
#include <cstddef>
#include "lanes.h"
#include "onednn.h"
#include "weights.h"

namespace jlora {
// Rows of bf16 numbers, one after the other.
struct Rows {
    uint16_t* data;
    int64_t rows, width;
    static constexpr bool filled_up = false;
    static int64_t numbers(int64_t rows, int64_t width) { return rows * width; }
    uint16_t* at(int64_t m, int64_t k) const { return data + m * width + k; }
};
struct Weight {
    char* forward;    // packed as (n, k)
    int64_t n, k;     // outputs and inputs
    char* backward;   // packed as (k, n)
};
static_assert(sizeof(Weight) <= 48 && offsetof(Weight, n) == 8 && offsetof(Weight, k) == 16, "Weight of structs.py");
inline int64_t weight_bytes(int64_t n, int64_t k, int64_t kind) {
    if (kind) return 0;  // bf16 alone
    const int64_t forward = onednn::bytes(n, k), backward = onednn::bytes(k, n);
    return forward && backward ? up_to(forward, line) + backward : 0;
}
inline Weight weight_in(char* memory, int64_t n, int64_t k, int64_t) {
    return {memory, n, k, memory + up_to(onednn::bytes(n, k), line)};
}
inline void pack(const float* w, const Weight& out, bool transposed) {
    const auto from = onednn::plain(out.n, out.k, transposed), back = onednn::plain(out.k, out.n, !transposed);
    onednn::convert(from, w, onednn::packed_layout(out.n, out.k), out.forward);
    onednn::convert(back, w, onednn::packed_layout(out.k, out.n), out.backward);
}
inline void unpack(const Weight& w, float* out, bool transposed) {
    onednn::convert(onednn::packed_layout(w.n, w.k), w.forward, onednn::plain(w.n, w.k, transposed), out);
}
template <typename Sink>
void hand_over(const float* y, int64_t rows, int64_t width, int64_t first, Sink sink) {
    #pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < rows; m++)
        for (int64_t n = 0; n < width; n += 32) {
            const float* run = y + m * width + n;
            float end[32];  // the last columns may be fewer
            if (width - n < 32) run = std::copy_n(run, width - n, end) - (width - n);
            sink(m, first + n, load16(run), load16(run + 16));
        }
}
// Rows are divided among the threads evenly, so that it is steady anyhow.
template <typename Sink>
void product(const Rows& x, const Weights& all, Sink sink, bool = false) {
    static Buffer<float> results;
    for (int64_t i = 0, first = 0; x.rows && i < all.count; first += all.list[i++]->n) {
        const Weight& w = *all.list[i];
        float* y = results.of(x.rows * w.n);
        onednn::multiply(x.data, w.forward, y, x.rows, w.n, w.k);
        hand_over(y, x.rows, w.n, first, sink);
    }
}
template <typename Sink>
void product_back(const Rows& dy, const Weights& all, Sink sink) {
    static Buffer<float> results, one;
    static Buffer<uint16_t> part;
    const int64_t k = all.list[0]->k;
    float* dx = results.of(dy.rows * k);
    for (int64_t i = 0, first = 0; dy.rows && i < all.count; first += all.list[i++]->n) {
        const Weight& w = *all.list[i];
        if (all.count == 1) {
            onednn::multiply(dy.data, w.backward, dx, dy.rows, k, w.n);
            continue;
        }
        uint16_t* own = part.of(dy.rows * w.n);
        for (int64_t m = 0; m < dy.rows; m++) std::copy_n(dy.at(m, first), w.n, own + m * w.n);
        float* y = one.of(dy.rows * k);
        onednn::multiply(own, w.backward, i ? y : dx, dy.rows, k, w.n);
        #pragma omp parallel for simd schedule(static)
        for (int64_t j = 0; j < (i ? dy.rows * k : 0); j++) dx[j] += y[j];
    }
    hand_over(dx, dy.rows, k, 0, sink);
}
}  // namespace jlora
