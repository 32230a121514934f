// A whole language model over rows of tokens: every block in one call, activations in small buffers
// that are used again. Runs prompts, and single steps of rows that share what came before.
// The structs are those of decoder.py.
#pragma once
#include "attention.h"
#include "linear.h"
#include "shared_attention.h"

namespace jlora {
struct Norm { const float *weight, *bias; };  // no bias: RMSNorm, otherwise LayerNorm
struct Block {
    Norm before_attention, before_mlp;
    Linear qkv[3], out, in[2], down;  // one Linear for query, key and value together, or three
};
struct Model {
    int64_t layers, C, H, G, D, inner;
    double eps;
    const float *tokens, *positions, *frequencies;  // (V, C); learned positions, or rotary (D / 2,)
    Norm last;
};
constexpr int64_t row_block = 16;  // rows are made up to whole blocks: fewer kinds of products

// x += y where there is a y; then the norm of x, in the types wanted.
inline void add_and_norm(const Norm& norm, float eps, float* x, const float* y, int64_t rows, int64_t C,
        const Activations& to) {
    #pragma omp parallel
    {
        std::vector<float> own(C);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            float *a = x + i * C, *o = to.full ? to.full + i * C : own.data();
            if (y) for (int64_t j = 0; j < C; j++) a[j] += y[i * C + j];
            float sum = 0, square = 0;
            if (norm.bias) for (int64_t j = 0; j < C; j++) sum += a[j];
            const float mean = sum / C;
            for (int64_t j = 0; j < C; j++) square += (a[j] - mean) * (a[j] - mean);
            const float r = 1.0f / std::sqrt(square / C + eps);
            if (norm.bias) for (int64_t j = 0; j < C; j++) o[j] = (a[j] - mean) * r * norm.weight[j] + norm.bias[j];
            else for (int64_t j = 0; j < C; j++) o[j] = a[j] * r * norm.weight[j];
            if (to.rounded) for (int64_t j = 0; j < C; j++) to.rounded[i * C + j] = bf16_of(o[j]);
        }
    }
}

// SwiGLU of two halves, or GELU of one; see elementwise.h.
inline void activate(const float* gate, const float* up, int64_t n, const Activations& to) {
    #pragma omp parallel for schedule(static)
    for (int64_t at = 0; at < n; at += 1024) {
        float own[1024];
        const int64_t size = std::min<int64_t>(1024, n - at);
        float* o = to.full ? to.full + at : own;
        const float *a = gate + at, *b = up ? up + at : nullptr;
        if (b) for (int64_t j = 0; j < size; j++) o[j] = a[j] * sigmoid(a[j]) * b[j];
        else for (int64_t j = 0; j < size; j++)
            o[j] = a[j] * sigmoid(2 * 0.7978845608f * (a[j] + 0.044715f * a[j] * a[j] * a[j]));
        if (to.rounded) for (int64_t j = 0; j < size; j++) to.rounded[at + j] = bf16_of(o[j]);
    }
}

// Rows of tokens with their positions, and where each keeps its key and value.
struct Rows {
    int64_t count;
    const int *ids, *positions;
    std::vector<Place> places;
};

// x (whole blocks of rows, C); rows that only fill a block are zero.
inline void embed(const Model& m, const Rows& rows, int64_t whole, float* x) {
    for (int64_t i = 0; i < rows.count; i++) {
        const float* word = m.tokens + rows.ids[i] * m.C;
        std::copy_n(word, m.C, x + i * m.C);
        if (m.positions) add_scaled(x + i * m.C, 1.0f, m.positions + rows.positions[i] * m.C, m.C);
    }
    std::fill(x + rows.count * m.C, x + whole * m.C, 0.0f);
}

// Turned queries to q (rows, H, D), turned keys and the values to their places. What comes in stands
// in rows of from_stride (query, key and value in one row), or in three matrices (stride 0).
inline void place_heads(const Model& m, const Rows& rows, int64_t layer, const float* from_q, const float* from_k,
        const float* from_v, int64_t stride, const float* turns, float* q) {
    const int64_t half = m.D / 2, width = m.G * m.D, wide = m.H * m.D;
    #pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < rows.count; i++) {
        const float *c = turns + i * m.D, *s = c + half;
        auto turn = [&](const float* x, int64_t heads, float* y) {
            if (m.positions) std::copy_n(x, heads * m.D, y);
            else for (int64_t h = 0; h < heads; h++)
                for (int64_t j = 0; j < half; j++) {
                    const float a = x[h * m.D + j], b = x[h * m.D + half + j];
                    y[h * m.D + j] = a * c[j] - b * s[j];
                    y[h * m.D + half + j] = b * c[j] + a * s[j];
                }
        };
        turn(from_q + i * (stride ? stride : wide), m.H, q + i * wide);
        turn(from_k + i * (stride ? stride : width), m.G, rows.places[i].at(layer, 0, width));
        std::copy_n(from_v + i * (stride ? stride : width), width, rows.places[i].at(layer, 1, width));
    }
}

// attend(layer, q, out) is the attention of one layer over rows of (H, D). hidden (rows, C) is what
// the head reads.
template <typename Attend>
inline void run_rows(const Model& m, const Block* blocks, const Rows& rows, const Attend& attend, float* hidden) {
    const int64_t R = (rows.count + row_block - 1) / row_block * row_block, wide = m.H * m.D;
    const int64_t widest = std::max({m.C, wide, m.inner});
    static Buffer<float> states, sums, full, inner[2], heads[3], queries, turned;
    static Buffer<uint16_t> rounded;
    float *x = states.of(R * m.C), *y = sums.of(R * m.C), *q = queries.of(R * wide), *turns = turned.of(R * m.D);
    const Activations both{full.of(R * widest), rounded.of(R * widest)};
    auto wanted = [&](const Linear& a, const Linear& b) {
        const bool f = reads_full(a) || reads_full(b), r = reads_rounded(a) || reads_rounded(b);
        return Activations{f ? both.full : nullptr, r ? both.rounded : nullptr};
    };
    embed(m, rows, R, x);
    if (!m.positions)
        for (int64_t i = 0; i < rows.count; i++)
            for (int64_t j = 0; j < m.D / 2; j++) {
                const float angle = rows.positions[i] * m.frequencies[j];
                turns[i * m.D + j] = std::cos(angle);
                turns[i * m.D + m.D / 2 + j] = std::sin(angle);
            }
    for (int64_t layer = 0; layer < m.layers; layer++) {
        const Block& block = blocks[layer];
        const Linear* qkv = block.qkv;
        Activations in = wanted(qkv[0], qkv[1]);
        if (reads_full(qkv[2])) in.full = both.full;
        if (reads_rounded(qkv[2])) in.rounded = both.rounded;
        add_and_norm(block.before_attention, m.eps, x, layer ? y : nullptr, R, m.C, in);
        float* made[3] = {};
        for (int i = 0; i < 3; i++)
            if (qkv[i].kind) apply(qkv[i], in, made[i] = heads[i].of(R * qkv[i].n), R);
        if (made[1]) place_heads(m, rows, layer, made[0], made[1], made[2], 0, turns, q);
        else place_heads(m, rows, layer, made[0], made[0] + wide, made[0] + wide + m.G * m.D, qkv[0].n, turns, q);
        attend(layer, q, both.full);
        if (reads_rounded(block.out)) round_to_bf16(both.full, both.rounded, R * wide);
        apply(block.out, both, y, R);

        in = wanted(block.in[0], block.in[1]);
        add_and_norm(block.before_mlp, m.eps, x, y, R, m.C, in);
        float* opened[2] = {};
        for (int i = 0; i < 2; i++)
            if (block.in[i].kind) apply(block.in[i], in, opened[i] = inner[i].of(R * m.inner), R);
        in = wanted(block.down, block.down);
        activate(opened[0], opened[1], R * m.inner, in);
        apply(block.down, in, y, R);
    }
    add_and_norm(m.last, m.eps, x, y, rows.count, m.C, {hidden, nullptr});
}

// Prompts of ``lengths`` tokens one after the other: their keys and values go to the blocks, and
// hidden (P, C) is the state of each one's last token.
inline void run_prompts(const Model& m, const Block* blocks, int64_t P, const int* ids, const int* positions,
        const int* lengths, float* const* prompts, float* hidden) {
    Rows rows{0, ids, positions, {}};
    std::vector<int64_t> starts;
    for (int64_t p = 0; p < P; p++) {
        starts.push_back(rows.count);
        for (int64_t t = 0; t < lengths[p]; t++) rows.places.push_back({prompts[p], lengths[p], t});
        rows.count += lengths[p];
    }
    static Buffer<float> log_sums, states;
    float *lse = log_sums.of(rows.count * m.H), *all = states.of(rows.count * m.C);
    const int none = 0;
    run_rows(m, blocks, rows, [&](int64_t layer, const float* q, float* out) {
        #pragma omp parallel for schedule(dynamic) if (P > 1)
        for (int64_t p = 0; p < P; p++) {
            const int64_t T = lengths[p], at = starts[p] * m.H;
            const Place& first = rows.places[starts[p]];
            attention_forward({1, T, T, m.H, m.G, m.D, 1.0f / std::sqrt((float)m.D)}, q + at * m.D,
                first.at(layer, 0, m.G * m.D), first.at(layer, 1, m.G * m.D), &none, lengths + p, out + at * m.D, lse + at);
        }
    }, all);
    for (int64_t p = 0; p < P; p++)
        std::copy_n(all + (starts[p] + lengths[p] - 1) * m.C, m.C, hidden + p * m.C);
}

// One more token a row; the last of a row's places in the table is the new token's own.
inline void run_step(const Model& m, const Block* blocks, int64_t R, const int* ids, const int* positions,
        float* const* prompts, const int* prompt_tokens, const int* table, int64_t most, const int* lengths,
        float* const* slabs, int64_t slab_size, int64_t slab_count, float* hidden) {
    if (!R) return;
    const auto groups = group_rows(R, m.H / m.G, prompts, prompt_tokens, table, most, lengths, slabs, slab_size, slab_count);
    Rows rows{R, ids, positions, {}};
    for (int64_t r = 0; r < R; r++) {
        const int place = table[r * most + lengths[r] - 1];
        rows.places.push_back({slabs[place / slab_size], slab_size, place % slab_size});
    }
    run_rows(m, blocks, rows, [&](int64_t layer, const float* q, float* out) {
        shared_attention(groups, layer, m.H, m.G, m.D, q, out);
    }, hidden);
}
}  // namespace jlora
