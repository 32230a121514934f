// A block's attention by tiles, forward and backward; see stream.h for what it computes.
//
// A thread takes a key head of a sequence, in blocks of 32 queries by 32 keys up to the diagonal. Rows
// beyond a sequence's end are zeros. Scores, probabilities and sums are float32; what a product reads is
// bf16. The backward pass works on the scores with a key's in a row: a query then is a lane, products
// take the probabilities as they are, and only the gradient of the scores has to be turned for dq.
#pragma once
#include <algorithm>
#include "activation.h"
#include "stream.h"
#include "tile_forms.h"

namespace jlora {
constexpr int64_t chunk = 4;  // blocks of queries, and of keys, that the backward pass takes at a time
constexpr float log2_e = 1.44269504f;

// A thread's memory.
struct TileRoom {
    Buffer<uint16_t> rows, k, v, paired, p, q, q_paired, d, d_paired, turned_p, turned_ds, ds, pairs;
    Buffer<float> s, dp, out, dq, dk, dv, lse, total;
};

// One sequence of a stream.
struct Sequence {
    const Stream& s;
    const int64_t first, T, blocks, steps;
    Sequence(const Stream& s, int64_t i) : s(s), first(s.starts[i]), T(s.starts[i + 1] - first),
        blocks((T + 31) / 32), steps(s.D / 32) {}
    int64_t count(int64_t b) const { return std::min<int64_t>(32, T - b * 32); }

    // The first block of keys that some query of block b sees.
    int64_t first_block(int64_t b) const { return s.scores.first(b * 32) / 32; }

    // Block b of the head at a column of qkv, with rotary embedding if it turns.
    void load(int64_t b, int64_t column, bool turns, const Tiles& to) const {
        const int64_t half = s.turn.size / 2, n = count(b);
        for (int64_t r = 0; r < 32; r++) {
            uint16_t* out = to.at(r / 16, 0) + r % 16 * 32;
            const int64_t m = first + b * 32 + r;
            if (r >= n)
                for (int64_t d = 0; d < s.D; d += 32) store32(out + d * 16, F16{}, F16{});
            else if (!turns || !s.cos)
                for (int64_t d = 0; d < s.D; d += 32) std::memcpy(out + d * 16, s.qkv.at(m, column + d), 64);
            else
                each_turn(m, [&](int64_t d, int64_t e, F16 cos, F16 sin) {
                    const uint16_t* x = s.qkv.at(m, column);
                    F16 left = load16(x + in_tiles(d)), right = load16(x + in_tiles(e));
                    rotate(cos, sin, left, right);
                    store16(out + in_tiles(d), left), store16(out + in_tiles(e), right);
                });
            for (int64_t d = 2 * half; turns && s.cos && r < n && d < s.D; d += 32)
                std::memcpy(out + d * 16, s.qkv.at(m, column + d), 64);
        }
    }
    // Results times their row's factor, the embedding undone if they turn; changes the results.
    void store(float* c, int64_t b, const float* factors, bool turns, const Rows& to, int64_t column) const {
        for (int64_t r = 0; r < count(b); r++) {
            const int64_t m = first + b * 32 + r;
            if (turns && s.cos)
                each_turn(m, [&](int64_t d, int64_t e, F16 cos, F16 sin) {
                    F16 left = load16(result(c, r, d)), right = load16(result(c, r, e));
                    rotate(cos, -sin, left, right);
                    store16(result(c, r, d), left), store16(result(c, r, e), right);
                });
            for (int64_t d = 0; d < s.D; d += 32)
                store32(to.at(m, column + d), load16(result(c, r, d)) * factors[r],
                    load16(result(c, r, d + 16)) * factors[r]);
        }
    }
    // Block b of the gradient of a head's results, and of each row its product with the results.
    void load_gradient(int64_t b, const Rows& dattended, int64_t column, const Tiles& to, float* total) const {
        for (int64_t r = 0; r < 32; r++) {
            uint16_t* out = to.at(r / 16, 0) + r % 16 * 32;
            const int64_t m = first + b * 32 + r;
            F16 sum{};
            for (int64_t d = 0; d < s.D; d += 32) {
                if (r >= count(b)) {
                    store32(out + d * 16, F16{}, F16{});
                    continue;
                }
                const uint16_t *x = dattended.at(m, column + d), *y = s.attended.at(m, column + d);
                std::memcpy(out + d * 16, x, 64);
                sum += load16(x) * load16(y) + load16(x + 16) * load16(y + 16);
            }
            total[r] = sum16(sum);
        }
    }

private:
    // work(d, e, cos, sin): 16 numbers from d on and 16 from e on are turned together.
    template <typename Work>
    void each_turn(int64_t m, Work work) const {
        const int64_t half = s.turn.size / 2;
        const float *cos = s.cos + m * half, *sin = s.sin + m * half;
        for (int64_t j = 0; j < half; j += 16) {
            const int64_t d = s.turn.neighbours ? 2 * j : j, e = s.turn.neighbours ? d + 16 : j + half;
            work(d, e, load16(cos + j), load16(sin + j));
        }
    }
    void rotate(F16 cos, F16 sin, F16& left, F16& right) const {
        if (!s.turn.neighbours) return rotate_pair(left, right, cos, sin);
        left = rotate_neighbours(left, cos, sin, 0), right = rotate_neighbours(right, cos, sin, 8);
    }
    static int64_t in_tiles(int64_t d) { return d / 32 * tile + d % 32; }  // from a row's start
};

// Row r of query block b: scores -> probabilities times their sum. Returns the sum and the peak.
struct Softmax { float sum, peak; };
inline Softmax softmax_row(float* scores, int64_t b, int64_t r, const Scores& s, int64_t first, const Tiles& p) {
    constexpr float hidden = -1e30f;
    for (int64_t j = first * 32; s.cap && j < b * 32 + 32; j += 16) {
        float* own = result(scores, r, j);
        store16(own, soft_cap16(load16(own) * s.scale, s.cap) / s.scale);
    }
    const int64_t seen = s.first(b * 32 + r);
    for (int64_t j = first * 32; j < seen; j += 16) {
        float* own = result(scores, r, j);
        store16(own, blend(lane_numbers >= (int)(seen - j), load16(own), hidden));
    }
    float* last = result(scores, r, b * 32);
    const F16 left = blend(lane_numbers <= (int)r, load16(last), hidden);
    const F16 right = blend(lane_numbers <= (int)r - 16, load16(last + 256), hidden);
    store16(last, left), store16(last + 256, right);
    F16 top = larger(left, right);
    for (int64_t j = first; j < b; j++) {
        const F16 x = load16(result(scores, r, j * 32)), y = load16(result(scores, r, j * 32 + 16));
        top = larger(larger(x, y), top);
    }
    const float peak = largest16(top), factor = s.scale * log2_e;
    F16 sum{};
    for (int64_t j = first; j <= b; j++) {
        const F16 x = exp2_16((load16(result(scores, r, j * 32)) - peak) * factor);
        const F16 y = exp2_16((load16(result(scores, r, j * 32 + 16)) - peak) * factor);
        sum += x + y;
        store32(p.at(r / 16, j) + r % 16 * 32, x, y);
    }
    return {sum16(sum), peak};
}
inline void attend_tiles(const Sequence& q, int64_t g, TileRoom& room) {
    const Stream& s = q.s;
    const Tiles rows(room.rows, 2, q.steps), k(room.k, 2 * q.blocks, q.steps), v(room.v, 2 * q.steps, q.blocks);
    const Tiles p(room.p, 2, q.blocks);
    float *scores = room.s.of(q.blocks * tiles::block_floats), *out = room.out.of(q.steps * tiles::block_floats);
    for (int64_t b = 0; b < q.blocks; b++) {
        q.load(b, s.key_column(g), true, rows);
        turn_block(rows, k, b);
        q.load(b, s.value_column(g), false, rows);
        pair_block(rows, v, b);
    }
    for (int64_t h = g * s.per(); h < (g + 1) * s.per(); h++)
        for (int64_t b = 0; b < q.blocks; b++) {
            q.load(b, s.query_column(h), true, rows);
            const int64_t begin = q.first_block(b);
            for (int64_t j = begin; j <= b; j++)
                multiply(rows, 0, 0, k, j, 0, q.steps, true, scores + j * tiles::block_floats);
            float inverse[32];
            for (int64_t r = 0; r < q.count(b); r++) {
                const Softmax row = softmax_row(scores, b, r, s.scores, begin, p);
                inverse[r] = 1.0f / row.sum;
                s.lse[h * s.rows + q.first + b * 32 + r] = row.peak * s.scores.scale + std::log(row.sum);
            }
            for (int64_t d = 0; d < q.steps; d++)
                multiply(p, 0, begin, v, d, begin, b + 1 - begin, true, out + d * tiles::block_floats);
            q.store(out, b, inverse, false, s.attended, h * s.D);
        }
}

// Scores and the gradients of probabilities, [key][query], of one block -> probabilities and, but for
// the scale, the gradients of scores. lse: in base 2. reach: how many of the block's queries have the
// block's first key in their window; each further key one more.
inline void probabilities_back(const float* s, const float* dp, const float* lse, const float* total,
        const Scores& scores, int64_t queries, int64_t keys, bool diagonal, int64_t reach, uint16_t* p, uint16_t* ds,
        int64_t lower) {
    const float factor = scores.scale * log2_e;
    for (int64_t r = 0; r < 32; r++) {
        const int64_t from = r / 16 * 512 + r % 16 * 16;
        F16 own[2] = {}, slope[2] = {};
        for (int64_t i = 0; i < 2; i++) {
            if (r >= keys || i * 16 >= queries || (diagonal && r >= i * 16 + 16)) continue;
            F16 score = load16(s + from + i * 256), bent{};
            if (scores.cap) bent = soft_cap16(score * scores.scale, scores.cap), score = bent / scores.scale;
            F16 x = exp2_16(score * factor - load16(lse + i * 16));
            if (diagonal) x = blend(lane_numbers >= (int)(r - i * 16), x, 0.0f);
            if (scores.window) x = blend(lane_numbers < (int)(reach + r - i * 16), x, 0.0f);
            own[i] = x, slope[i] = x * (load16(dp + from + i * 256) - load16(total + i * 16));
            if (scores.cap) slope[i] *= soft_cap_slope(bent, scores.cap);
        }
        const int64_t to = r / 16 * lower + r % 16 * 32;
        store32(p + to, own[0], own[1]);
        store32(ds + to, slope[0], slope[1]);
    }
}
inline void attend_tiles_back(const Sequence& q, int64_t g, TileRoom& room, const Rows& dattended, const Rows& dqkv) {
    const Stream& s = q.s;
    const int64_t size = tiles::block_floats, blocks = q.blocks, wide = std::min(chunk, blocks);
    const Tiles rows(room.rows, 2, q.steps), k(room.k, 2 * blocks, q.steps), v(room.v, 2 * blocks, q.steps);
    const Tiles k_paired(room.paired, 2 * q.steps, blocks), pairs(room.pairs, 2, 1);
    // Of a chunk of queries; what is turned is [key][query].
    const Tiles qs(room.q, 2 * wide, q.steps), q_paired(room.q_paired, 2 * q.steps, wide);
    const Tiles d(room.d, 2 * wide, q.steps), d_paired(room.d_paired, 2 * q.steps, wide);
    const Tiles turned_p(room.turned_p, 2 * wide, wide), turned_ds(room.turned_ds, 2 * wide, wide);
    const Tiles ds(room.ds, 2 * wide, wide);
    float *lse = room.lse.of(wide * 32), *total = room.total.of(wide * 32);
    float *scores = room.s.of(size), *dp = room.dp.of(size), *dq = room.dq.of(wide * q.steps * size);
    float *dk = room.dk.of(blocks * q.steps * size), *dv = room.dv.of(blocks * q.steps * size);
    float scales[32], ones[32];
    std::fill_n(scales, 32, s.scores.scale), std::fill_n(ones, 32, 1.0f);

    for (int64_t b = 0; b < blocks; b++) {
        q.load(b, s.key_column(g), true, rows);
        std::copy_n(rows.data, 2 * q.steps * tile, k.at(2 * b, 0));
        pair_block(rows, k_paired, b);
        q.load(b, s.value_column(g), false, rows);
        std::copy_n(rows.data, 2 * q.steps * tile, v.at(2 * b, 0));
    }
    for (int64_t h = g * s.per(); h < (g + 1) * s.per(); h++)
        for (int64_t q0 = 0; q0 < blocks; q0 += wide) {
            const int64_t queries = std::min(wide, blocks - q0);
            for (int64_t i = 0; i < queries; i++) {
                const int64_t b = q0 + i, n = q.count(b);
                q.load(b, s.query_column(h), true, rows);
                turn_block(rows, qs, i), pair_block(rows, q_paired, i);
                q.load_gradient(b, dattended, h * s.D, rows, total + i * 32);
                turn_block(rows, d, i), pair_block(rows, d_paired, i);
                for (int64_t r = 0; r < 32; r++)
                    lse[i * 32 + r] = r < n ? s.lse[h * s.rows + q.first + b * 32 + r] * log2_e : 0.0f;
            }
            const int64_t begin_keys = q.first_block(q0) / wide * wide;
            for (int64_t k0 = begin_keys; k0 <= q0; k0 += wide) {
                const int64_t keys = std::min(wide, blocks - k0);
                const bool last = k0 == q0;
                for (int64_t i = 0; i < queries; i++)
                    for (int64_t j = 0; j < (last ? i + 1 : keys); j++) {
                        if (k0 + j < q.first_block(q0 + i)) {  // no query of the block sees it
                            for (const auto& all : {turned_p, turned_ds})
                                for (int64_t half = 0; half < 2; half++) std::fill_n(all.at(2 * j + half, i), tile, 0);
                            for (int64_t half = 0; half < 2; half++) std::fill_n(ds.at(2 * i + half, j), tile, 0);
                            continue;
                        }
                        multiply(k, k0 + j, 0, qs, i, 0, q.steps, true, scores);
                        multiply(v, k0 + j, 0, d, i, 0, q.steps, true, dp);
                        probabilities_back(scores, dp, lse + i * 32, total + i * 32, s.scores,
                            q.count(q0 + i), q.count(k0 + j), last && i == j,
                            (k0 + j - q0 - i) * 32 + s.scores.window, turned_p.at(2 * j, i),
                            turned_ds.at(2 * j, i), wide * tile);
                        pair_tiles(turned_ds.at(2 * j, i), turned_ds.at(2 * j + 1, i), pairs.at(0, 0), pairs.at(1, 0));
                        turn_tile(pairs.at(0, 0), ds.at(2 * i, j));
                        turn_tile(pairs.at(1, 0), ds.at(2 * i + 1, j));
                    }
                for (int64_t c = 0; c < q.steps; c++) {
                    for (int64_t j = 0; j < keys; j++) {
                        const int64_t from = last ? j : 0, at = ((k0 + j) * q.steps + c) * size;
                        const bool begin = last && h == g * s.per();
                        multiply(turned_p, j, from, d_paired, c, from, queries - from, begin, dv + at);
                        multiply(turned_ds, j, from, q_paired, c, from, queries - from, begin, dk + at);
                    }
                    for (int64_t i = 0; i < queries; i++)
                        multiply(ds, i, 0, k_paired, c, k0, last ? i + 1 : keys, k0 == begin_keys,
                            dq + (i * q.steps + c) * size);
                }
            }
            for (int64_t i = 0; i < queries; i++)
                q.store(dq + i * q.steps * size, q0 + i, scales, true, dqkv, s.query_column(h));
        }
    for (int64_t b = 0; b < blocks; b++) {
        q.store(dk + b * q.steps * size, b, scales, true, dqkv, s.key_column(g));
        q.store(dv + b * q.steps * size, b, ones, false, dqkv, s.value_column(g));
    }
}

template <typename Work>
void each_key_head(const Stream& s, Work work) {
    #pragma omp parallel
    {
        const tiles::TileScope scope;
        thread_local TileRoom room;
        #pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < s.sequences; i++)
            for (int64_t g = 0; g < s.key_heads; g++) work(Sequence(s, i), g, room);
    }
}
inline void stream_attention(const Stream& s) {
    JLORA_PART("attention forward");
    each_key_head(s, [](const Sequence& q, int64_t g, TileRoom& room) { attend_tiles(q, g, room); });
}
// dattended: of the heads' results; dqkv: as a row of qkv
inline void stream_attention_back(const Stream& s, const Rows& dattended, const Rows& dqkv) {
    JLORA_PART("attention backward");
    each_key_head(s, [&](const Sequence& q, int64_t g, TileRoom& room) {
        attend_tiles_back(q, g, room, dattended, dqkv);
    });
}
}  // namespace jlora
