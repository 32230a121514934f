// Causal attention, forward and backward, a few score rows at a time: no T x S matrix is kept.
// Layouts: q, out (B, T, H, D); k, v (B, S, G, D); lse (B, H, T). Head h reads key head h / (H / G).
#pragma once
#include <algorithm>
#include <vector>
#include "small_product.h"
#include "vector_math.h"

namespace jlora {
struct AttentionShape {
    int64_t B, T, S, H, G, D;
    float scale;
    int64_t q(int64_t b, int64_t t, int64_t h) const { return ((b * T + t) * H + h) * D; }
    int64_t k(int64_t b, int64_t s, int64_t g) const { return ((b * S + s) * G + g) * D; }
    int64_t l(int64_t b, int64_t h, int64_t t) const { return (b * H + h) * T + t; }
    // Keys that query t sees, of those from `from` on of which n are real.
    int64_t used(int64_t t, int64_t from, int64_t n) const {
        return std::max<int64_t>(0, std::min(n, t + S - T + 1 - from));
    }
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

inline void attention_forward(const AttentionShape& s, const float* q, const float* k, const float* v,
        const int* first, const int* last, float* out, float* lse) {
    const int64_t per = s.H / s.G, stride = s.G * s.D, rows = s.H * s.D, most = padded(s.S);
    #pragma omp parallel
    {
        std::vector<float> p(query_rows * most), kt;
        #pragma omp for collapse(2) schedule(dynamic)
        for (int64_t b = 0; b < s.B; b++)
            for (int64_t g = 0; g < s.G; g++) {
                const int64_t from = first[b], n = last[b] - from, width = padded(n);
                const float* keys = k + s.k(b, from, g);
                const float* values = v + s.k(b, from, g);
                // Transposing the keys pays when several queries read them.
                const bool many = s.T * per >= 8;
                if (many) {
                    kt.resize(s.D * most);
                    transpose_rows(keys, stride, n, s.D, width, kt.data());
                }
                for (int64_t h = g * per; h < (g + 1) * per; h++)
                    for (int64_t t0 = 0; t0 < s.T; t0 += query_rows) {
                        const int64_t count = std::min(query_rows, s.T - t0);
                        const int64_t used = s.used(t0 + count - 1, from, n), wide = std::min(width, padded(used));
                        const float* query = q + s.q(b, t0, h);
                        float* o = out + s.q(b, t0, h);
                        if (many) small_product(count, wide, s.D, query, rows, 1, kt.data(), width, p.data(), most, false);
                        else for (int64_t i = 0; i < count; i++)
                            for (int64_t j = 0; j < used; j++)
                                p[i * most + j] = dot(query + i * rows, keys + j * stride, s.D);
                        for (int64_t i = 0; i < count; i++) {
                            const int64_t own = s.used(t0 + i, from, n);
                            float* row = p.data() + i * most;
                            float log_sum = 0;
                            if (own) log_sum = softmax_row(row, own, wide, s.scale);
                            else std::fill(row, row + wide, 0.0f);
                            lse[s.l(b, h, t0 + i)] = log_sum;
                        }
                        small_product(count, s.D, used, p.data(), most, 1, values, stride, o, rows, false);
                    }
            }
    }
}

inline void attention_backward(const AttentionShape& s, const float* q, const float* k, const float* v,
        const int* first, const int* last, const float* out, const float* lse, const float* dout,
        float* dq, float* dk, float* dv) {
    const int64_t per = s.H / s.G, stride = s.G * s.D, rows = s.H * s.D, most = padded(s.S);
    #pragma omp parallel
    {
        std::vector<float> p(query_rows * most), dp(query_rows * most), kt(s.D * most), vt(s.D * most);
        #pragma omp for collapse(2) schedule(dynamic)
        for (int64_t b = 0; b < s.B; b++)
            for (int64_t g = 0; g < s.G; g++) {
                for (int64_t j = 0; j < s.S; j++) {
                    std::fill_n(dk + s.k(b, j, g), s.D, 0.0f);
                    std::fill_n(dv + s.k(b, j, g), s.D, 0.0f);
                }
                const int64_t from = first[b], n = last[b] - from, width = padded(n);
                const int64_t base = s.k(b, from, g);
                transpose_rows(k + base, stride, n, s.D, width, kt.data());
                transpose_rows(v + base, stride, n, s.D, width, vt.data());
                for (int64_t h = g * per; h < (g + 1) * per; h++)
                    for (int64_t t0 = 0; t0 < s.T; t0 += query_rows) {
                        const int64_t count = std::min(query_rows, s.T - t0), at = s.q(b, t0, h);
                        const int64_t used = s.used(t0 + count - 1, from, n), wide = std::min(width, padded(used));
                        small_product(count, wide, s.D, q + at, rows, 1, kt.data(), width, p.data(), most, false);
                        small_product(count, wide, s.D, dout + at, rows, 1, vt.data(), width, dp.data(), most, false);
                        for (int64_t i = 0; i < count; i++) {
                            const int64_t own = s.used(t0 + i, from, n), row = at + i * rows;
                            float *pi = p.data() + i * most, *di = dp.data() + i * most;
                            const float total = dot(dout + row, out + row, s.D), log_sum = lse[s.l(b, h, t0 + i)];
                            for (int64_t j = 0; j < own; j++) {
                                pi[j] = fast_exp(pi[j] * s.scale - log_sum);
                                di[j] = pi[j] * (di[j] - total) * s.scale;
                            }
                            std::fill(pi + own, pi + wide, 0.0f);
                            std::fill(di + own, di + wide, 0.0f);
                        }
                        small_product(count, s.D, used, dp.data(), most, 1, k + base, stride, dq + at, rows, false);
                        small_product(used, s.D, count, dp.data(), 1, most, q + at, rows, dk + base, stride, true);
                        small_product(used, s.D, count, p.data(), 1, most, dout + at, rows, dv + base, stride, true);
                    }
            }
    }
}
}  // namespace jlora
