// The low-rank branch of a linear layer, row by row: y += s (dropout(x) A^T) B^T, and its gradients.
// A layer may be several blocks of equal width, some of them with LoRA (loralib's MergedLinear):
// A (enabled * r, in), B (enabled * width, r), the enabled blocks one after the other.
#pragma once
#include <omp.h>
#include <algorithm>
#include <vector>
#include "elementwise.h"

namespace jlora {
struct LoraShape {
    int64_t rows, in, out, r, blocks, flags;  // bit i of flags: block i is enabled
    float scale;
    double p;        // of dropout; 0: none
    uint64_t seed;
    int64_t width() const { return out / blocks; }
    int64_t rank() const {
        int64_t enabled = 0;
        for (int64_t b = 0; b < blocks; b++) enabled += flags >> b & 1;
        return enabled * r;
    }
};

// B (enabled * width, r) -> the same numbers as (enabled * r, width), so that rows are vectors.
inline void turn_b(const LoraShape& s, const float* B, float* turned) {
    const int64_t width = s.width();
    for (int64_t j = 0; j < s.rank(); j++)
        for (int64_t o = 0; o < width; o++)
            turned[j * width + o] = B[(j / s.r * width + o) * s.r + j % s.r];
}
inline void turn_b_back(const LoraShape& s, const float* turned, float* B) {
    const int64_t width = s.width();
    for (int64_t j = 0; j < s.rank(); j++)
        for (int64_t o = 0; o < width; o++)
            B[(j / s.r * width + o) * s.r + j % s.r] = turned[j * width + o];
}
// Calls visit(j, first output) for every row j of A.
template <typename Visit>
inline void each_rank(const LoraShape& s, Visit visit) {
    int64_t j = 0;
    for (int64_t b = 0; b < s.blocks; b++)
        if (s.flags >> b & 1)
            for (int64_t i = 0; i < s.r; i++) visit(j++, b * s.width());
}

// low (rows, rank) = s dropout(x) A^T is kept for the backward pass.
inline void lora_forward(const LoraShape& s, const float* x, const float* A, const float* B, float* y, float* low) {
    const int64_t rank = s.rank(), width = s.width();
    const Dropout drop(s.p, s.seed);
    std::vector<float> turned(rank * width);
    turn_b(s, B, turned.data());
    #pragma omp parallel
    {
        std::vector<float> kept(s.in);
        #pragma omp for
        for (int64_t n = 0; n < s.rows; n++) {
            const float* row = x + n * s.in;
            if (s.p > 0) {
                for (int64_t i = 0; i < s.in; i++) kept[i] = drop(row[i], n * s.in + i);
                row = kept.data();
            }
            float *own = low + n * rank, *result = y + n * s.out;
            for (int64_t j = 0; j < rank; j++) own[j] = s.scale * dot(row, A + j * s.in, s.in);
            each_rank(s, [&](int64_t j, int64_t first) {
                add_scaled(result + first, own[j], turned.data() + j * width, width);
            });
        }
    }
}

// dx already holds what the frozen weight gives; the branch's part is added.
inline void lora_backward(const LoraShape& s, const float* x, const float* A, const float* B, const float* low,
        const float* dy, float* dx, float* dA, float* dB) {
    const int64_t rank = s.rank(), width = s.width();
    const Dropout drop(s.p, s.seed);
    std::vector<float> turned(rank * width), sum_a(rank * s.in), sum_b(rank * width);
    turn_b(s, B, turned.data());
    #pragma omp parallel
    {
        std::vector<float> kept(s.in), back(s.in), dlow(rank), own_a(rank * s.in), own_b(rank * width);
        #pragma omp for schedule(static)
        for (int64_t n = 0; n < s.rows; n++) {
            const float *row = x + n * s.in, *g = dy + n * s.out, *own = low + n * rank;
            if (s.p > 0) {
                for (int64_t i = 0; i < s.in; i++) kept[i] = drop(row[i], n * s.in + i);
                row = kept.data();
            }
            std::fill(back.begin(), back.end(), 0.0f);
            each_rank(s, [&](int64_t j, int64_t first) {
                dlow[j] = s.scale * dot(g + first, turned.data() + j * width, width);
                add_scaled(own_b.data() + j * width, own[j], g + first, width);
                add_scaled(own_a.data() + j * s.in, dlow[j], row, s.in);
                add_scaled(back.data(), dlow[j], A + j * s.in, s.in);
            });
            float* result = dx + n * s.in;
            if (s.p > 0) for (int64_t i = 0; i < s.in; i++) result[i] += drop(back[i], n * s.in + i);
            else for (int64_t i = 0; i < s.in; i++) result[i] += back[i];
        }
        // In the order of the threads, so that equal runs give equal bits.
        #pragma omp for ordered schedule(static, 1)
        for (int t = 0; t < omp_get_num_threads(); t++) {
            #pragma omp ordered
            {
                add_scaled(sum_a.data(), 1.0f, own_a.data(), rank * s.in);
                add_scaled(sum_b.data(), 1.0f, own_b.data(), rank * width);
            }
        }
    }
    std::copy(sum_a.begin(), sum_a.end(), dA);
    turn_b_back(s, sum_b.data(), dB);
}
}  // namespace jlora
