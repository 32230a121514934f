// Causal attention, forward and backward, a few score rows at a time: no T x S matrix is kept.
#pragma once
#include <algorithm>
#include <vector>
#include "small_product.h"
#include "vector_math.h"

namespace jlora {
// One key head of one sequence, and the query heads that read it. Query t sees the keys from 0 on up
// to t + ahead; head h's numbers of a row of q stand at h * D.
struct Group {
    int64_t T, S, ahead, heads, D;
    float scale;
    const float *q, *k, *v;
    int64_t q_row, kv_row;   // from one row to the next
    float* lse;              // of head h and query t at h * lse_head + t
    int64_t lse_head;
    int64_t used(int64_t t) const { return std::max<int64_t>(0, std::min(S, t + ahead + 1)); }
};
constexpr int64_t query_rows = 32;  // score rows held at a time

// out (D, width) = n rows of x, transposed; columns from n on are zero.
inline void transpose_rows(const float* x, int64_t stride, int64_t n, int64_t D, int64_t width, float* out) {
    for (int64_t d = 0; d < D; d++) {
        for (int64_t j = 0; j < n; j++) out[d * width + j] = x[j * stride + d];
        std::fill(out + d * width + n, out + (d + 1) * width, 0.0f);
    }
}
// A row of scores -> probabilities; beyond `used` it becomes zero. Returns log sum exp(scale * row).
inline float softmax_row(float* row, int64_t used, int64_t width, float scale) {
    float peak = row[0];
    for (int64_t j = 1; j < used; j++) peak = row[j] > peak ? row[j] : peak;
    float sum = 0;
    for (int64_t j = 0; j < used; j++) {
        row[j] = fast_exp((row[j] - peak) * scale);
        sum += row[j];
    }
    const float inverse = 1.0f / sum;
    for (int64_t j = 0; j < used; j++) row[j] *= inverse;
    std::fill(row + used, row + width, 0.0f);
    return peak * scale + std::log(sum);
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
            const int64_t used = s.used(t0 + count - 1), wide = std::min(width, padded(used));
            const float* query = s.q + t0 * s.q_row + h * s.D;
            if (many) small_product(count, wide, s.D, query, s.q_row, 1, room.kt.data(), width, p, width, false);
            else for (int64_t i = 0; i < count; i++)
                for (int64_t j = 0; j < used; j++)
                    p[i * width + j] = dot(query + i * s.q_row, s.k + j * s.kv_row, s.D);
            for (int64_t i = 0; i < count; i++) {
                const int64_t own = s.used(t0 + i);
                float log_sum = 0;
                if (own) log_sum = softmax_row(p + i * width, own, wide, s.scale);
                else std::fill_n(p + i * width, wide, 0.0f);
                s.lse[h * s.lse_head + t0 + i] = log_sum;
            }
            small_product(count, s.D, used, p, width, 1, s.v, s.kv_row, out + t0 * out_row + h * s.D, out_row, false);
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
            const int64_t used = s.used(t0 + count - 1), wide = std::min(width, padded(used));
            const float *query = s.q + t0 * s.q_row + h * s.D, *d = dout + t0 * dout_row + h * s.D;
            small_product(count, wide, s.D, query, s.q_row, 1, room.kt.data(), width, p, width, false);
            small_product(count, wide, s.D, d, dout_row, 1, room.vt.data(), width, dp, width, false);
            for (int64_t i = 0; i < count; i++) {
                const int64_t own = s.used(t0 + i);
                float *pi = p + i * width, *di = dp + i * width;
                const float total = dot(d + i * dout_row, out + (t0 + i) * out_row + h * s.D, s.D);
                const float log_sum = s.lse[h * s.lse_head + t0 + i];
                for (int64_t j = 0; j < own; j++) {
                    pi[j] = fast_exp(pi[j] * s.scale - log_sum);
                    di[j] = pi[j] * (di[j] - total) * s.scale;
                }
                std::fill(pi + own, pi + wide, 0.0f);
                std::fill(di + own, di + wide, 0.0f);
            }
            small_product(count, s.D, used, dp, width, 1, s.k, s.kv_row, dq + t0 * s.q_row + h * s.D, s.q_row, false);
            small_product(used, s.D, count, dp, 1, width, query, s.q_row, dk, s.kv_row, true);
            small_product(used, s.D, count, p, 1, width, d, dout_row, dv, s.kv_row, true);
        }
}

// Batches. q, out (rows of q, H, D); k, v (rows of k, G, D); lse (H, rows of q). A sequence is a line
// of five numbers: first row of q and how many, first row of k and how many, and `ahead`.
struct Batch {
    int64_t rows, H, G, D, count;
    float scale;
    const int* sequences;
    Group group(int64_t i, int64_t g, const float* q, const float* k, const float* v, float* lse) const {
        const int* s = sequences + 5 * i;
        const int64_t per = H / G, from = s[0] * H * D + g * per * D, key = s[2] * G * D + g * D;
        return {s[1], s[3], s[4], per, D, scale, q + from, k + key, v + key, H * D, G * D, lse + g * per * rows + s[0], rows};
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
