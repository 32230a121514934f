// Language-model head, softmax, label smoothing and the gradient together, so that no (targets x
// vocabulary) matrix is kept. A target outside the vocabulary gives NaN, not a read of foreign memory.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>
#include "product.h"
#include "vector_math.h"

namespace jlora {
// What a row's loss needs of its logits: collected in any order, then joined.
struct RowSums {
    float peak = -FLT_MAX, target = NAN;
    double total = 0, plain = 0;  // of exp(logit - peak), of logits
    // Logits of words n to n + count, count at most 32.
    void take(const float* v, int64_t n, int64_t count, int64_t wanted) {
        float most = v[0], sum = 0, all = 0;
        for (int64_t i = 1; i < count; i++) most = v[i] > most ? v[i] : most;
        if (most > peak) total *= fast_exp(peak - most), peak = most;
        for (int64_t i = 0; i < count; i++) sum += fast_exp(v[i] - peak), all += v[i];
        total += sum, plain += all;
        if (wanted >= n && wanted < n + count) target = v[wanted - n];
    }
    void join(const RowSums& other) {
        const float most = std::max(peak, other.peak);
        total = total * fast_exp(peak - most) + other.total * fast_exp(other.peak - most);
        peak = most, plain += other.plain;
        if (!std::isnan(other.target)) target = other.target;
    }
    double log_sum() const { return std::log(total) + peak; }
    float loss(int64_t V, float smoothing) const {
        return (float)(log_sum() - (1.0 - smoothing) * target - smoothing * plain / V);
    }
};
// The gradient of words n to n + count takes the place of their logits.
inline void to_gradient(float* v, int64_t n, int64_t count, float log_sum, int64_t target, float smoothing, int64_t V) {
    const float even = smoothing / V;
    for (int64_t i = 0; i < count; i++) v[i] = fast_exp(v[i] - log_sum) - even;
    if (target >= n && target < n + count) v[target - n] -= 1.0f - smoothing;
    if (target < 0 || target >= V) std::fill_n(v, count, NAN);
}

#if defined(JLORA_AMX)
constexpr int64_t target_rows = 512, words = 4096;  // at a time
// The words from `from` on, at most `words` of them, as a weight of their own.
inline Weight some_words(const Weight& head, int64_t from) {
    return {(char*)head.tile(from / 16, 0), std::min(words, head.n - from), head.k, head.stride};
}
#else
constexpr int64_t target_rows = 128;
inline const Weight& some_words(const Weight& head, int64_t) { return head; }
#endif

// hidden (N, C), head (V, C), targets (N,) -> losses (N,), dhidden (N, C) where `gradient`
//
// Logits are computed twice, once for the sums and once for the gradient: keeping them between the
// two would take as long, and 200 KB a target.
inline void target_loss(const float* hidden, const Weight& head, const int* targets, float* losses, float* dhidden,
        int64_t N, int64_t C, float smoothing, bool gradient) {
    static Buffer<uint16_t> for_hidden, for_low;
    const int64_t V = head.n;
    for (int64_t first = 0; first < N; first += target_rows) {
        const int64_t rows = std::min(target_rows, N - first);
        const Rows x = rows_in(for_hidden, rows, C);
        round_rows(hidden + first * C, x);
        const int* wanted = targets + first;
        std::vector<RowSums> parts(omp_get_max_threads() * rows);
        product(x, {{&head}, 1}, [&](int64_t m, int64_t n, const float* left, const float* right) {
            float v[32];
            for (int i = 0; i < 16; i++) v[i] = left[i], v[i + 16] = right[i];
            parts[omp_get_thread_num() * rows + m].take(v, n, std::min<int64_t>(32, V - n), wanted[m]);
        });
        for (int64_t m = 0; m < rows; m++) {
            for (int t = 1; t < omp_get_max_threads(); t++) parts[m].join(parts[t * rows + m]);
            losses[first + m] = parts[m].loss(V, smoothing);
        }
        if (!gradient) continue;
        float* out = dhidden + first * C;
        for (int64_t from = 0; from < V;) {
            const Weight some = some_words(head, from);
            const Rows low = rows_in(for_low, rows, some.n);
            product(x, {{&some}, 1}, [&](int64_t m, int64_t n, const float* left, const float* right) {
                float v[32] = {};
                const int64_t count = std::min<int64_t>(32, some.n - n);
                for (int64_t i = 0; i < count; i++) v[i] = i < 16 ? left[i] : right[i - 16];
                to_gradient(v, from + n, count, (float)parts[m].log_sum(), wanted[m], smoothing, V);
                to_bf16(v, low.at(m, n), Rows::filled_up ? 32 : count);
            });
            product_back(low, {{&some}, 1}, [&](int64_t m, int64_t k, const float* left, const float* right) {
                float* y = out + m * C + k;
                for (int64_t i = 0; i < std::min<int64_t>(32, C - k); i++)
                    y[i] = (i < 16 ? left[i] : right[i - 16]) + (from ? y[i] : 0.0f);
            });
            from += some.n;
        }
    }
}
}  // namespace jlora
