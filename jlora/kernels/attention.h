// Causal attention, forward and backward, one score row at a time: no T x S matrix is kept.
// Layouts: q, out (B, T, H, D); k, v (B, S, G, D); lse (B, H, T). Head h reads key head h / (H / G).
#pragma once
#include <algorithm>
#include <vector>
#include "vector_math.h"

namespace jlora {
struct AttentionShape {
    int64_t B, T, S, H, G, D;
    float scale;
    int64_t q(int64_t b, int64_t t, int64_t h) const { return ((b * T + t) * H + h) * D; }
    int64_t k(int64_t b, int64_t s, int64_t g) const { return ((b * S + s) * G + g) * D; }
    int64_t l(int64_t b, int64_t h, int64_t t) const { return (b * H + h) * T + t; }
};

inline float dot(const float* a, const float* b, int64_t n) {
    float sum = 0;
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}
inline void add_scaled(float* y, float a, const float* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) y[i] += a * x[i];
}
// out (D, n) = rows from..from+n of x, transposed; the rows are `stride` apart.
inline void transpose_rows(const float* x, int64_t stride, int64_t n, int64_t D, float* out) {
    for (int64_t j = 0; j < n; j++)
        for (int64_t d = 0; d < D; d++) out[d * n + j] = x[j * stride + d];
}
// row[j] = sum_d a[d] * xt[d][j], j < used
inline void row_times(const float* a, const float* xt, int64_t n, int64_t D, int64_t used, float* row) {
    std::fill(row, row + used, 0.0f);
    int64_t d = 0;
    for (; d + 4 <= D; d += 4) {
        const float *x0 = xt + d * n, *x1 = x0 + n, *x2 = x1 + n, *x3 = x2 + n;
        float a0 = a[d], a1 = a[d + 1], a2 = a[d + 2], a3 = a[d + 3];
        for (int64_t j = 0; j < used; j++) row[j] += a0 * x0[j] + a1 * x1[j] + a2 * x2[j] + a3 * x3[j];
    }
    for (; d < D; d++) add_scaled(row, a[d], xt + d * n, used);
}
// out[d] = sum_j a[j] * x[j][d]
inline void row_sum(const float* a, const float* x, int64_t stride, int64_t n, int64_t D, float* out) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        const float *x0 = x + j * stride, *x1 = x0 + stride, *x2 = x1 + stride, *x3 = x2 + stride;
        float a0 = a[j], a1 = a[j + 1], a2 = a[j + 2], a3 = a[j + 3];
        for (int64_t d = 0; d < D; d++) out[d] += a0 * x0[d] + a1 * x1[d] + a2 * x2[d] + a3 * x3[d];
    }
    for (; j < n; j++) add_scaled(out, a[j], x + j * stride, D);
}

inline void attention_forward(const AttentionShape& s, const float* q, const float* k, const float* v,
        const int* first, const int* last, float* out, float* lse) {
    const int64_t per = s.H / s.G;
    #pragma omp parallel
    {
        std::vector<float> row(s.S), kt;
        #pragma omp for collapse(2) schedule(dynamic)
        for (int64_t b = 0; b < s.B; b++)
            for (int64_t g = 0; g < s.G; g++) {
                const int64_t from = first[b], n = last[b] - from, stride = s.G * s.D;
                const float* keys = k + s.k(b, from, g);
                const float* values = v + s.k(b, from, g);
                // Transposing the keys pays when several queries read them.
                const bool many = s.T * per >= 8;
                if (many) {
                    kt.resize(s.D * std::max<int64_t>(n, 1));
                    transpose_rows(keys, stride, n, s.D, kt.data());
                }
                for (int64_t h = g * per; h < (g + 1) * per; h++)
                    for (int64_t t = 0; t < s.T; t++) {
                        float* o = out + s.q(b, t, h);
                        std::fill(o, o + s.D, 0.0f);
                        const int64_t used = std::min(n, t + s.S - s.T + 1 - from);
                        if (used <= 0) { lse[s.l(b, h, t)] = 0; continue; }
                        const float* query = q + s.q(b, t, h);
                        if (many) row_times(query, kt.data(), n, s.D, used, row.data());
                        else for (int64_t j = 0; j < used; j++) row[j] = dot(query, keys + j * stride, s.D);
                        float peak = row[0];
                        for (int64_t j = 1; j < used; j++) peak = row[j] > peak ? row[j] : peak;
                        float sum = 0;
                        for (int64_t j = 0; j < used; j++) {
                            row[j] = fast_exp((row[j] - peak) * s.scale);
                            sum += row[j];
                        }
                        const float inverse = 1.0f / sum;
                        for (int64_t j = 0; j < used; j++) row[j] *= inverse;
                        row_sum(row.data(), values, stride, used, s.D, o);
                        lse[s.l(b, h, t)] = peak * s.scale + std::log(sum);
                    }
            }
    }
}

inline void attention_backward(const AttentionShape& s, const float* q, const float* k, const float* v,
        const int* first, const int* last, const float* out, const float* lse, const float* dout,
        float* dq, float* dk, float* dv) {
    const int64_t per = s.H / s.G, stride = s.G * s.D;
    #pragma omp parallel
    {
        std::vector<float> p(s.S), dp(s.S), kt, vt;
        #pragma omp for collapse(2) schedule(dynamic)
        for (int64_t b = 0; b < s.B; b++)
            for (int64_t g = 0; g < s.G; g++) {
                for (int64_t j = 0; j < s.S; j++) {
                    std::fill_n(dk + s.k(b, j, g), s.D, 0.0f);
                    std::fill_n(dv + s.k(b, j, g), s.D, 0.0f);
                }
                const int64_t from = first[b], n = last[b] - from;
                const int64_t base = s.k(b, from, g);
                kt.resize(s.D * std::max<int64_t>(n, 1));
                vt.resize(s.D * std::max<int64_t>(n, 1));
                transpose_rows(k + base, stride, n, s.D, kt.data());
                transpose_rows(v + base, stride, n, s.D, vt.data());
                for (int64_t h = g * per; h < (g + 1) * per; h++)
                    for (int64_t t = 0; t < s.T; t++) {
                        const int64_t at = s.q(b, t, h);
                        std::fill_n(dq + at, s.D, 0.0f);
                        const int64_t used = std::min(n, t + s.S - s.T + 1 - from);
                        if (used <= 0) continue;
                        row_times(q + at, kt.data(), n, s.D, used, p.data());
                        row_times(dout + at, vt.data(), n, s.D, used, dp.data());
                        const float total = dot(dout + at, out + at, s.D), log_sum = lse[s.l(b, h, t)];
                        for (int64_t j = 0; j < used; j++) {
                            p[j] = fast_exp(p[j] * s.scale - log_sum);
                            dp[j] = p[j] * (dp[j] - total) * s.scale;
                        }
                        row_sum(dp.data(), k + base, stride, used, s.D, dq + at);
                        for (int64_t j = 0; j < used; j++) {
                            add_scaled(dk + base + j * stride, dp[j], q + at, s.D);
                            add_scaled(dv + base + j * stride, p[j], dout + at, s.D);
                        }
                    }
            }
    }
}
}  // namespace jlora
