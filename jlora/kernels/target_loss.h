// Language-model head, softmax, label smoothing and the gradient together, so that no (targets x
// vocabulary) matrix is kept. A target outside the vocabulary gives NaN, not a read of foreign memory.
//
// Of some rows at a time the exponentials are kept from the sums to the gradient, 32 MB. (A third product for them
// took 30 ms of a step of GPT-2 small, two threads of a Zen 4.) A trained head computes its logits twice.
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
    // Of exp(logit - peak) and of logits: by lane of the last words, and of all before these. One float for all of
    // them would lose what is unlikely behind what is likely.
    alignas(64) float last_total[16] = {}, last_plain[16] = {};
    double total = 0, plain = 0;
    float peak = -FLT_MAX, target = NAN;
    int taken = 0;
    // Logits of words n to n + count, count at most 32; they become exp(logit - peak), beyond count about 0.
    void take(F16& left, F16& right, int64_t n, int64_t count, int64_t wanted) {
        if (wanted >= n && wanted < n + count) target = wanted - n < 16 ? left[wanted - n] : right[wanted - n - 16];
        if (count < 32) left = first(left, count), right = first(right, count - 16);
        store16(last_plain, add_in_order(add_in_order(load16(last_plain), left), right));
        if (count < 32) left = first(left, count, -FLT_MAX), right = first(right, count - 16, -FLT_MAX);
        const F16 both = larger(left, right);
        if (any16(both > peak)) {
            const float most = largest16(both), factor = fast_exp(peak - most);
            store16(last_total, load16(last_total) * factor), total *= factor, peak = most;
        }
        left = exp16(left - peak), right = exp16(right - peak);
        store16(last_total, add_in_order(add_in_order(load16(last_total), left), right));
        if (++taken % 32 == 0) put_away();
    }
    void put_away() {
        total += double_sum16(load16(last_total)), plain += double_sum16(load16(last_plain));
        store16(last_total, F16{}), store16(last_plain, F16{});
    }
    // The first `count` numbers of v, and `other` for the rest.
    static F16 first(F16 v, int64_t count, float other = 0) {
        return blend(lane_numbers < (int32_t)count, v, other);
    }
};
// The same of all threads.
struct RowSum {
    float peak = -FLT_MAX, target = NAN;
    double total = 0, plain = 0;
    // parts[t]: of thread t, `apart` from one to the next.
    RowSum(RowSums* parts, int64_t threads, int64_t apart) {
        for (int64_t t = 0; t < threads; t++) parts[t * apart].put_away(), peak = std::max(peak, parts[t * apart].peak);
        for (int64_t t = 0; t < threads; t++) {
            const RowSums& part = parts[t * apart];
            total += part.total * fast_exp(part.peak - peak), plain += part.plain;
            if (!std::isnan(part.target)) target = part.target;
        }
    }
    double log_sum() const { return std::log(total) + peak; }
    float loss(int64_t V, float smoothing) const {
        return (float)(log_sum() - (1.0 - smoothing) * target - smoothing * plain / V);
    }
};
#if defined(JLORA_TILES)
constexpr int64_t words = 4096;  // at a time, on the way back
// The words from `from` on, at most `words` of them, as a weight of their own.
inline Weight some_words(const Weight& head, int64_t from) {
    return {(char*)head.tile(from / 16, 0), std::min(words, head.n - from), head.k, head.stride};
}
#else
inline const Weight& some_words(const Weight& head, int64_t) { return head; }
#endif
constexpr int64_t target_rows = 512;  // at a time where no exponentials are kept

// Of each row and word exp(logit - peak), with the peak that the row had when its 32 words were computed.
struct Exponentials {
    static constexpr int64_t most_bytes = 32 << 20;
    float *values, *peaks;  // (panels, rows, 32), (panels, rows)
    int64_t rows;
    Exponentials(int64_t rows, int64_t V) : rows(rows) {
        static Buffer<float> for_values, for_peaks;
        values = for_values.of(rows * up_to(V, 32)), peaks = for_peaks.of(rows * up_to(V, 32) / 32);
    }
    float* at(int64_t m, int64_t n) const { return values + n / 32 * rows * 32 + m * 32; }
    float& peak(int64_t m, int64_t n) const { return peaks[n / 32 * rows + m]; }
    // How many of N rows to take at a time: about equally many, of whole tiles.
    static int64_t rows_at_a_time(int64_t N, int64_t V) {
        const int64_t most = std::max<int64_t>(64, most_bytes / (4 * V));
        const int64_t times = std::max<int64_t>(1, (N + most - 1) / most);
        return up_to((N + times - 1) / times, 32);
    }
};

// Rows of hidden states with their targets over a head (V, C).
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
    // -> losses and log_sums (rows,), and exponentials unless they are null
    void losses(float* losses, float* log_sums, const Exponentials* kept) const {
        const int64_t V = head.n, rows = x.rows, threads = omp_get_max_threads();
        std::vector<RowSums> parts(threads * rows);
        product(x, {{&head}, 1}, [&](int64_t m, int64_t n, F16 left, F16 right) {
            if (cap) left = soft_cap16(left, cap), right = soft_cap16(right, cap);
            RowSums& own = parts[omp_get_thread_num() * rows + m];
            own.take(left, right, n, std::min<int64_t>(32, V - n), targets[m]);
            if (kept) store16(kept->at(m, n), left), store16(kept->at(m, n) + 16, right), kept->peak(m, n) = own.peak;
        }, true);
        for (int64_t m = 0; m < rows; m++) {
            const RowSum all(&parts[m], threads, rows);
            losses[m] = all.loss(V, smoothing);
            log_sums[m] = (float)all.log_sum();
        }
    }
    // -> dhidden (rows, C), and dhead (V, C) unless it is null, to which it is added where `add`.
    // factors (rows,): gradients of the losses; null: all 1. kept: of `losses`; null: the logits are computed again.
    void gradient(const float* log_sums, const float* factors, float* dhidden, float* dhead, bool add,
            const Exponentials* kept) const {
        static Buffer<uint16_t> for_low;
        const int64_t V = head.n, C = head.k;
        const float even = smoothing / V;
        for (int64_t from = 0; from < V;) {
            const Weight some = some_words(head, from);
            const Rows low = rows_in(for_low, x.rows, some.n);
            // left, right: the words' probabilities, which become gradients of the logits
            const auto put = [&](int64_t m, int64_t n, F16 left, F16 right, F16 slope_left, F16 slope_right) {
                const int64_t count = std::min<int64_t>(32, some.n - n), place = targets[m] - from - n;
                left -= even, right -= even;
                if (place >= 0 && place < 32) (place < 16 ? left : right)[place % 16] -= 1.0f - smoothing;
                const float factor = factors ? factors[m] : 1.0f;
                left *= slope_left * factor, right *= slope_right * factor;
                if (count == 32) return store32(low.at(m, n), left, right);
                uint16_t end[32];
                store32(end, RowSums::first(left, count), RowSums::first(right, count - 16));
                std::copy_n(end, Rows::filled_up ? 32 : count, low.at(m, n));
            };
            const auto log_sum = [&](int64_t m) { return targets[m] >= 0 && targets[m] < V ? log_sums[m] : NAN; };
            if (kept) {
                #pragma omp parallel for schedule(static)
                for (int64_t n = 0; n < some.n; n += 32)
                    for (int64_t m = 0; m < x.rows; m++) {
                        const float factor = fast_exp(kept->peak(m, from + n) - log_sum(m)), *e = kept->at(m, from + n);
                        put(m, n, load16(e) * factor, load16(e + 16) * factor, F16{} + 1.0f, F16{} + 1.0f);
                    }
            } else {
                product(x, {{&some}, 1}, [&](int64_t m, int64_t n, F16 left, F16 right) {
                    F16 slope_left = F16{} + 1.0f, slope_right = slope_left;
                    if (cap) {
                        left = soft_cap16(left, cap), right = soft_cap16(right, cap);
                        slope_left = soft_cap_slope(left, cap), slope_right = soft_cap_slope(right, cap);
                    }
                    put(m, n, exp16(left - log_sum(m)), exp16(right - log_sum(m)), slope_left, slope_right);
                });
            }
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
    const bool keeps = dhidden && !cap;  // the gradient of capped logits wants the logits
    const int64_t some = keeps ? Exponentials::rows_at_a_time(N, head.n) : target_rows;
    for (int64_t first = 0; first < N; first += some) {
        const int64_t count = std::min(some, N - first);
        const TargetRows rows(memory, hidden + first * head.k, count, head, targets + first, smoothing, cap);
        const Exponentials all(keeps ? count : 0, head.n);
        const Exponentials* kept = keeps ? &all : nullptr;
        rows.losses(losses + first, log_sums + first, kept);
        if (dhidden) rows.gradient(log_sums + first, nullptr, dhidden + first * head.k, nullptr, false, kept);
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
        rows.gradient(log_sums + first, dlosses + first, dhidden + first * head.k, dhead, first > 0, nullptr);
    }
}
}  // namespace jlora
