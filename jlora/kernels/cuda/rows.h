// Norms, activations, dropout and rotary embedding over rows, by kernels.
#pragma once
#include "gpu.h"

namespace jlora {
// As in ../norm.h.
struct Norm {
    const float *weight, *bias;  // bias: null where there is none
    int64_t centred;             // LayerNorm takes the mean off; RMSNorm, 0, does not
    double offset;               // added to the weights
    __device__ float factor(int64_t j) const { return weight[j] + (float)offset; }
};
enum Activation : int64_t { silu, gelu_tanh };  // ACTIVATIONS in elementwise.py

__device__ inline float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ inline float activation(int64_t kind, float x) {
    if (kind == silu) return x * sigmoid(x);
    return x * sigmoid(2.0f * 0.7978845608f * (x + 0.044715f * x * x * x));
}
__device__ inline float activation_slope(int64_t kind, float x) {
    if (kind == silu) {
        const float s = sigmoid(x);
        return s + x * s * (1.0f - s);
    }
    const float du = 0.7978845608f * (1.0f + 3 * 0.044715f * x * x);
    const float s = sigmoid(2.0f * 0.7978845608f * (x + 0.044715f * x * x * x));
    return s + x * 2.0f * s * (1.0f - s) * du;
}

// What decides a dropout, and which numbers it keeps: the same hash as ../elementwise.h.
struct Dropout {
    uint32_t limit, key;
    float scale;
    int64_t first;  // number of the first element
    Dropout(double p, uint64_t seed, int64_t first)
        : limit((uint32_t)(p * 4294967296.0)), key((uint32_t)(seed * 0x9E3779B97F4A7C15ull >> 32)),
          scale((float)(1.0 / (1.0 - p))), first(first) {}
    __device__ float factor(int64_t i) const {
        uint32_t h = (uint32_t)(first + i) * 0x9E3779B1u ^ key;
        h = (h ^ (h >> 16)) * 0x85EBCA6Bu;
        h = (h ^ (h >> 13)) * 0xC2B2AE35u;
        h ^= h >> 16;
        return h >= limit ? scale : 0.0f;
    }
};

constexpr int row_threads = 256;
// A row's mean (0 unless centred) and 1 / standard deviation.
__device__ inline void row_moments(const Norm& norm, float eps, const float* x, int64_t C, float* room, float& mean, float& r) {
    float sum = 0, square = 0;
    if (norm.centred) for (int64_t j = threadIdx.x; j < C; j += blockDim.x) sum += x[j];
    mean = norm.centred ? block_sum(sum, room) / C : 0.0f;
    for (int64_t j = threadIdx.x; j < C; j += blockDim.x) square += (x[j] - mean) * (x[j] - mean);
    r = 1.0f / sqrtf(block_sum(square, room) / C + eps);
}
// A row: sum = x + add + bias, where add and bias may be null, and y = its norm, where norm has a weight.
template <typename Y>
__global__ void add_norm_kernel(const float* x, const float* add, const float* bias, float* sum, Norm norm, float eps, Y* y, int64_t C) {
    __shared__ float room[33];
    const int64_t at = (int64_t)blockIdx.x * C;
    const float* row = x + at;
    if (add) {
        for (int64_t j = threadIdx.x; j < C; j += blockDim.x) sum[at + j] = row[j] + add[at + j] + (bias ? bias[j] : 0.0f);
        __syncthreads();
        row = sum + at;
    }
    if (!norm.weight) return;
    float mean, r;
    row_moments(norm, eps, row, C, room, mean, r);
    for (int64_t j = threadIdx.x; j < C; j += blockDim.x)
        y[at + j] = Y((row[j] - mean) * r * norm.factor(j) + (norm.bias ? norm.bias[j] : 0.0f));
}
template <typename Y>
inline void normalise(const float* x, const Norm& norm, double eps, Y* y, int64_t rows, int64_t C) {
    launch(add_norm_kernel<Y>, dim3(rows), row_threads, 0, x, nullptr, nullptr, nullptr, norm, (float)eps, y, C);
}

// dx = the norm's gradient + past (what flows past it, or null) + sides; also rounded, unless that is null.
__global__ void norm_back_kernel(const float* x, Norm norm, float eps, const float* dy, const float* past, float* dx,
        bf16* rounded, int64_t C) {
    __shared__ float room[33];
    const int64_t at = (int64_t)blockIdx.x * C;
    float mean, r, sum = 0, along = 0;
    row_moments(norm, eps, x + at, C, room, mean, r);
    for (int64_t j = threadIdx.x; j < C; j += blockDim.x) {
        const float w = dy[at + j] * norm.factor(j);
        sum += w, along += w * (x[at + j] - mean);
    }
    sum = block_sum(sum, room), along = block_sum(along, room);
    const float c0 = norm.centred ? sum / C : 0.0f, c1 = along * r * r / C;
    for (int64_t j = threadIdx.x; j < C; j += blockDim.x) {
        const float own = r * (dy[at + j] * norm.factor(j) - c0 - (x[at + j] - mean) * c1);
        const float all = past ? past[at + j] + own : own;
        dx[at + j] = all;
        if (rounded) rounded[at + j] = bf16(all);
    }
}

// Gradients of a norm's weight (and bias) or of a linear layer's bias: sums of columns, in the order of the
// rows, so that equal runs give equal bits. A block has 32 columns; its 8 warps share the rows out.
template <typename G>
__global__ void column_sums_kernel(const G* dy, const float* x, Norm norm, float eps, const float* moments, float* dw, float* db,
        int64_t rows, int64_t C) {
    __shared__ float for_w[8][32], for_b[8][32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t j = (int64_t)blockIdx.x * 32 + lane;
    float w = 0, b = 0;
    for (int64_t m = warp; j < C && m < rows; m += 8) {
        const float g = (float)dy[m * C + j];
        b += g;
        if (dw) w += g * (x[m * C + j] - moments[2 * m]) * moments[2 * m + 1];
    }
    for_w[warp][lane] = w, for_b[warp][lane] = b;
    __syncthreads();
    if (warp || j >= C) return;
    for (int i = 1; i < 8; i++) w += for_w[i][lane], b += for_b[i][lane];
    if (dw) dw[j] = w;
    if (db) db[j] = b;
}
__global__ void moments_kernel(const float* x, Norm norm, float eps, float* moments, int64_t C) {
    __shared__ float room[33];
    float mean, r;
    row_moments(norm, eps, x + (int64_t)blockIdx.x * C, C, room, mean, r);
    if (threadIdx.x == 0) moments[2 * blockIdx.x] = mean, moments[2 * blockIdx.x + 1] = r;
}
template <typename G>
inline void column_sums(const G* dy, float* db, int64_t rows, int64_t C) {
    launch(column_sums_kernel<G>, dim3(blocks_for(C, 32)), 256, 0, dy, nullptr, Norm{}, 0.0f, nullptr, nullptr, db, rows, C);
}
inline void norm_gradients(const float* x, const Norm& norm, double eps, const float* dy, float* dw, float* db, int64_t rows, int64_t C) {
    if (!dw && !db) return;
    static Scratch<float> for_moments;
    float* moments = for_moments.of(2 * rows);
    launch(moments_kernel, dim3(rows), row_threads, 0, x, norm, (float)eps, moments, C);
    launch(column_sums_kernel<float>, dim3(blocks_for(C, 32)), 256, 0, dy, x, norm, (float)eps, moments, dw, db, rows, C);
}

__global__ void round_kernel(const float* x, bf16* y, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = bf16(x[i]);
}
inline void round(const float* x, bf16* y, int64_t n) {
    launch(round_kernel, dim3(blocks_for(n, each_threads)), each_threads, 0, x, y, n);
}
// y = x where the dropout keeps it
template <typename X>
__global__ void dropout_kernel(const X* x, X* y, Dropout drop, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = X((float)x[i] * drop.factor(i));
}
// y += x where the dropout keeps it
__global__ void add_dropped_kernel(const float* x, float* y, Dropout drop, int64_t n) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] += x[i] * drop.factor(i);
}
// The columns of y (rows, stride) that `bias` (n,) has += it
__global__ void add_bias_kernel(float* y, int64_t stride, int64_t n, const float* bias, int64_t count) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < count) y[i / n * stride + i % n] += bias[i % n];
}
// y (rows, n) = x + bias in bf16; the first `heads` heads of D numbers are turned by their row's angles
// where cos is there.
__global__ void finish_qkv_kernel(const float* x, const float* bias, const float* cos, const float* sin, bf16* y, int64_t n,
        int64_t D, int64_t heads, int64_t count) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;  // a pair half a head apart
    if (i >= count) return;
    const int64_t half = D / 2, m = i / (n / 2), h = i % (n / 2) / half, j = i % half, at = h * D + j;
    float left = x[m * n + at], right = x[m * n + at + half];
    if (bias) left += bias[at], right += bias[at + half];
    if (cos && h < heads) {
        const float c = cos[m * half + j], s = sin[m * half + j], l = left;
        left = l * c - right * s, right = right * c + l * s;
    }
    y[m * n + at] = bf16(left), y[m * n + at + half] = bf16(right);
}
// The same back, in place.
__global__ void turn_back_kernel(bf16* x, const float* cos, const float* sin, int64_t n, int64_t D, int64_t heads, int64_t count) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int64_t half = D / 2, per = heads * half, m = i / per, h = i % per / half, j = i % half, at = m * n + h * D + j;
    const float c = cos[m * half + j], s = -sin[m * half + j], l = (float)x[at], r = (float)x[at + half];
    x[at] = bf16(l * c - r * s), x[at + half] = bf16(r * c + l * s);
}
// x (rows, inner) or, gated, (rows, 2 inner) with the gate first, + bias: kept as it is and activated.
// kept null: not wanted.
__global__ void activate_kernel(const float* x, const float* bias, bf16* kept, bf16* active, int64_t kind, bool gated, int64_t inner,
        int64_t count) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int64_t m = i / inner, j = i % inner, width = gated ? 2 * inner : inner;
    const int64_t at = m * width + j, other = at + inner;
    const float first = (float)bf16(x[at] + (bias ? bias[j] : 0.0f));
    float y = activation(kind, first);
    if (gated) {
        const float up = (float)bf16(x[other] + (bias ? bias[inner + j] : 0.0f));
        if (kept) kept[other] = bf16(up);
        y *= up;
    }
    if (kept) kept[at] = bf16(first);
    active[i] = bf16(y);
}
__global__ void activate_again_kernel(const bf16* kept, bf16* active, int64_t kind, bool gated, int64_t inner, int64_t count) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int64_t at = i / inner * (gated ? 2 * inner : inner) + i % inner;
    const float y = activation(kind, (float)kept[at]);
    active[i] = bf16(gated ? y * (float)kept[at + inner] : y);
}
// dactive (rows, inner) -> the gradient of what was kept
__global__ void activate_back_kernel(const float* dactive, const bf16* kept, bf16* dkept, int64_t kind, bool gated, int64_t inner,
        int64_t count) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int64_t at = i / inner * (gated ? 2 * inner : inner) + i % inner;
    const float first = (float)kept[at];
    float slope = activation_slope(kind, first);
    if (gated) {
        dkept[at + inner] = bf16(dactive[i] * activation(kind, first));
        slope *= (float)kept[at + inner];
    }
    dkept[at] = bf16(dactive[i] * slope);
}
}  // namespace jlora
