// Products with frozen weights in bf16: y = x W^T and back, dx = dy W.
//
// A weight is packed once. Activations come as `Rows`, bf16 in the layout that the product wants, and
// results go to a function, 32 columns of a row at a time, so that whatever is to be done with them
// (bias, activation, residual, rounding) costs no pass of its own. With AMX or AVX-512's bf16 the product is
// that of tiles.h and one packing serves both directions; elsewhere it is oneDNN's, with a packing for each.
#pragma once
#include <algorithm>
#include <cstdint>
#include "bf16.h"
#include "buffer.h"
#include "lanes.h"
#include "native.h"
#if defined(JLORA_TILES)
#include "tiles.h"
#else
#include "onednn.h"
#endif

namespace jlora {
inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Weight;
// Weights with the same inputs, whose outputs stand side by side; all but the last have a multiple of
// 32 outputs.
struct Weights {
    const Weight* list[3];
    int64_t count;
};

#if defined(JLORA_TILES)
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

// A tile of a weight: 16 outputs n by 32 inputs k, stored [k / 2][n][k % 2], or in int8 by 64 inputs,
// stored [k / 4][n][k % 4]; filled up with zeros.
struct Weight {
    char* tiles;
    int64_t n, k;         // outputs and inputs
    int64_t stride;       // bytes from the tiles of 16 outputs to the next 16
    const float* scales;  // of int8 numbers, one for each output; null: bf16
    int64_t int8_back;    // whether gradients, too, are multiplied in int8
    int64_t inputs_a_tile() const { return scales ? 64 : 32; }
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
#include "int8.h"
namespace jlora {
// w: (n, k) row by row, or (k, n) when transposed.
inline void pack(const float* w, const Weight& out, bool transposed) {
    const int64_t along_n = transposed ? 1 : out.k, along_k = transposed ? out.n : 1;
    if (out.scales) return int8::pack(w, out, along_n, along_k);
    #pragma omp parallel for schedule(static)
    for (int64_t t = 0; t < up_to(out.n, 32) / 16; t++)
        for (int64_t k = 0; k < up_to(out.k, 32); k++)
            for (int64_t i = 0; i < 16; i++) {
                const int64_t n = t * 16 + i;
                const float x = n < out.n && k < out.k ? w[n * along_n + k * along_k] : 0.0f;
                out.at(n, k) = bf16_of(x);
            }
}
inline void unpack(const Weight& w, float* out, bool transposed) {
    const int64_t along_n = transposed ? 1 : w.k, along_k = transposed ? w.n : 1;
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < w.n; n++)
        for (int64_t k = 0; k < w.k; k++)
            out[n * along_n + k * along_k] = w.scales ? int8::at(w, n, k) * w.scales[n] : float_of(w.at(n, k));
}

// Row n of a bf16 weight.
inline void unpack_row(const Weight& w, int64_t n, float* row) {
    for (int64_t k = 0; k < w.k; k++) row[k] = float_of(w.at(n, k));
}

// 8 x 8 numbers of 64 bits.
inline void transpose8(__m512i* x) {
    __m512i y[8];
    for (int i = 0; i < 8; i += 2) {
        y[i] = _mm512_unpacklo_epi64(x[i], x[i + 1]);
        y[i + 1] = _mm512_unpackhi_epi64(x[i], x[i + 1]);
    }
    for (int i = 0; i < 2; i++)
        for (int half = 0; half < 8; half += 4) {
            const __m512i a = y[half + i], b = y[half + 2 + i];
            x[half + i] = _mm512_shuffle_i64x2(a, b, 0x88);
            x[half + 2 + i] = _mm512_shuffle_i64x2(a, b, 0xdd);
        }
    for (int i = 0; i < 4; i++) {
        const __m512i a = x[i], b = x[i + 4];
        y[i] = _mm512_shuffle_i64x2(a, b, 0x88);
        y[i + 4] = _mm512_shuffle_i64x2(a, b, 0xdd);
    }
    for (int i = 0; i < 8; i++) x[i] = y[i];
}

// Two tiles of 32 outputs by 32 inputs become two for the way back: [n / 2][k][n % 2], inputs 0-15
// to `left` and 16-31 to `right`.
inline void turn_tiles(const uint16_t* upper, const uint16_t* lower, uint16_t* left, uint16_t* right) {
    // [k / 2][n / 2] groups of 4 numbers (n, k), (n, k + 1), (n + 1, k), (n + 1, k + 1): the inner two
    // change places, and then the matrix of groups is transposed.
    const __m512i swap = _mm512_set4_epi32(0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100);
    const uint16_t* from[2] = {upper, lower};
    uint16_t* to[2] = {left, right};
    for (int t = 0; t < 2; t++)
        for (int half = 0; half < 2; half++) {
            __m512i x[8];
            for (int i = 0; i < 8; i++)
                x[i] = _mm512_shuffle_epi8(_mm512_load_si512(from[t] + (half * 8 + i) * 32), swap);
            transpose8(x);
            for (int i = 0; i < 8; i++) _mm512_store_si512(to[half] + (t * 8 + i) * 32, x[i]);
        }
}

struct ForwardPanels {
    const Weights& all;
    void panel(int64_t p, int64_t s, int64_t, char*, const char*& b0, const char*& b1) const {
        const Weight& w = find(all, p);
        b0 = (const char*)w.tile(2 * p, s), b1 = b0 + w.stride;
    }
    void fetch(int64_t p, int64_t s, int64_t line) const {
        const Weight& w = find(all, p);
        const char* at = (const char*)w.tile(2 * p, s) + line * 64;
        _mm_prefetch(at, _MM_HINT_T1);
        _mm_prefetch(at + w.stride, _MM_HINT_T1);
    }
};
// The way back contracts over the outputs of all of them.
struct BackwardPanels {
    const Weights& all;
    void panel(int64_t p, int64_t s, int64_t n, char* room, const char*& b0, const char*& b1) const {
        uint16_t *left = (uint16_t*)room, *right = left + n * 512;
        for (int64_t i = 0; i < n; i++) {
            int64_t step = s + i;
            const Weight& w = find(all, step);
            if (w.scales) {
                int8::widen_tiles(w, step, p, left + i * 512, right + i * 512);
                continue;
            }
            turn_tiles(w.tile(2 * step, p), w.tile(2 * step + 1, p), left + i * 512, right + i * 512);
        }
        b0 = (const char*)left, b1 = (const char*)right;
    }
    void fetch(int64_t p, int64_t s, int64_t line) const {
        int64_t step = s + line / 16;
        const Weight& w = find(all, step);
        const char* at = w.scales ? int8::half_tile(w, 2 * step, p) + line % 8 * 64
                                  : (const char*)w.tile(2 * step, p) + line % 16 * 64;
        _mm_prefetch(at, _MM_HINT_T1);
        _mm_prefetch(at + w.stride, _MM_HINT_T1);
    }
};

// sink(m, n, left, right): outputs n to n + 31 of row m.
template <typename Sink>
void product(const Rows& x, const Weights& all, Sink sink) {
    if (!x.rows) return;
    if (all.list[0]->scales) return int8::product(x, all, panels(all), ForwardPanels{all}, sink);
    tiles::product<false>((const char*)x.data, x.rows, panels(all), x.steps(), ForwardPanels{all}, sink);
}
template <typename Sink>
void product_back(const Rows& dy, const Weights& all, Sink sink) {
    if (!dy.rows) return;
    const Weight& first = *all.list[0];
    if (first.int8_back) return int8::product_back(dy, all, sink);
    tiles::product<false>((const char*)dy.data, dy.rows, up_to(first.k, 32) / 32, panels(all), BackwardPanels{all}, sink);
}
// What a weight is kept in.
enum Kind { bf16_kind, int8_kind, int8_both_kind };
inline int64_t weight_bytes(int64_t n, int64_t k, int64_t kind) {
    if (!tiles::permitted()) return 0;
    if (kind == bf16_kind) return up_to(n, 32) * up_to(k, 32) * 2;
    return up_to(n, 64) * (up_to(k, 64) + (int64_t)sizeof(float));
}
inline Weight weight_in(char* memory, int64_t n, int64_t k, int64_t kind) {
    if (kind == bf16_kind) return {memory, n, k, up_to(k, 32) * 32, nullptr, 0};
    const float* scales = (const float*)(memory + up_to(n, 64) * up_to(k, 64));
    return {memory, n, k, up_to(k, 64) * 16, scales, kind == int8_both_kind};
}

#else
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
template <typename Sink>
void product(const Rows& x, const Weights& all, Sink sink) {
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
#endif

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
