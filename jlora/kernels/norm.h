// A block's norms, row by row.
#pragma once
#include <cmath>
#include "lanes.h"

namespace jlora {
struct Norm { const float *weight, *bias; };  // no bias: RMSNorm, otherwise LayerNorm

// Called, it gives n normalised numbers from column k on, at most 32, and zeros beyond.
struct NormRow {
    const float* x;
    const Norm& norm;
    float mean = 0, r;  // r: 1 / standard deviation
    NormRow(const Norm& norm, float eps, const float* x, int64_t C) : x(x), norm(norm) {
        float sum = 0, square = 0;
        if (norm.bias) for (int64_t j = 0; j < C; j++) sum += x[j];
        mean = sum / C;
        for (int64_t j = 0; j < C; j++) square += (x[j] - mean) * (x[j] - mean);
        r = 1.0f / std::sqrt(square / C + eps);
    }
    void operator()(int64_t k, int64_t n, F16& left, F16& right) const {
        F16 w0, w1, b0{}, b1{};
        load_some(x + k, left, right, n);
        load_some(norm.weight + k, w0, w1, n);
        if (norm.bias) load_some(norm.bias + k, b0, b1, n);
        left = (left - mean) * r * w0 + b0, right = (right - mean) * r * w1 + b1;
    }
};
}  // namespace jlora
