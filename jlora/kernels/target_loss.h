// Language-model head, softmax, label smoothing and the gradient together, so that no (targets x
// vocabulary) matrix is kept. A target outside the vocabulary gives NaN, not a read of foreign memory.
//
// Logits are computed twice, once for the sums and once for the gradient: keeping them between the two
// would take as long, and 200 KB a target.
#pragma once
#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>
#include "activation.h"
#include "lanes.h"
#include "product.h"
#include "vector_math.h"
#include "weight_gradient.h"

namespace jlora {
// What a row's loss needs of its logits: collected by each thread, then joined.
struct RowSums {
    float peak = -FLT_MAX, target = NAN;
    double total = 0, plain = 0;  // of exp(logit - peak), of logits
    // Logits of words n to n + count, count at most 32.
    void take(F16 left, F16 right, int64_t n, int64_t count, int64_t wanted) {
        if (wanted >= n && wanted < n + count) target = wanted - n < 16 ? left[wanted - n] : right[wanted - n - 16];
        plain += sum16(count == 32 ? left + right : first(left, count) + first(right, count - 16));
        if (count < 32) left = first(left, count, -FLT_MAX), right = first(right, count - 16, -FLT_MAX);
        const float most = largest16(larger(left, right));
        if (most > peak) total *= fast_exp(peak - most), peak = most;
        total += sum16(exp16(left - peak) + exp16(right - peak));
    }
    // The first `count` numbers of v, and `other` for the rest.
    static F16 first(F16 v, int64_t count, float other = 0) {
        return blend(lane_numbers < (int32_t)count, v, other);
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
#if defined(JLORA_TILES)
constexpr int64_t target_rows = 512, words = 4096;  // at a time
// The words from `from` on, at most `words` of them, as a weight of their own.
inline Weight some_words(const Weight& head, int64_t from) {
    return {(char*)head.tile(from / 16, 0), std::min(words, head.n - from), head.k, head.stride};
}
#else
constexpr int64_t target_rows = 128;
inline const Weight& some_words(const Weight& head, int64_t) { return head; }
#endif

// Rows of hidden states with their targets, at most target_rows of them, over a head (V, C).
struct TargetRows {
    Rows x;
    const Weight& head;
    const int* targets;
    float smoothing, cap;  // cap: of the logits, see soft_cap16; 0: none

    TargetRows(Buffer<uint16_t>& memory, const float* hidden, int64_t rows, const Weight& head, const int* targets,
            float smoothing, float cap)
        : x(rows_in(memory, rows, head.k)), head(head), targets(targets), smoothing(smoothing), cap(cap) {
        round_rows(hidden, x);
    }
    // -> losses and log_sums (rows,)
    void losses(float* losses, float* log_sums) const {
        const int64_t V = head.n, rows = x.rows;
        std::vector<RowSums> parts(omp_get_max_threads() * rows);
        product(x, {{&head}, 1}, [&](int64_t m, int64_t n, F16 left, F16 right) {
            if (cap) left = soft_cap16(left, cap), right = soft_cap16(right, cap);
            parts[omp_get_thread_num() * rows + m].take(left, right, n, std::min<int64_t>(32, V - n), targets[m]);
        }, true);
        for (int64_t m = 0; m < rows; m++) {
            for (int t = 1; t < omp_get_max_threads(); t++) parts[m].join(parts[t * rows + m]);
            losses[m] = parts[m].loss(V, smoothing);
            log_sums[m] = (float)parts[m].log_sum();
        }
    }
    // -> dhidden (rows, C), and dhead (V, C) unless it is null, to which it is added where `add`.
    // factors (rows,): gradients of the losses; null: all 1.
    void gradient(const float* log_sums, const float* factors, float* dhidden, float* dhead, bool add) const {
        static Buffer<uint16_t> for_low;
        const int64_t V = head.n, C = head.k;
        const float even = smoothing / V;
        for (int64_t from = 0; from < V;) {
            const Weight some = some_words(head, from);
            const Rows low = rows_in(for_low, x.rows, some.n);
            product(x, {{&some}, 1}, [&](int64_t m, int64_t n, F16 left, F16 right) {
                const int64_t count = std::min<int64_t>(32, some.n - n), place = targets[m] - from - n;
                const float log_sum = targets[m] >= 0 && targets[m] < V ? log_sums[m] : NAN;
                if (cap) left = soft_cap16(left, cap), right = soft_cap16(right, cap);
                const F16 bent_left = left, bent_right = right;
                left = exp16(left - log_sum) - even, right = exp16(right - log_sum) - even;
                if (place >= 0 && place < 32) (place < 16 ? left : right)[place % 16] -= 1.0f - smoothing;
                if (cap) left *= soft_cap_slope(bent_left, cap), right *= soft_cap_slope(bent_right, cap);
                if (factors) left *= factors[m], right *= factors[m];
                if (count == 32) return store32(low.at(m, n), left, right);
                uint16_t end[32];
                store32(end, RowSums::first(left, count), RowSums::first(right, count - 16));
                std::copy_n(end, Rows::filled_up ? 32 : count, low.at(m, n));
            });
            product_back(low, {{&some}, 1}, [&](int64_t m, int64_t k, F16 left, F16 right) {
                float* y = dhidden + m * C + k;
                const int64_t count = std::min<int64_t>(32, C - k);
                F16 l{}, r{};
                if (from) load_some(y, l, r, count);
                store_some(y, left + l, right + r, count);
            });
#if defined(JLORA_TILES)
            if (dhead) product_over_rows(low, x, dhead + from * C, add);
#endif
            from += some.n;
        }
    }
};

// hidden (N, C), head (V, C), targets (N,) -> losses, log_sums (N,), dhidden (N, C) unless it is null
inline void target_loss(const float* hidden, const Weight& head, const int* targets, float* losses, float* log_sums,
        float* dhidden, int64_t N, float smoothing, float cap) {
    JLORA_PART("head and loss");
    static Buffer<uint16_t> memory;
    for (int64_t first = 0; first < N; first += target_rows) {
        const TargetRows rows(memory, hidden + first * head.k, std::min(target_rows, N - first), head, targets + first, smoothing, cap);
        rows.losses(losses + first, log_sums + first);
        if (dhidden) rows.gradient(log_sums + first, nullptr, dhidden + first * head.k, nullptr, false);
    }
}
// The gradients by themselves, of a head that is trained; dlosses (N,), dhead (V, C).
inline void target_loss_back(const float* hidden, const Weight& head, const int* targets, const float* log_sums,
        const float* dlosses, float* dhidden, float* dhead, int64_t N, float smoothing, float cap) {
    JLORA_PART("head and loss");
    static Buffer<uint16_t> memory;
    if (!N) std::fill_n(dhead, head.n * head.k, 0.0f);
    for (int64_t first = 0; first < N; first += target_rows) {
        const TargetRows rows(memory, hidden + first * head.k, std::min(target_rows, N - first), head, targets + first, smoothing, cap);
        rows.gradient(log_sums + first, dlosses + first, dhidden + first * head.k, dhead, first > 0);
    }
}
}  // namespace jlora
