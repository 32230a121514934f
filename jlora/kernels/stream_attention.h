// A block's attention in float32, for processors without tiles (native.h); tile_attention.h has it for the others.
#pragma once
#include <vector>
#include "activation.h"
#include "attention.h"
#include "stream.h"

namespace jlora {
// One sequence's queries, keys and values of a key head, in a thread's memory.
struct StreamHeads {
    std::vector<float> q, k, v, o, d, dq, dk, dv;

    Group load(const Stream& s, int64_t i, int64_t g) {
        const int64_t first = s.starts[i], T = s.starts[i + 1] - first, D = s.D, row = s.per() * D;
        fetch(s.qkv, T, row, q, first, s.query_column(g * s.per()));
        fetch(s.qkv, T, D, k, first, s.key_column(g)), fetch(s.qkv, T, D, v, first, s.value_column(g));
        o.resize(T * row);
        turn(s, q.data(), first, T, s.per(), 1), turn(s, k.data(), first, T, 1, 1);
        return {T, T, 0, s.per(), D, s.scores, q.data(), k.data(), v.data(), row, D,
            s.lse + g * s.per() * s.rows + first, s.rows};
    }
    // Rotates `heads` heads of every row by its position's angle; sign -1 turns back.
    static void turn(const Stream& s, float* x, int64_t first, int64_t T, int64_t heads, float sign) {
        const int64_t half = s.turn.size / 2;
        if (!s.cos) return;
        for (int64_t t = 0; t < T; t++) {
            const float *cos = s.cos + (first + t) * half, *sin = s.sin + (first + t) * half;
            for (int64_t h = 0; h < heads; h++) s.turn(x + (t * heads + h) * s.D, cos, sin, sign);
        }
    }
    // (T, width) -> columns from `column` on of rows from `first` on, and back
    static void store(const std::vector<float>& x, int64_t T, int64_t width, const Rows& to, int64_t first,
            int64_t column) {
        for (int64_t t = 0; t < T; t++)
            for (int64_t k = 0; k < width; k += 32) {
                const float* from = x.data() + t * width + k;
                store32(to.at(first + t, column + k), load16(from), load16(from + 16));
            }
    }
    static void fetch(const Rows& from, int64_t T, int64_t width, std::vector<float>& x, int64_t first,
            int64_t column) {
        x.resize(T * width);
        for (int64_t t = 0; t < T; t++)
            for (int64_t k = 0; k < width; k += 32)
                to_float(from.at(first + t, column + k), x.data() + t * width + k, 32);
    }
};

template <typename Work>
void each_key_head(const Stream& s, Work work) {
    #pragma omp parallel
    {
        AttentionRoom room;
        StreamHeads heads;
        #pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < s.sequences; i++)
            for (int64_t g = 0; g < s.key_heads; g++) work(heads.load(s, i, g), heads, room, s.starts[i], g);
    }
}
inline void stream_attention(const Stream& s) {
    JLORA_PART("attention forward");
    each_key_head(s, [&](const Group& group, StreamHeads& heads, AttentionRoom& room, int64_t first, int64_t g) {
        attend(group, room, heads.o.data(), group.q_row);
        heads.store(heads.o, group.T, group.q_row, s.attended, first, g * group.q_row);
    });
}
// dattended: of the heads' results; dqkv: as a row of qkv
inline void stream_attention_back(const Stream& s, const Rows& dattended, const Rows& dqkv) {
    JLORA_PART("attention backward");
    each_key_head(s, [&](const Group& group, StreamHeads& heads, AttentionRoom& room, int64_t first, int64_t g) {
        const int64_t T = group.T, row = group.q_row, column = g * row;
        heads.dq.resize(T * row), heads.dk.assign(T * s.D, 0.0f), heads.dv.assign(T * s.D, 0.0f);
        heads.fetch(s.attended, T, row, heads.o, first, column);
        heads.fetch(dattended, T, row, heads.d, first, column);
        attend_back(group, room, heads.o.data(), row, heads.d.data(), row, heads.dq.data(), heads.dk.data(),
            heads.dv.data());
        heads.turn(s, heads.dq.data(), first, T, s.per(), -1), heads.turn(s, heads.dk.data(), first, T, 1, -1);
        heads.store(heads.dq, T, row, dqkv, first, s.query_column(g * s.per()));
        heads.store(heads.dk, T, s.D, dqkv, first, s.key_column(g));
        heads.store(heads.dv, T, s.D, dqkv, first, s.value_column(g));
    });
}
}  // namespace jlora
