// A block's norms, row by row.
#pragma once
#include <omp.h>
#include <algorithm>
#include <cmath>
#include <vector>
#include "lanes.h"

namespace jlora {
struct Norm {
    const float *weight, *bias;  // bias: null where there is none; weight null: there is no norm
    int64_t centred;             // LayerNorm takes the mean off; RMSNorm, 0, does not
    double offset;               // added to the weight
};

// Called, it gives n normalised numbers from column k on, at most 32, and zeros beyond.
struct NormRow {
    const float* x;
    const Norm& norm;
    float mean = 0, r;  // r: 1 / standard deviation
    NormRow(const Norm& norm, float eps, const float* x, int64_t C) : x(x), norm(norm) {
        float sum = 0, square = 0;
        if (!norm.weight) { r = 1; return; }
        if (norm.centred) for (int64_t j = 0; j < C; j++) sum += x[j];
        mean = sum / C;
        for (int64_t j = 0; j < C; j++) square += (x[j] - mean) * (x[j] - mean);
        r = 1.0f / std::sqrt(square / C + eps);
    }
    void operator()(int64_t k, int64_t n, F16& left, F16& right) const {
        F16 w0, w1, b0{}, b1{};
        load_some(x + k, left, right, n);
        if (!norm.weight) return;
        load_some(norm.weight + k, w0, w1, n);
        if (norm.bias) load_some(norm.bias + k, b0, b1, n);
        const float offset = (float)norm.offset;
        left = (left - mean) * r * (w0 + offset) + b0, right = (right - mean) * r * (w1 + offset) + b1;
    }
};

// dx = the gradient of a row's norm, plus `past`, what flows past the norm, unless that is null.
inline void norm_row_back(const Norm& norm, const float* x, float mean, float r, const float* dy, const float* past,
        float* dx, int64_t C) {
    float sum = 0, along = 0;
    const float offset = (float)norm.offset;
    for (int64_t j = 0; j < C; j++) {
        const float w = dy[j] * (norm.weight[j] + offset);
        sum += w;
        along += w * (x[j] - mean);
    }
    const float c0 = norm.centred ? sum / C : 0.0f, c1 = along * r * r / C;
    for (int64_t j = 0; j < C; j++) {
        const float own = r * (dy[j] * (norm.weight[j] + offset) - c0 - (x[j] - mean) * c1);
        dx[j] = past ? past[j] + own : own;
    }
}

// Gradients of a norm's weight and bias, (n,); null: not wanted. Every thread sums its own rows.
class NormGradient {
public:
    NormGradient(float* dw, float* db, int64_t n) : dw_(dw), db_(db), n_(n) {
        if (dw_) std::fill_n(dw_, n, 0.0f);
        if (db_) std::fill_n(db_, n, 0.0f);
    }
    struct Part {
        std::vector<float> dw, db;
        explicit Part(const NormGradient& all) : dw(all.dw_ ? all.n_ : 0), db(all.db_ ? all.n_ : 0) {}
        void take(const float* x, const float* dy, float mean, float r) {
            float *w = dw.data(), *b = db.data();
            for (size_t j = 0; j < dw.size(); j++) w[j] += dy[j] * (x[j] - mean) * r;
            for (size_t j = 0; j < db.size(); j++) b[j] += dy[j];
        }
    };
    // By all threads of a parallel region: in their order, so that equal runs give equal bits.
    void join(const Part& part) const {
        #pragma omp for ordered schedule(static, 1)
        for (int t = 0; t < omp_get_num_threads(); t++) {
            #pragma omp ordered
            {
                for (size_t j = 0; j < part.dw.size(); j++) dw_[j] += part.dw[j];
                for (size_t j = 0; j < part.db.size(); j++) db_[j] += part.db[j];
            }
        }
    }

private:
    float *dw_, *db_;
    int64_t n_;
};
}  // namespace jlora
