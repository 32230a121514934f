// The language-model head: losses with their gradient, and the likeliest words of each row.
#pragma once
#include "product.h"
#include "rows.h"

namespace jlora {
constexpr int head_threads = 512;
constexpr int64_t logit_numbers = 1 << 26;  // of logits at a time: 256 MB

// logits = cap * tanh(logits / cap)
__global__ void cap_kernel(float* logits, float cap, int64_t count) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) logits[i] = cap * tanhf(logits[i] / cap);
}
inline void cap_logits(const Matrix<float>& logits, float cap) {
    const int64_t count = logits.rows * logits.columns;
    if (cap > 0) JLORA_EACH(cap_kernel, count, logits.data, cap, count);
}
// logits (rows, V) -> losses (rows,), and their gradient in bf16 where `d` is there. A block a row.
__global__ void losses_kernel(const float* logits, const int* targets, float* losses, bf16* d, int64_t V, float smoothing, float cap) {
    __shared__ float room[33];
    const float* row = logits + (int64_t)blockIdx.x * V;
    float peak = -FLT_MAX, total = 0, plain = 0;
    for (int64_t i = threadIdx.x; i < V; i += blockDim.x) peak = fmaxf(peak, row[i]), plain += row[i];
    peak = block_max(peak, room);
    for (int64_t i = threadIdx.x; i < V; i += blockDim.x) total += expf(row[i] - peak);
    total = block_sum(total, room), plain = block_sum(plain, room);
    const int target = targets[blockIdx.x];
    const bool inside = target >= 0 && target < V;
    const float log_sum = inside ? logf(total) + peak : NAN, even = smoothing / V;
    if (threadIdx.x == 0) losses[blockIdx.x] = inside ? log_sum - (1.0f - smoothing) * row[target] - even * plain : NAN;
    if (!d) return;
    for (int64_t i = threadIdx.x; i < V; i += blockDim.x)
        d[blockIdx.x * V + i] = bf16((expf(row[i] - log_sum) - even - (i == target ? 1.0f - smoothing : 0.0f))
            * (cap > 0 ? 1.0f - row[i] / cap * (row[i] / cap) : 1.0f));
}
// hidden (N, C), head (V, C), targets (N,) -> losses (N,), dhidden (N, C) unless it is null
inline void target_loss(const float* hidden, const Weight& head, const int* targets, float* losses, float* dhidden, int64_t N,
        float smoothing, float cap) {
    static Scratch<bf16> for_hidden, for_d;
    static Scratch<float> for_logits;
    const int64_t V = head.n, C = head.k, most = std::max<int64_t>(1, std::min(N, logit_numbers / V));
    const Matrix<bf16> x(for_hidden.of(N * C), N, C);
    round(hidden, x.data, N * C);
    for (int64_t first = 0; first < N; first += most) {
        const int64_t rows = std::min(most, N - first);
        const Matrix<float> logits(for_logits.of(most * V), rows, V);
        const Matrix<bf16> d(dhidden ? for_d.of(most * V) : nullptr, rows, V);
        product(x.below(first, rows), false, matrix_of(head), true, logits);
        cap_logits(logits, cap);
        launch(losses_kernel, dim3(rows), head_threads, 0, logits.data, targets + first, losses + first, d.data, V, smoothing, cap);
        if (dhidden) product(d, false, matrix_of(head), false, Matrix<float>(dhidden + first * C, rows, C));
    }
}

// What a row's logits are changed by before the best are chosen; ids below 0 are skipped.
struct Edits {
    const int *penalised, *banned;  // (rows, size)
    int64_t penalised_size, banned_size;
    float penalty;
};
// Bans and penalties, in place. The penalised words' own logits are read before any is written.
__global__ void edit_kernel(float* logits, Edits edits, int64_t V) {
    float* row = logits + (int64_t)blockIdx.x * V;
    const int* ids = edits.penalised + blockIdx.x * edits.penalised_size;
    for (int64_t i = threadIdx.x; i < edits.penalised_size; i += blockDim.x) {
        const int id = ids[i];
        bool again = id < 0 || id >= V;  // an id given twice is penalised once
        for (int64_t j = 0; j < i && !again; j++) again = ids[j] == id;
        if (!again) row[id] = row[id] < 0 ? row[id] * edits.penalty : row[id] / edits.penalty;
    }
    __syncthreads();
    ids = edits.banned + blockIdx.x * edits.banned_size;
    for (int64_t i = threadIdx.x; i < edits.banned_size; i += blockDim.x)
        if (ids[i] >= 0 && ids[i] < V) row[ids[i]] = -FLT_MAX;
}
// A row's k largest logits as log-probabilities, falling; equal ones in the order of their ids. Every thread
// holds the best of its own words that has not been taken; whose is taken looks for its next.
__global__ void topk_kernel(const float* logits, int64_t V, int k, float* values, int* ids) {
    __shared__ float room[33], best_values[32];
    __shared__ int best_ids[32];
    __shared__ int chosen;
    const float* row = logits + (int64_t)blockIdx.x * V;
    float peak = -FLT_MAX, total = 0, bad = 0;
    for (int64_t i = threadIdx.x; i < V; i += blockDim.x) {
        const float x = row[i];
        if (x != x || x == INFINITY) bad = 1;
        peak = fmaxf(peak, x);
    }
    bad = block_max(bad, room), peak = block_max(peak, room);
    for (int64_t i = threadIdx.x; i < V; i += blockDim.x) total += expf(row[i] - peak);
    const float log_sum = logf(block_sum(total, room));
    float own = -INFINITY, taken = INFINITY;
    int own_id = 0x7FFFFFFF, taken_id = -1;
    auto look = [&] {
        own = -INFINITY, own_id = 0x7FFFFFFF;
        for (int64_t i = threadIdx.x; i < V; i += blockDim.x) {
            const float x = fmaxf(row[i], -FLT_MAX);
            if ((x < taken || (x == taken && i > taken_id)) && x > own) own = x, own_id = (int)i;
        }
    };
    look();
    for (int n = 0; n < k; n++) {
        float x = own;
        int id = own_id;
        for (int far = 16; far; far >>= 1) {
            const float other = __shfl_xor_sync(0xFFFFFFFFu, x, far);
            const int other_id = __shfl_xor_sync(0xFFFFFFFFu, id, far);
            if (other > x || (other == x && other_id < id)) x = other, id = other_id;
        }
        if (threadIdx.x % 32 == 0) best_values[threadIdx.x / 32] = x, best_ids[threadIdx.x / 32] = id;
        __syncthreads();
        if (threadIdx.x == 0) {
            for (int i = 1; i < (int)blockDim.x / 32; i++)
                if (best_values[i] > x || (best_values[i] == x && best_ids[i] < id)) x = best_values[i], id = best_ids[i];
            chosen = id;
            const int64_t at = (int64_t)blockIdx.x * k + n;
            values[at] = bad > 0 ? NAN : x == -FLT_MAX ? -INFINITY : x - peak - log_sum;
            ids[at] = bad > 0 ? n : id;
        }
        __syncthreads();
        if (chosen == own_id) taken = own, taken_id = own_id, look();
        __syncthreads();
    }
}
// hidden (rows, C) on the card, head (V, C), edits on the card -> values, ids (rows, k) on the card
inline void head_topk(const bf16* hidden, int64_t rows, const Weight& head, const Edits& edits, int64_t k, float cap, float* values, int* ids) {
    static Scratch<float> for_logits;
    const int64_t V = head.n, most = std::max<int64_t>(1, std::min(rows, logit_numbers / V));
    for (int64_t first = 0; first < rows; first += most) {
        const int64_t count = std::min(most, rows - first);
        const Matrix<float> logits(for_logits.of(most * V), count, V);
        product(Matrix<bf16>((bf16*)hidden + first * head.k, count, head.k), false, matrix_of(head), true, logits);
        cap_logits(logits, cap);
        const Edits own{edits.penalised + first * edits.penalised_size, edits.banned + first * edits.banned_size,
            edits.penalised_size, edits.banned_size, edits.penalty};
        launch(edit_kernel, dim3(count), 256, 0, logits.data, own, V);
        launch(topk_kernel, dim3(count), head_threads, 0, logits.data, V, (int)k, values + first * k, ids + first * k);
    }
}
}  // namespace jlora
