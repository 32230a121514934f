// Causal attention, forward and backward, a few score rows at a time: no T x S matrix is kept.
#pragma once
#include <algorithm>
#include <vector>
#include "activation.h"
#include "small_product.h"
#include "vector_math.h"

namespace jlora {
// What becomes of scores: times `scale`, capped (0: not), and only of the last `window` keys (0: of all).
struct Scores {
    float scale, cap;
    int64_t window;
    // Of n scores: such that the scale makes capped ones of them.
    void bend(float* row, int64_t n) const {
        if (cap) for (int64_t j = 0; j < n; j++) row[j] = soft_cap(row[j] * scale, cap) / scale;
    }
    // The first key that the query at a place sees.
    int64_t first(int64_t place) const { return window ? std::max<int64_t>(0, place + 1 - window) : 0; }
};
// One key head of one sequence, and the query heads that read it. Query t sees the keys up to t + ahead,
// from 0 or its window's first on; head h's numbers of a row of q stand at h * D.
struct Group {
    int64_t T, S, ahead, heads, D;
    Scores scores;
    const float *q, *k, *v;
    int64_t q_row, kv_row;   // from one row to the next
    float* lse;              // of head h and query t at h * lse_head + t
    int64_t lse_head;
    int64_t used(int64_t t) const { return std::max<int64_t>(0, std::min(S, t + ahead + 1)); }
    int64_t first(int64_t t) const { return std::min(used(t), scores.first(t + ahead)); }
    // Of the queries from t on: where the columns begin that are computed for them.
    int64_t from(int64_t t) const { return first(t) / block_columns * block_columns; }
};
constexpr int64_t query_rows = 32;  // score rows held at a time

// out (D, width) = n rows of x, transposed; columns from n on are zero.
inline void transpose_rows(const float* x, int64_t stride, int64_t n, int64_t D, int64_t width, float* out) {
    for (int64_t d = 0; d < D; d++) {
        for (int64_t j = 0; j < n; j++) out[d * width + j] = x[j * stride + d];
        std::fill(out + d * width + n, out + (d + 1) * width, 0.0f);
    }
}
// A row of scores -> probabilities; before `first` and from `used` on it becomes zero. Returns
// log sum exp(scale * row).
inline float softmax_row(float* row, int64_t first, int64_t used, int64_t width, const Scores& s) {
    s.bend(row + first, used - first);
    float peak = row[first];
    for (int64_t j = first + 1; j < used; j++) peak = row[j] > peak ? row[j] : peak;
    float sum = 0;
    for (int64_t j = first; j < used; j++) {
        row[j] = fast_exp((row[j] - peak) * s.scale);
        sum += row[j];
    }
    const float inverse = 1.0f / sum;
    for (int64_t j = first; j < used; j++) row[j] *= inverse;
    std::fill(row, row + first, 0.0f);
    std::fill(row + used, row + width, 0.0f);
    return peak * s.scale + std::log(sum);
}

// Memory of one thread.
struct AttentionRoom { std::vector<float> p, dp, kt, vt; };

// out: as q. Also gives lse.
inline void attend(const Group& s, AttentionRoom& room, float* out, int64_t out_row) {
    const int64_t width = padded(s.S);
    room.p.resize(query_rows * width);
    float* p = room.p.data();
    // Transposing the keys pays when several queries read them.
    const bool many = s.T * s.heads >= 8;
    if (many) {
        room.kt.resize(s.D * width);
        transpose_rows(s.k, s.kv_row, s.S, s.D, width, room.kt.data());
    }
    for (int64_t h = 0; h < s.heads; h++)
        for (int64_t t0 = 0; t0 < s.T; t0 += query_rows) {
            const int64_t count = std::min(query_rows, s.T - t0);
            // Columns count from `from` on.
            const int64_t from = s.from(t0), used = s.used(t0 + count - 1) - from;
            const int64_t wide = std::min(width - from, padded(used));
            const float *query = s.q + t0 * s.q_row + h * s.D, *k = s.k + from * s.kv_row, *v = s.v + from * s.kv_row;
            if (many) small_product(count, wide, s.D, query, s.q_row, 1, room.kt.data() + from, width, p, width, false);
            else for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < used; j++) p[i * width + j] = dot(query + i * s.q_row, k + j * s.kv_row, s.D);
            for (int64_t i = 0; i < count; i++) {
                const int64_t own = s.used(t0 + i), first = s.first(t0 + i);
                float log_sum = 0;
                if (own) log_sum = softmax_row(p + i * width, first - from, own - from, wide, s.scores);
                else std::fill_n(p + i * width, wide, 0.0f);
                s.lse[h * s.lse_head + t0 + i] = log_sum;
            }
            small_product(count, s.D, used, p, width, 1, v, s.kv_row, out + t0 * out_row + h * s.D, out_row, false);
        }
}

// out, dout, dq: as q; dk, dv: as k, and zero beforehand.
inline void attend_back(const Group& s, AttentionRoom& room, const float* out, int64_t out_row, const float* dout,
        int64_t dout_row, float* dq, float* dk, float* dv) {
    const int64_t width = padded(s.S);
    room.p.resize(query_rows * width), room.dp.resize(query_rows * width);
    room.kt.resize(s.D * width), room.vt.resize(s.D * width);
    float *p = room.p.data(), *dp = room.dp.data();
    transpose_rows(s.k, s.kv_row, s.S, s.D, width, room.kt.data());
    transpose_rows(s.v, s.kv_row, s.S, s.D, width, room.vt.data());
    for (int64_t h = 0; h < s.heads; h++)
        for (int64_t t0 = 0; t0 < s.T; t0 += query_rows) {
            const int64_t count = std::min(query_rows, s.T - t0);
            const int64_t from = s.from(t0), used = s.used(t0 + count - 1) - from;
            const int64_t wide = std::min(width - from, padded(used)), at = from * s.kv_row;
            const float *query = s.q + t0 * s.q_row + h * s.D, *d = dout + t0 * dout_row + h * s.D;
            small_product(count, wide, s.D, query, s.q_row, 1, room.kt.data() + from, width, p, width, false);
            small_product(count, wide, s.D, d, dout_row, 1, room.vt.data() + from, width, dp, width, false);
            for (int64_t i = 0; i < count; i++) {
                const int64_t own = s.used(t0 + i) - from, first = s.first(t0 + i) - from;
                float *pi = p + i * width, *di = dp + i * width;
                const float total = dot(d + i * dout_row, out + (t0 + i) * out_row + h * s.D, s.D);
                const float log_sum = s.lse[h * s.lse_head + t0 + i];
                const float scale = s.scores.scale, cap = s.scores.cap;
                for (int64_t j = first; !cap && j < own; j++) {
                    pi[j] = fast_exp(pi[j] * scale - log_sum);
                    di[j] = pi[j] * (di[j] - total) * scale;
                }
                for (int64_t j = first; cap && j < own; j++) {
                    const float score = soft_cap(pi[j] * scale, cap);
                    pi[j] = fast_exp(score - log_sum);
                    di[j] = pi[j] * (di[j] - total) * scale * soft_cap_slope(score, cap);
                }
                for (float* row : {pi, di}) {
                    std::fill(row, row + first, 0.0f);
                    std::fill(row + own, row + wide, 0.0f);
                }
            }
            small_product(count, s.D, used, dp, width, 1, s.k + at, s.kv_row, dq + t0 * s.q_row + h * s.D, s.q_row, false);
            small_product(used, s.D, count, dp, 1, width, query, s.q_row, dk + at, s.kv_row, true);
            small_product(used, s.D, count, p, 1, width, d, dout_row, dv + at, s.kv_row, true);
        }
}

// Batches. q, out (rows of q, H, D); k, v (rows of k, G, D); lse (H, rows of q). A sequence is a line
// of five numbers: first row of q and how many, first row of k and how many, and `ahead`.
struct Batch {
    int64_t rows, H, G, D, count;
    Scores scores;
    const int* sequences;
    Group group(int64_t i, int64_t g, const float* q, const float* k, const float* v, float* lse) const {
        const int* s = sequences + 5 * i;
        const int64_t per = H / G, from = s[0] * H * D + g * per * D, key = s[2] * G * D + g * D;
        return {s[1], s[3], s[4], per, D, scores, q + from, k + key, v + key, H * D, G * D, lse + g * per * rows + s[0], rows};
    }
};
inline void attention_forward(const Batch& b, const float* q, const float* k, const float* v, float* out, float* lse) {
    #pragma omp parallel
    {
        AttentionRoom room;
        #pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < b.count; i++)
            for (int64_t g = 0; g < b.G; g++) {
                const Group group = b.group(i, g, q, k, v, lse);
                attend(group, room, out + (group.q - q), b.H * b.D);
            }
    }
}
inline void attention_backward(const Batch& b, const float* q, const float* k, const float* v, const float* out,
        const float* lse, const float* dout, int64_t key_rows, float* dq, float* dk, float* dv) {
    std::fill_n(dk, key_rows * b.G * b.D, 0.0f);  // keys of no sequence, padding, have none
    std::fill_n(dv, key_rows * b.G * b.D, 0.0f);
    #pragma omp parallel
    {
        AttentionRoom room;
        #pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < b.count; i++)
            for (int64_t g = 0; g < b.G; g++) {
                const Group s = b.group(i, g, q, k, v, const_cast<float*>(lse));
                const int64_t at = s.q - q, key = s.k - k, row = b.H * b.D;
                attend_back(s, room, out + at, row, dout + at, row, dq + at, dk + key, dv + key);
            }
    }
}
}  // namespace jlora
