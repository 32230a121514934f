// A whole language model over rows of tokens: every block in one call, activations in small buffers
// that are used again. Runs prompts, and single steps of rows that share what came before.
// The structs are those of decoder.py.
#pragma once
#include "attention.h"
#include "linear.h"
#include "norm.h"
#include "shared_attention.h"

namespace jlora::decode {
struct Block {
    Norm before_attention, before_mlp;
    Linear qkv[3], out, in[2], down;  // one Linear for query, key and value together, or three
    int64_t qkv_count() const { return qkv[1].kind ? 3 : 1; }
};
struct Model {
    int64_t layers, C, H, G, D, inner;
    double eps;
    const float* tokens;           // (V, C), or null where they are kept packed alone
    const Weight* packed_tokens;
    const float *positions, *frequencies;  // learned, (any, C), and rotary, (D / 2,); null: none
    Norm last;
    int64_t activation;            // see activation.h
    int64_t gated;                 // whether that of the first of two layers multiplies the second
};
constexpr int64_t row_block = 16;  // rows are made up to whole blocks: fewer kinds of products

inline void normalise(const Norm& norm, float eps, const float* x, int64_t C, const Input& to) {
    #pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < to.rounded.rows; m++) to.put_row(m, NormRow(norm, eps, x + m * C, C));
}

// Rows of tokens with their positions, and where each keeps its key and value.
struct Tokens {
    int64_t count;
    const int *ids, *positions;
    std::vector<Place> places;
};

// x (whole blocks of rows, C); rows that only fill a block are zero.
inline void embed(const Model& m, const Tokens& tokens, int64_t whole, float* x) {
    #pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < tokens.count; i++) {
        if (m.tokens) std::copy_n(m.tokens + tokens.ids[i] * m.C, m.C, x + i * m.C);
#if defined(JLORA_TILES)  // oneDNN's packed weights have no rows to read, and the floats are kept
        else unpack_row(*m.packed_tokens, tokens.ids[i], x + i * m.C);
#endif
        if (m.positions) add_scaled(x + i * m.C, 1.0f, m.positions + tokens.positions[i] * m.C, m.C);
    }
    std::fill(x + tokens.count * m.C, x + whole * m.C, 0.0f);
}

// Cosines and sines of each token's angles, (rows, 2, D / 2).
inline void angles(const Model& m, const Tokens& tokens, float* turns) {
    const int64_t half = m.D / 2;
    #pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < tokens.count; i++)
        for (int64_t j = 0; j < half; j++) {
            const float angle = tokens.positions[i] * m.frequencies[j];
            turns[i * m.D + j] = std::cos(angle);
            turns[i * m.D + half + j] = std::sin(angle);
        }
}

// Of rows (H + 2 G, D): queries to q (rows, H, D), keys and values to their places, the first two turned.
inline void place_heads(const Model& m, const Tokens& tokens, int64_t layer, const float* qkv, const float* turns, float* q) {
    const int64_t half = m.D / 2, width = m.G * m.D, wide = m.H * m.D;
    #pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < tokens.count; i++) {
        const float *row = qkv + i * (wide + 2 * width), *c = turns + i * m.D, *s = c + half;
        auto turn = [&](const float* x, int64_t heads, float* y) {
            std::copy_n(x, heads * m.D, y);
            for (int64_t h = 0; m.frequencies && h < heads; h++)
                for (int64_t j = 0; j < half; j++) rotate_pair(y[h * m.D + j], y[h * m.D + half + j], c[j], s[j]);
        };
        turn(row, m.H, q + i * wide);
        turn(row + wide, m.G, tokens.places[i].at(layer, 0, width));
        std::copy_n(row + wide + width, width, tokens.places[i].at(layer, 1, width));
    }
}

// attend(layer, q, out) is the attention of one layer over rows of (H, D). x (rows, C) is what the
// last norm reads; it stays valid until the next call.
template <typename Attend>
inline const float* run_tokens(const Model& m, const Block* blocks, const Tokens& tokens, const Attend& attend) {
    const int64_t R = up_to(tokens.count, row_block), C = m.C, wide = m.H * m.D, heads = wide + 2 * m.G * m.D;
    static Buffer<float> for_x, for_qkv, for_q, for_attended, for_inner, for_turns;
    static InputMemory for_normed, for_out, for_active;
    float *x = for_x.of(R * C), *qkv = for_qkv.of(R * heads), *q = for_q.of(R * wide), *attended = for_attended.of(R * wide);
    float *inner = for_inner.of(R * 2 * m.inner), *turns = for_turns.of(R * m.D);
    const auto add_to_x = [&](int64_t m, int64_t n, F16 left, F16 right, int64_t count) {
        F16 l, r;
        load_some(x + m * C + n, l, r, count);
        store_some(x + m * C + n, l + left, r + right, count);
    };
    embed(m, tokens, R, x);
    if (m.frequencies) angles(m, tokens, turns);
    for (int64_t layer = 0; layer < m.layers; layer++) {
        const Block& b = blocks[layer];
        const Input normed = for_normed.of(R, C, b.qkv, b.qkv_count());
        normalise(b.before_attention, m.eps, x, C, normed);
        apply(b.qkv, b.qkv_count(), normed, [&](int64_t m, int64_t n, F16 left, F16 right, int64_t count) {
            store_some(qkv + m * heads + n, left, right, count);
        });
        place_heads(m, tokens, layer, qkv, turns, q);
        attend(layer, q, attended);
        const Input out = for_out.of(R, wide, &b.out, 1);
        #pragma omp parallel for schedule(static)
        for (int64_t i = 0; i < R; i++)
            out.put_row(i, [&](int64_t k, int64_t n, F16& left, F16& right) {
                load_some(attended + i * wide + k, left, right, n);
            });
        apply(&b.out, 1, out, add_to_x);

        const int64_t parts = m.gated ? 2 : 1;
        const Input again = for_normed.of(R, C, b.in, parts), active = for_active.of(R, m.inner, &b.down, 1);
        normalise(b.before_mlp, m.eps, x, C, again);
        if (!m.gated || !gate_in_registers(m.activation, b.in, again, active)) {
            apply(b.in, parts, again, [&](int64_t row, int64_t n, F16 left, F16 right, int64_t count) {
                store_some(inner + row * parts * m.inner + n, left, right, count);
            });
            #pragma omp parallel for schedule(static)
            for (int64_t i = 0; i < R; i++)
                active.put_row(i, [&](int64_t k, int64_t n, F16& left, F16& right) {
                    const float* g = inner + i * parts * m.inner + k;
                    load_some(g, left, right, n);
                    left = activation16(m.activation, left), right = activation16(m.activation, right);
                    if (!m.gated) return;
                    F16 l, r;
                    load_some(g + m.inner, l, r, n);
                    left *= l, right *= r;
                });
        }
        apply(&b.down, 1, active, add_to_x);
    }
    return x;
}

// hidden (C,): what the head reads of one row.
inline void finish(const Model& m, const float* x, float* hidden) {
    const NormRow norm(m.last, m.eps, x, m.C);
    for (int64_t k = 0; k < m.C; k += 32) {
        const int64_t n = std::min<int64_t>(32, m.C - k);
        F16 left, right;
        norm(k, n, left, right);
        store_some(hidden + k, left, right, n);
    }
}

// Prompts of `lengths` tokens one after the other, each behind the `before` tokens whose keys and values
// stand in its block already: theirs go behind those, and hidden (P, C) is the state of each one's last token.
inline void run_prompts(const Model& m, const Block* blocks, int64_t P, const int* ids, const int* positions,
        const int* lengths, const int* before, float* const* prompts, float* hidden) {
    Tokens tokens{0, ids, positions, {}};
    std::vector<int64_t> starts;
    for (int64_t p = 0; p < P; p++) {
        starts.push_back(tokens.count);
        for (int64_t t = 0; t < lengths[p]; t++)
            tokens.places.push_back({prompts[p], before[p] + lengths[p], before[p] + t});
        tokens.count += lengths[p];
    }
    static Buffer<float> for_lse;
    float* lse = for_lse.of(tokens.count * m.H);
    const int64_t per = m.H / m.G, width = m.G * m.D, wide = m.H * m.D;
    const float scale = 1.0f / std::sqrt((float)m.D);
    const float* x = run_tokens(m, blocks, tokens, [&](int64_t layer, const float* q, float* out) {
        #pragma omp parallel
        {
            AttentionRoom room;
            #pragma omp for collapse(2) schedule(dynamic)
            for (int64_t p = 0; p < P; p++)
                for (int64_t g = 0; g < m.G; g++) {
                    const int64_t T = lengths[p], S = before[p] + T, at = starts[p] * wide + g * per * m.D;
                    const Place first{prompts[p], S, 0};
                    attend({T, S, before[p], per, m.D, scale, q + at, first.at(layer, 0, width) + g * m.D,
                        first.at(layer, 1, width) + g * m.D, wide, width, lse + starts[p] * m.H + g * per * T, T},
                        room, out + at, wide);
                }
        }
    });
    for (int64_t p = 0; p < P; p++) finish(m, x + (starts[p] + lengths[p] - 1) * m.C, hidden + p * m.C);
}

// One more token a row; the last of a row's places in the table is the new token's own.
inline void run_step(const Model& m, const Block* blocks, int64_t R, const int* ids, const int* positions,
        float* const* prompts, const int* prompt_tokens, const int* table, int64_t most, const int* lengths,
        float* const* slabs, int64_t slab_size, int64_t slab_count, float* hidden) {
    if (!R) return;
    const auto groups = group_rows(R, m.H / m.G, prompts, prompt_tokens, table, most, lengths, slabs, slab_size, slab_count);
    Tokens tokens{R, ids, positions, {}};
    for (int64_t r = 0; r < R; r++) {
        const int place = table[r * most + lengths[r] - 1];
        tokens.places.push_back({slabs[place / slab_size], slab_size, place % slab_size});
    }
    const float* x = run_tokens(m, blocks, tokens, [&](int64_t layer, const float* q, float* out) {
        shared_attention(groups, layer, m.H, m.G, m.D, q, out);
    });
    for (int64_t r = 0; r < R; r++) finish(m, x + r * m.C, hidden + r * m.C);
}
}  // namespace jlora::decode
