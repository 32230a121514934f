// Language-model head, softmax, label smoothing and the gradient in one pass over blocks of
// targets, so that no (targets x vocabulary) matrix is kept.
#pragma once
#include <algorithm>
#include <vector>
#include "packed_linear.h"
#include "vector_math.h"

namespace jlora {
// One row of logits becomes its loss; d loss / d logits goes to `low` as bf16, or takes the row's
// place. A target outside the vocabulary gives NaN, not a read of foreign memory.
inline float softmax_loss(float* row, int64_t V, int64_t target, float smoothing, bool gradient, uint16_t* low) {
    if (target < 0 || target >= V) {
        std::fill(row, row + V, NAN);
        if (low) std::fill(low, low + V, bf16_of(NAN));
        return NAN;
    }
    float peak = row[0];
    for (int64_t j = 1; j < V; j++) peak = row[j] > peak ? row[j] : peak;
    const float picked = row[target];
    double total = 0, mean = 0;
    // Partial sums of one block each keep float sums over 50,000 words exact to 1e-7.
    for (int64_t from = 0; from < V; from += 1024) {
        const int64_t to = std::min(V, from + 1024);
        float part = 0, plain = 0;
        for (int64_t j = from; j < to; j++) {
            plain += row[j];
            const float e = fast_exp(row[j] - peak);
            row[j] = e;
            part += e;
        }
        total += part;
        mean += plain;
    }
    mean /= V;
    if (gradient) {
        const float inverse = (float)(1.0 / total), even = smoothing / V;
        row[target] -= (1.0f - smoothing) / inverse;
        if (low) for (int64_t j = 0; j < V; j++) low[j] = bf16_of(row[j] * inverse - even);
        else for (int64_t j = 0; j < V; j++) row[j] = row[j] * inverse - even;
    }
    return (float)(std::log(total) + peak - (1.0 - smoothing) * picked - smoothing * mean);
}

// hidden (N, C), forward = packed (V, C), backward = packed (C, V) -> losses (N,), dhidden (N, C)
inline void target_loss(const float* hidden, Blob forward, Blob backward, const int* targets,
        float* losses, float* dhidden, int64_t N, int64_t C, int64_t V, float smoothing,
        bool gradient, bool bf16) {
    const int64_t block = 128;  // rows of logits kept at a time
    static Buffer<float> for_logits;
    static Buffer<uint16_t> for_low;
    float* logits = for_logits.of(std::min(N, block) * V);
    uint16_t* low = bf16 && gradient ? for_low.of(std::min(N, block) * V) : nullptr;
    for (int64_t from = 0; from < N; from += block) {
        const int64_t rows = std::min(block, N - from);
        multiply(hidden + from * C, forward, nullptr, logits, rows, V, C, bf16);
        #pragma omp parallel for schedule(dynamic)
        for (int64_t i = 0; i < rows; i++)
            losses[from + i] = softmax_loss(logits + i * V, V, targets[from + i], smoothing, gradient,
                low ? low + i * V : nullptr);
        if (!gradient) continue;
        const void* source = low ? (const void*)low : logits;
        multiply_as_stored(source, backward, nullptr, dhidden + from * C, rows, C, V, bf16);
    }
}
}  // namespace jlora
