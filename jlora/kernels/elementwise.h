// Norms, activations and rotary embedding over rows of floats.
#pragma once
#include "lanes.h"
#include "norm.h"
#include "vector_math.h"

namespace jlora {
inline void rms_forward(const float* x, const float* w, float* y, float* rstd, int64_t rows, int64_t n, float eps) {
    #pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        const float* a = x + i * n;
        float sum = 0;
        for (int64_t j = 0; j < n; j++) sum += a[j] * a[j];
        const float r = rstd[i] = 1.0f / std::sqrt(sum / n + eps);
        for (int64_t j = 0; j < n; j++) y[i * n + j] = a[j] * r * w[j];
    }
}
// dw null: not wanted; likewise below.
inline void rms_backward(const float* x, const float* w, const float* rstd, const float* dy, float* dx, float* dw,
        int64_t rows, int64_t n) {
    const NormGradient gradient(dw, nullptr, n);
    #pragma omp parallel
    {
        NormGradient::Part part(gradient);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            const float *a = x + i * n, *g = dy + i * n;
            const float r = rstd[i];
            part.take(a, g, 0.0f, r);
            float sum = 0;
            for (int64_t j = 0; j < n; j++) sum += g[j] * w[j] * a[j];
            const float c = sum * r * r / n;
            for (int64_t j = 0; j < n; j++) dx[i * n + j] = r * (g[j] * w[j] - a[j] * c);
        }
        gradient.join(part);
    }
}
inline void layer_forward(const float* x, const float* w, const float* b, float* y, float* mean, float* rstd,
        int64_t rows, int64_t n, float eps) {
    #pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        const float* a = x + i * n;
        float sum = 0, square = 0;
        for (int64_t j = 0; j < n; j++) sum += a[j];
        const float m = mean[i] = sum / n;
        for (int64_t j = 0; j < n; j++) square += (a[j] - m) * (a[j] - m);
        const float r = rstd[i] = 1.0f / std::sqrt(square / n + eps);
        for (int64_t j = 0; j < n; j++) y[i * n + j] = (a[j] - m) * r * w[j] + b[j];
    }
}
inline void layer_backward(const float* x, const float* w, const float* mean, const float* rstd, const float* dy,
        float* dx, float* dw, float* db, int64_t rows, int64_t n) {
    const NormGradient gradient(dw, db, n);
    #pragma omp parallel
    {
        NormGradient::Part part(gradient);
        #pragma omp for schedule(static)
        for (int64_t i = 0; i < rows; i++) {
            const float *a = x + i * n, *g = dy + i * n;
            const float m = mean[i], r = rstd[i];
            part.take(a, g, m, r);
            float sum = 0, along = 0;
            for (int64_t j = 0; j < n; j++) {
                sum += g[j] * w[j];
                along += g[j] * w[j] * (a[j] - m);
            }
            const float c0 = sum / n, c1 = along * r * r / n;
            for (int64_t j = 0; j < n; j++) dx[i * n + j] = r * (g[j] * w[j] - c0 - (a[j] - m) * c1);
        }
        gradient.join(part);
    }
}
inline void swiglu_forward(const float* gate, const float* up, float* y, int64_t n) {
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++) y[i] = gate[i] * sigmoid(gate[i]) * up[i];
}
inline void swiglu_backward(const float* gate, const float* up, const float* dy, float* dgate, float* dup, int64_t n) {
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++) {
        const float s = sigmoid(gate[i]), silu = gate[i] * s;
        dgate[i] = dy[i] * up[i] * (s + silu * (1.0f - s));
        dup[i] = dy[i] * silu;
    }
}
// tanh form of GELU; u = sqrt(2 / pi) * (x + 0.044715 x^3), and 0.5 (1 + tanh u) = sigmoid(2u)
inline float gelu(float x) {
    const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    return x * sigmoid(2.0f * u);
}
inline float gelu_slope(float x) {
    const float u = 0.7978845608f * (x + 0.044715f * x * x * x);
    const float du = 0.7978845608f * (1.0f + 3 * 0.044715f * x * x);
    const float s = sigmoid(2.0f * u);
    return s + x * 2.0f * s * (1.0f - s) * du;
}
inline void gelu_forward(const float* x, float* y, int64_t n) {
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++) y[i] = gelu(x[i]);
}
inline void gelu_backward(const float* x, const float* dy, float* dx, int64_t n) {
    #pragma omp parallel for
    for (int64_t i = 0; i < n; i++) dx[i] = dy[i] * gelu_slope(x[i]);
}
// x, y (rows, H, D); cos, sin (rows, D / 2); sign -1 turns back.
inline void rotate(const float* x, const float* cos, const float* sin, float* y, int64_t rows, int64_t H, int64_t D, float sign) {
    const int64_t half = D / 2;
    #pragma omp parallel for
    for (int64_t i = 0; i < rows; i++) {
        const float *c = cos + i * half, *s = sin + i * half;
        for (int64_t h = 0; h < H; h++) {
            const float* a = x + (i * H + h) * D;
            float* o = y + (i * H + h) * D;
            for (int64_t j = 0; j < half; j++) {
                o[j] = a[j] * c[j] - sign * a[j + half] * s[j];
                o[j + half] = a[j + half] * c[j] + sign * a[j] * s[j];
            }
        }
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
        return h >= limit ? F16{} + scale : F16{};
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
