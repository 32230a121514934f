// Frozen weights: in bf16, or in fewer bits, of which each product makes bf16 again.
#pragma once
#include "gpu.h"

namespace jlora {
// The numbers of ../tile_weights.h; int8_both is for processors alone.
enum Kind : int64_t { bf16_kind, int8_kind, int8_both_kind, int4_kind };
constexpr int64_t group = 32;  // inputs that share a scale and a minimum in int4
// A weight (n, k) on the card; mirrored in structs.py. Of int8 the scales are one for each output. Of int4 they
// are a scale and a minimum in float16 for each group, whose numbers are 16 bytes: the lower halves are the
// first 16, and a number is q scale + minimum.
struct Weight {
    char* tiles;
    int64_t n, k, stride;
    const float* scales;
    int64_t kind;
};
inline int64_t numbers_bytes(int64_t n, int64_t k, int64_t kind) {
    return kind == bf16_kind ? n * k * 2 : kind == int8_kind ? n * k : n * k / 2;
}
// 0: there are no such products.
inline int64_t bytes_of(int64_t n, int64_t k, int64_t kind) {
    const int64_t each = kind == int4_kind ? group : 8;
    if (k % each || kind == int8_both_kind) return 0;
    return numbers_bytes(n, k, kind) + (kind == int8_kind ? n * 4 : kind == int4_kind ? n * k / group * 4 : 0);
}
inline Weight weight_in(char* memory, int64_t n, int64_t k, int64_t kind) {
    return {memory, n, k, 0, kind == bf16_kind ? nullptr : (const float*)(memory + numbers_bytes(n, k, kind)), kind};
}

// float16, by its bits.
__device__ inline float half_value(uint16_t half) {
    const uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest < 0x400) return (sign ? -1.0f : 1.0f) * (float)rest * 5.9604644775390625e-8f;  // 2^-24
    const uint32_t bits = sign | (rest < 0x7c00 ? (rest << 13) + 0x38000000 : 0x7f800000 | (rest & 0x3ff) << 13);
    float x;
    memcpy(&x, &bits, 4);
    return x;
}
__device__ inline uint16_t to_half(float x) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
    if (size > 0x7f800000) return sign | 0x7e00;
    if (size >= 0x477ff000) return sign | 0x7c00;  // above the largest
    if (size < 0x38800000) return sign | (uint32_t)rintf(fabsf(x) * 16777216.0f);
    return sign | (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
}

__device__ inline float number_at(const Weight& w, int64_t n, int64_t k) {
    const int64_t i = n * w.k + k;
    if (w.kind == bf16_kind) return (float)((const bf16*)w.tiles)[i];
    if (w.kind == int8_kind) return ((const int8_t*)w.tiles)[i] * w.scales[n];
    const uint16_t* halves = (const uint16_t*)w.scales + i / group * 2;
    const uint8_t pair = ((const uint8_t*)w.tiles)[i / group * (group / 2) + i % (group / 2)];
    return fmaf((float)(i % group < group / 2 ? pair & 15 : pair >> 4), half_value(halves[0]), half_value(halves[1]));
}
// A block an output.
__global__ void widen_kernel(Weight w, bf16* y) {
    for (int64_t k = threadIdx.x; k < w.k; k += blockDim.x) y[blockIdx.x * w.k + k] = bf16(number_at(w, blockIdx.x, k));
}
__global__ void unpack_kernel(Weight w, float* y, bool turned) {
    const int64_t n = blockIdx.x;
    for (int64_t k = threadIdx.x; k < w.k; k += blockDim.x) y[turned ? k * w.n + n : n * w.k + k] = number_at(w, n, k);
}

// Numbers in float32 that are to be packed: (n, k), stored so or, `turned`, as (k, n).
struct Plain {
    const float* data;
    int64_t n, k;
    bool turned;
    __device__ float at(int64_t row, int64_t column) const { return data[turned ? column * n + row : row * k + column]; }
};
__global__ void pack_bf16_kernel(Plain x, Weight w) {
    for (int64_t k = threadIdx.x; k < w.k; k += blockDim.x) ((bf16*)w.tiles)[blockIdx.x * w.k + k] = bf16(x.at(blockIdx.x, k));
}
__global__ void pack_int8_kernel(Plain x, Weight w) {
    __shared__ float room[33];
    const int64_t n = blockIdx.x;
    float most = 0, bad = 0;
    for (int64_t k = threadIdx.x; k < w.k; k += blockDim.x) {
        const float size = fabsf(x.at(n, k));
        most = fmaxf(most, size), bad = size <= FLT_MAX ? bad : 1.0f;
    }
    most = block_max(most, room), bad = block_max(bad, room);
    const float scale = bad > 0 ? NAN : most > 0 ? most / 127 : 1.0f;  // int8 cannot say so
    if (threadIdx.x == 0) const_cast<float*>(w.scales)[n] = scale;
    for (int64_t k = threadIdx.x; k < w.k; k += blockDim.x) ((int8_t*)w.tiles)[n * w.k + k] = bad > 0 ? 0 : (int8_t)rintf(x.at(n, k) / scale);
}
// As ../int4.h does: scale and minimum for a group, and how far its numbers are from it.
struct Fit {
    float scale, least, error = 0;
    // Of numbers that lie between low and high, in `steps` steps.
    __device__ Fit(const float* v, float low, float high, float steps)
        : scale(half_value(to_half((high - low) / steps))), least(half_value(to_half(low))) {
        for (int k = 0; k < group; k++) {
            const float off = v[k] - fmaf(number(v[k]), scale, least);
            error = fmaf(off, off, error);
        }
    }
    __device__ float number(float v) const { return scale > 0 ? fminf(fmaxf(rintf((v - least) / scale), 0.0f), 15.0f) : 0.0f; }
    __device__ void take_better(const Fit& other) { if (other.error < error) *this = other; }
};
// The whole range in 15 steps; or in fewer, as numbers that were in 4 bits before may need to come back as they
// were; or a part of the range, where a few lie far out.
__device__ inline Fit best_fit(const float* v) {
    float low = v[0], high = v[0];
    for (int k = 1; k < group; k++) low = v[k] < low ? v[k] : low, high = v[k] > high ? v[k] : high;
    Fit best(v, low, high, 15);
    for (int steps = 14; steps > 1; steps--) best.take_better(Fit(v, low, high, (float)steps));
    const float cuts[] = {0.02f, 0.04f, 0.07f};
    for (const float cut : cuts)
        best.take_better(Fit(v, low + (high - low) * cut, high - (high - low) * cut, 15));
    return best;
}
__device__ inline void put(const Weight& w, int64_t at, const uint8_t* q, uint16_t scale, uint16_t least) {
    for (int j = 0; j < group / 2; j++) w.tiles[at * (group / 2) + j] = (char)(q[j] | q[j + group / 2] << 4);
    uint16_t* halves = (uint16_t*)w.scales + at * 2;
    halves[0] = scale, halves[1] = least;
}
// A thread a group.
__global__ void pack_int4_kernel(Plain x, Weight w) {
    const int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, groups = w.k / group;
    if (at >= w.n * groups) return;
    float v[group];
    bool good = true;
    for (int j = 0; j < group; j++) v[j] = x.at(at / groups, at % groups * group + j), good = good && fabsf(v[j]) <= FLT_MAX;
    const Fit fit = best_fit(v);
    uint8_t q[group];
    for (int j = 0; j < group; j++) q[j] = (uint8_t)fit.number(v[j]);
    put(w, at, q, to_half(fit.scale), good ? to_half(fit.least) : 0x7e00);  // 4 bits cannot say NaN
}
// GGUF's rows of blocks, whose numbers stay as they are: see ../int4.h.
enum Form : int64_t { q4_0, q4_1, q4_k };
__global__ void take_blocks_kernel(const uint8_t* rows, int64_t stride, int64_t form, Weight w) {
    const int64_t at = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, groups = w.k / group;
    if (at >= w.n * groups) return;
    const int64_t block = at % groups;
    const uint8_t* own = rows + at / groups * stride;
    int times = 1, least_times = 1;
    const uint8_t *halves, *least, *bytes;
    uint8_t q[group];
    if (form == q4_k) {
        own += block / 8 * 144, halves = own, least = own + 2;
        const uint8_t* six = own + 4;
        const int g = block % 8;
        times = g < 4 ? six[g] & 63 : (six[g + 4] & 15) | (six[g - 4] >> 6) << 4;
        least_times = -(g < 4 ? six[g + 4] & 63 : six[g + 4] >> 4 | (six[g] >> 6) << 4);
        bytes = own + 16 + g / 2 * 32;
        for (int j = 0; j < group; j++) q[j] = bytes[j] >> (g % 2 * 4) & 15;
    } else {
        own += block * (form == q4_0 ? 18 : 20), halves = own, least = form == q4_0 ? own : own + 2;
        least_times = form == q4_0 ? -8 : 1, bytes = own + (form == q4_0 ? 2 : 4);
        for (int j = 0; j < group; j++) q[j] = bytes[j % 16] >> (j / 16 * 4) & 15;
    }
    const float scale = half_value((uint16_t)(halves[0] | halves[1] << 8)), minimum = half_value((uint16_t)(least[0] | least[1] << 8));
    put(w, at, q, to_half(scale * times), to_half(minimum * least_times));
}
}  // namespace jlora
