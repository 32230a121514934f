// Norms, activations and rotary embedding over rows of floats.
#pragma once
#include <algorithm>
#include "activation.h"
#include "lanes.h"
#include "norm.h"
#include "profile.h"
#include "vector_math.h"

namespace jlora {
// x (rows, n) -> y, and of each row the mean, unless it is null, and 1 / standard deviation.
inline void norm_forward(const Norm& norm, const float* x, float* y, float* mean, float* rstd, int64_t rows, int64_t n, float eps) {
    #pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        const NormRow row(norm, eps, x + i * n, n);
        rstd[i] = row.r;
        if (mean) mean[i] = row.mean;
        for (int64_t k = 0; k < n; k += 32) {
            const int64_t count = std::min<int64_t>(32, n - k);
            F16 left, right;
            row(k, count, left, right);
            store_some(y + i * n + k, left, right, count);
        }
    }
}
// mean null: all 0. dw, db null: not wanted.
inline void norm_backward(const Norm& norm, const float* x, const float* mean, const float* rstd, const float* dy,
        float* dx, float* dw, float* db, int64_t rows, int64_t n) {
    const NormGradient gradient(dw, db, n);
    #pragma omp parallel
    {
        NormGradient::Part part(gradient);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            const float m = mean ? mean[i] : 0.0f;
            part.take(x + i * n, dy + i * n, m, rstd[i]);
            norm_row_back(norm, x + i * n, m, rstd[i], dy + i * n, nullptr, dx + i * n, n);
        }
        gradient.join(part);
    }
}
// work(i, count): numbers i to i + count of n, 32 of them but at the end
template <typename Work>
inline void each_32(int64_t n, Work work) {
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i += 32) work(i, std::min<int64_t>(32, n - i));
}
inline void gated_forward(int64_t kind, const float* gate, const float* up, float* y, int64_t n) {
    each_32(n, [&](int64_t i, int64_t count) {
        F16 g0, g1, u0, u1;
        load_some(gate + i, g0, g1, count), load_some(up + i, u0, u1, count);
        store_some(y + i, activation16(kind, g0) * u0, activation16(kind, g1) * u1, count);
    });
}
inline void gated_backward(int64_t kind, const float* gate, const float* up, const float* dy, float* dgate, float* dup, int64_t n) {
    each_32(n, [&](int64_t i, int64_t count) {
        F16 g0, g1, u0, u1, d0, d1;
        load_some(gate + i, g0, g1, count), load_some(up + i, u0, u1, count), load_some(dy + i, d0, d1, count);
        store_some(dgate + i, d0 * u0 * activation_slope16(kind, g0), d1 * u1 * activation_slope16(kind, g1), count);
        store_some(dup + i, d0 * activation16(kind, g0), d1 * activation16(kind, g1), count);
    });
}
inline void activation_forward(int64_t kind, const float* x, float* y, int64_t n) {
    each_32(n, [&](int64_t i, int64_t count) {
        F16 left, right;
        load_some(x + i, left, right, count);
        store_some(y + i, activation16(kind, left), activation16(kind, right), count);
    });
}
inline void activation_backward(int64_t kind, const float* x, const float* dy, float* dx, int64_t n) {
    each_32(n, [&](int64_t i, int64_t count) {
        F16 left, right, d0, d1;
        load_some(x + i, left, right, count), load_some(dy + i, d0, d1, count);
        store_some(dx + i, d0 * activation_slope16(kind, left), d1 * activation_slope16(kind, right), count);
    });
}
// x, y (rows, H, D); cos, sin (rows, turn.size / 2); sign -1 turns back.
inline void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t rows, int64_t H, int64_t D,
        const Turn& turn, float sign) {
    const int64_t half = turn.size / 2;
    #pragma omp parallel for
    for (int64_t i = 0; i < rows; i++)
        for (int64_t h = 0; h < H; h++) {
            float* own = y + (i * H + h) * D;
            std::copy_n(x + (i * H + h) * D, D, own);
            turn(own, cos + i * half, sin + i * half, sign);
        }
}
// What decides a dropout: a seed, and the number of the first row among the rows of all processes that
// share a batch.
struct Seed {
    uint64_t value = 0;
    int64_t first_row = 0;
    Seed() = default;
    explicit Seed(const int64_t* both) : value(both[0]), first_row(both[1]) {}
};
// Keeps x[i] with probability 1 - p, scaled by 1 / (1 - p). The choice is a hash of (seed, i), so
// that the backward pass makes the same one without a stored mask, on any number of threads.
struct Dropout {
    uint32_t limit, key;
    float scale;
    Dropout(double p, uint64_t seed)
        : limit((uint32_t)(p * 4294967296.0)), key((uint32_t)(seed * 0x9E3779B97F4A7C15ull >> 32)),
          scale((float)(1.0 / (1.0 - p))) {}
    float operator()(float x, int64_t i) const {
        uint32_t h = (uint32_t)i * 0x9E3779B1u ^ key;  // then the finaliser of MurmurHash3
        h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
        h = (h ^ (h >> 13)) * 0xC2B2AE35u;
        h ^= h >> 16;
        return h >= limit ? x * scale : 0.0f;
    }
    // What x[i] to x[i + 15] are multiplied by: scale or zero.
    F16 factors(int64_t i) const {
        U16 h = ((U16)lane_numbers + (uint32_t)i) * 0x9E3779B1u ^ key;
        h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
        h = (h ^ (h >> 13)) * 0xC2B2AE35u;
        h ^= h >> 16;
        return blend(h >= limit, F16{} + scale, 0.0f);
    }
};
// rows of `width`
inline void dropout(const float* x, float* y, int64_t n, int64_t width, Seed seed, double p) {
    const Dropout drop(p, seed.value);
    const int64_t first = seed.first_row * width;
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++) y[i] = drop(x[i], first + i);
}
}  // namespace jlora
