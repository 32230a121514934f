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
    Norm before_attention, after_attention, before_mlp, after_mlp, queries, keys;  // weight null: there is none
    Linear qkv[3], out, in[2], down;  // one Linear for query, key and value together, or three; likewise in
    int64_t rope, window;             // which frequencies turn queries and keys, from 1 on; 0: none; see Scores
    int64_t qkv_count() const { return qkv[1].kind ? 3 : 1; }
    int64_t in_count() const { return in[1].kind ? 2 : 1; }
};
struct Model {
    int64_t layers, C, H, G, D, inner;
    double eps;
    const float* tokens;           // (V, C), or null where they are kept packed alone
    const Weight* packed_tokens;
    const float *positions, *frequencies;  // learned, (any, C), and rotary, (ropes, rotary / 2); null: none
    Norm last;
    int64_t activation;            // see activation.h
    int64_t gated;                 // whether that of the first of two layers multiplies the second
    int64_t ropes, rotary, neighbours;  // kinds of rotary positions; see Turn
    int64_t long_from;             // longer prompts take the last of the frequencies; 0: none
    int64_t grouped;               // see Stream
    int64_t whole;                 // whether norms of queries and keys are of all heads together
    double amplitude;              // what turned numbers are multiplied by
    double embedding_scale, scale, cap;
    int64_t narrow;                // whether keys and values are kept in bf16
    Scores scores(const Block& b) const { return {(float)scale, (float)cap, b.window}; }
    // Columns of a query head, of a key head and of its values.
    int64_t query_column(int64_t h) const { return (h + (grouped ? h / (H / G) * 2 : 0)) * D; }
    int64_t key_column(int64_t g) const { return (grouped ? g * (H / G + 2) + H / G : H + g) * D; }
    int64_t value_column(int64_t g) const { return key_column(g) + (grouped ? 1 : G) * D; }
};
#if defined(JLORA_TILES)
constexpr int64_t row_block = 1;
#else
constexpr int64_t row_block = 16;  // rows are made up to whole blocks: fewer kinds of products of oneDNN
#endif

inline void normalise(const Norm& norm, float eps, const float* x, int64_t C, const Input& to) {
    #pragma omp parallel for schedule(static) if (to.rounded.rows > 1)
    for (int64_t m = 0; m < to.rounded.rows; m++) to.put_row(m, NormRow(norm, eps, x + m * C, C));
}

// Rows of tokens with their positions, and where each keeps its key and value.
struct Tokens {
    int64_t count;
    const int *ids, *positions;
    std::vector<Place> places;
    std::vector<bool> is_long;  // see `long_from`
    std::vector<int> slots;     // whose adapter each takes; -1: none
};

// x (whole blocks of rows, C); rows that only fill a block are zero.
inline void embed(const Model& m, const Tokens& tokens, int64_t whole, float* x) {
    #pragma omp parallel for schedule(static) if (tokens.count > 1)
    for (int64_t i = 0; i < tokens.count; i++) {
        if (m.tokens) std::copy_n(m.tokens + tokens.ids[i] * m.C, m.C, x + i * m.C);
#if defined(JLORA_TILES)  // oneDNN's packed weights have no rows to read, and the floats are kept
        else unpack_row(*m.packed_tokens, tokens.ids[i], x + i * m.C);
#endif
        if (m.embedding_scale != 1)
            for (int64_t k = 0; k < m.C; k++) x[i * m.C + k] *= (float)m.embedding_scale;
        if (m.positions) add_scaled(x + i * m.C, 1.0f, m.positions + tokens.positions[i] * m.C, m.C);
    }
    std::fill(x + tokens.count * m.C, x + whole * m.C, 0.0f);
}

// Cosines and sines of each token's angles, (ropes, rows, 2, rotary / 2).
inline void angles(const Model& m, const Tokens& tokens, int64_t rows, float* turns) {
    const int64_t half = m.rotary / 2;
    #pragma omp parallel for collapse(2) schedule(static) if (tokens.count > 1)
    for (int64_t rope = 0; rope < m.ropes; rope++)
        for (int64_t i = 0; i < tokens.count; i++) {
            const float* frequencies = m.frequencies + (tokens.is_long[i] ? m.ropes - 1 : rope) * half;
            float* own = turns + (rope * rows + i) * m.rotary;
            for (int64_t j = 0; j < half; j++) {
                const float angle = tokens.positions[i] * frequencies[j];
                own[j] = std::cos(angle) * (float)m.amplitude;
                own[half + j] = std::sin(angle) * (float)m.amplitude;
            }
        }
}

// Heads of queries or keys, normed in place: one by one, or all together.
inline void norm_heads(const Model& m, const Norm& norm, float* x, int64_t heads) {
    if (!norm.weight) return;
    const int64_t size = m.D * (m.whole ? heads : 1);
    for (float* own = x; own < x + heads * m.D; own += size) {
        const NormRow row(norm, m.eps, own, size);
        for (int64_t k = 0; k < size; k += 32) {
            const int64_t n = std::min<int64_t>(32, size - k);
            F16 left, right;
            row(k, n, left, right);
            store_some(own + k, left, right, n);
        }
    }
}

// Of rows (H + 2 G, D): queries to q (rows, H, D), keys and values to their places, the first two normed and
// turned. turns: of the block's rope.
inline void place_heads(const Model& m, const Block& b, const Tokens& tokens, int64_t layer, const float* qkv,
        const float* turns, float* q) {
    const int64_t width = m.G * m.D, wide = m.H * m.D, bytes = width * (m.narrow ? sizeof(uint16_t) : sizeof(float));
    const Turn turn{m.rotary, m.neighbours};
    const auto place = [&](int64_t i, float* keys, float* values) {
        const float *row = qkv + i * (wide + 2 * width), *cos = turns + i * m.rotary, *sin = cos + m.rotary / 2;
        float* queries = q + i * wide;
        for (int64_t h = 0; h < m.H; h++) std::copy_n(row + m.query_column(h), m.D, queries + h * m.D);
        for (int64_t g = 0; g < m.G; g++) {
            std::copy_n(row + m.key_column(g), m.D, keys + g * m.D);
            std::copy_n(row + m.value_column(g), m.D, values + g * m.D);
        }
        norm_heads(m, b.queries, queries, m.H), norm_heads(m, b.keys, keys, m.G);
        if (!m.frequencies || !b.rope) return;
        for (int64_t h = 0; h < m.H; h++) turn(queries + h * m.D, cos, sin, 1);
        for (int64_t g = 0; g < m.G; g++) turn(keys + g * m.D, cos, sin, 1);
    };
    #pragma omp parallel if (tokens.count > 1)
    {
        std::vector<float> room(m.narrow ? 2 * width : 0);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < tokens.count; i++) {
            char *keys = tokens.places[i].at(layer, 0, bytes), *values = tokens.places[i].at(layer, 1, bytes);
            if (!m.narrow) {
                place(i, (float*)keys, (float*)values);
                continue;
            }
            place(i, room.data(), room.data() + width);
            to_bf16(room.data(), (uint16_t*)keys, width), to_bf16(room.data() + width, (uint16_t*)values, width);
        }
    }
}

// x (rows, C) is what the last norm reads; it stays valid until the next call.
inline const float* run_tokens(const Model& m, const Block* blocks, const Tokens& tokens, const std::vector<Group>& groups) {
    const int64_t R = up_to(tokens.count, row_block), C = m.C, wide = m.H * m.D, heads = wide + 2 * m.G * m.D;
    static Buffer<float> for_x, for_qkv, for_q, for_attended, for_inner, for_turns, for_branch;
    static InputMemory for_normed, for_out, for_active;
    float *x = for_x.of(R * C), *qkv = for_qkv.of(R * heads), *q = for_q.of(R * wide), *attended = for_attended.of(R * wide);
    float *inner = for_inner.of(R * 2 * m.inner), *turns = for_turns.of(m.ropes * R * m.rotary);
    float* branch = for_branch.of(R * C);
    const Slots slots(tokens.slots.data(), tokens.count, R);
    const auto add_to_x = [&](int64_t m, int64_t n, F16 left, F16 right, int64_t count) {
        F16 l, r;
        load_some(x + m * C + n, l, r, count);
        store_some(x + m * C + n, l + left, r + right, count);
    };
    // x += the layer's results, or the norm of them
    const auto add_layer = [&](const Linear& layer, const Input& from, const Norm& norm) {
        if (!norm.weight) return apply(&layer, 1, from, slots, add_to_x);
        apply(&layer, 1, from, slots, [&](int64_t m, int64_t n, F16 left, F16 right, int64_t count) {
            store_some(branch + m * C + n, left, right, count);
        });
        #pragma omp parallel for schedule(static) if (R > 1)
        for (int64_t i = 0; i < R; i++) {
            const NormRow row(norm, m.eps, branch + i * C, C);
            for (int64_t k = 0; k < C; k += 32) {
                const int64_t n = std::min<int64_t>(32, C - k);
                F16 left, right;
                row(k, n, left, right);
                add_to_x(i, k, left, right, n);
            }
        }
    };
    embed(m, tokens, R, x);
    if (m.frequencies) angles(m, tokens, R, turns);
    for (int64_t layer = 0; layer < m.layers; layer++) {
        const Block& b = blocks[layer];
        const Input normed = for_normed.of(R, C, b.qkv, b.qkv_count());
        normalise(b.before_attention, m.eps, x, C, normed);
        apply(b.qkv, b.qkv_count(), normed, slots, [&](int64_t m, int64_t n, F16 left, F16 right, int64_t count) {
            store_some(qkv + m * heads + n, left, right, count);
        });
        place_heads(m, b, tokens, layer, qkv, turns + std::max<int64_t>(0, b.rope - 1) * R * m.rotary, q);
        shared_attention(groups, layer, m.H, m.G, m.D, m.scores(b), m.narrow != 0, q, attended);
        const Input out = for_out.of(R, wide, &b.out, 1);
        #pragma omp parallel for schedule(static) if (R > 1)
        for (int64_t i = 0; i < R; i++)
            out.put_row(i, [&](int64_t k, int64_t n, F16& left, F16& right) {
                load_some(attended + i * wide + k, left, right, n);
            });
        add_layer(b.out, out, b.after_attention);

        const int64_t parts = m.gated ? 2 : 1;
        const Input again = for_normed.of(R, C, b.in, b.in_count()), active = for_active.of(R, m.inner, &b.down, 1);
        normalise(b.before_mlp, m.eps, x, C, again);
        if (!m.gated || !gate_in_registers(m.activation, b.in, b.in_count(), again, slots, active)) {
            apply(b.in, b.in_count(), again, slots, [&](int64_t row, int64_t n, F16 left, F16 right, int64_t count) {
                store_some(inner + row * parts * m.inner + n, left, right, count);
            });
            #pragma omp parallel for schedule(static) if (R > 1)
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
        add_layer(b.down, active, b.after_mlp);
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

// Pieces of prompts, one after the other, and then one more token of each of some rows.
struct Pieces {
    int64_t count;
    char* const* blocks;                    // where each prompt has its keys and values
    const int *lengths, *before, *sizes;    // tokens that are run, that were run earlier, and of the whole block
};
struct Step {
    int64_t rows;
    char* const* prompts;                   // blocks of the rows' prompts, which hold nothing else
    const int* prompt_tokens;
    const int* table;                       // see group_rows; the last of a row's places is the new token's own
    int64_t most;
    const int* lengths;
    char* const* slabs;
    int64_t slab_size, slab_count;
};
// ids, positions, slots: of all tokens. wanted (W,): tokens by their numbers; hidden (W, C): their states.
inline void run_rows(const Model& m, const Block* blocks, int64_t count, const int* ids, const int* positions, const int* slots,
        const Pieces& pieces, const Step& step, const int* wanted, int64_t W, float* hidden) {
    if (!count) return;
    Tokens tokens{0, ids, positions, {}, {}, {slots, slots + count}};
    std::vector<Group> groups;
    const int64_t per = m.H / m.G;
    for (int64_t p = 0; p < pieces.count; p++) {
        const int64_t before = pieces.before[p], length = pieces.lengths[p], size = pieces.sizes[p];
        group_prompt(groups, tokens.count, {pieces.blocks[p], size, 0}, before, length, per);
        for (int64_t t = 0; t < length; t++) tokens.places.push_back({pieces.blocks[p], size, before + t});
        tokens.is_long.insert(tokens.is_long.end(), length, m.long_from && size > m.long_from);
        tokens.count += length;
    }
    group_rows(groups, tokens.count, step.rows, per, step.prompts, step.prompt_tokens, step.table, step.most, step.lengths,
        step.slabs, step.slab_size, step.slab_count);
    for (int64_t r = 0; r < step.rows; r++) {
        const int place = step.table[r * step.most + step.lengths[r] - 1];
        tokens.places.push_back({step.slabs[place / step.slab_size], step.slab_size, place % step.slab_size});
        tokens.is_long.push_back(m.long_from && step.prompt_tokens[r] > m.long_from);
    }
    tokens.count += step.rows;
    const float* x = run_tokens(m, blocks, tokens, groups);
    #pragma omp parallel for schedule(static) if (W > 1)
    for (int64_t i = 0; i < W; i++) finish(m, x + wanted[i] * m.C, hidden + i * m.C);
}
}  // namespace jlora::decode
