// Causal attention over a stream of sequences, forward and backward, in tiles of queries by keys that stay
// in shared memory (FlashAttention-2, arXiv 2307.08691): nothing of size T x T is written.
//
// A tile of queries is a run of rows of the stream; each row knows the first and the last row of its own
// sequence, and keys outside are hidden. Sums are float32, operands bf16, products by tensor cores.
#pragma once
#include "gpu.h"

namespace jlora {
namespace wmma = nvcuda::wmma;

// qkv (rows, (H + 2 G) D): queries, keys, values, turned by their positions already.
struct Attention {
    int64_t rows, H, G, D;
    const bf16* qkv;
    const int *first, *last;   // (rows,) of each row's sequence
    float scale, cap;          // cap: scores are cap * tanh(score / cap); 0: as they are
    int64_t window;            // rows before a query, itself included, that it sees; 0: all
    // The first key that a query sees.
    __device__ int64_t first_key(int64_t m) const { return window && m - window + 1 > first[m] ? m - window + 1 : first[m]; }
    __device__ float score(float product) const {
        const float s = product * scale;
        return cap > 0 ? cap * tanhf(s / cap) : s;
    }
    // d score / d (scale * product)
    __device__ float slope(float score) const { return cap > 0 ? 1.0f - score / cap * (score / cap) : 1.0f; }
    __host__ __device__ int64_t width() const { return (H + 2 * G) * D; }
    __device__ const bf16* q(int64_t m, int64_t h) const { return qkv + m * width() + h * D; }
    __device__ const bf16* k(int64_t m, int64_t g) const { return qkv + m * width() + (H + g) * D; }
    __device__ const bf16* v(int64_t m, int64_t g) const { return qkv + m * width() + (H + G + g) * D; }
};

// starts (n + 1) -> first and last row of the sequence of each row
__global__ void sequence_bounds_kernel(const int* starts, int sequences, int* first, int* last, int rows) {
    const int m = blockIdx.x * blockDim.x + threadIdx.x;
    if (m >= rows) return;
    int low = 0, high = sequences - 1;  // the last sequence that starts at m or before
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (starts[middle] <= m) low = middle; else high = middle - 1;
    }
    first[m] = starts[low], last[m] = starts[low + 1] - 1;
}

// Tiles in shared memory; rows are padded so that neighbouring ones begin in other banks.
__host__ __device__ inline int half_stride(int64_t D) { return (int)D + 8; }
__host__ __device__ inline int float_stride(int64_t D) { return (int)D + 4; }
// Rows from m on of heads that stand `width` apart; zeros beyond the end. 8 numbers at a time.
__device__ inline void load_tile(bf16* tile, const bf16* source, int64_t width, int64_t m, int count, int64_t rows, int64_t D) {
    const int per = (int)D / 8, stride = half_stride(D);
    for (int i = threadIdx.x; i < count * per; i += blockDim.x) {
        const int r = i / per, j = i % per * 8;
        const float4 zero = {0, 0, 0, 0};
        *(float4*)(tile + r * stride + j) = m + r < rows ? *(const float4*)(source + (m + r) * width + j) : zero;
    }
}
// y (16, columns) = or += a b over `inner`; a is (16, inner) or turned, b (inner, columns) or turned.
template <bool turn_a, bool turn_b, bool add>
__device__ inline void tile_product(const bf16* a, int a_stride, const bf16* b, int b_stride, float* y, int y_stride, int inner,
        int columns) {
    using A = wmma::fragment<wmma::matrix_a, 16, 16, 16, bf16, std::conditional_t<turn_a, wmma::col_major, wmma::row_major>>;
    using B = wmma::fragment<wmma::matrix_b, 16, 16, 16, bf16, std::conditional_t<turn_b, wmma::col_major, wmma::row_major>>;
    for (int n = 0; n < columns; n += 16) {
        wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum;
        if (add) wmma::load_matrix_sync(sum, y + n, y_stride, wmma::mem_row_major);
        else wmma::fill_fragment(sum, 0.0f);
        for (int k = 0; k < inner; k += 16) {
            A left;
            B right;
            wmma::load_matrix_sync(left, turn_a ? a + k * a_stride : a + k, a_stride);
            wmma::load_matrix_sync(right, turn_b ? b + n * b_stride + k : b + k * b_stride + n, b_stride);
            wmma::mma_sync(sum, left, right, sum);
        }
        wmma::store_matrix_sync(y + n, sum, y_stride, wmma::mem_row_major);
    }
}

// A block computes Q queries of one head; warps of 16 queries each. out (rows, H D), lse (rows, H).
template <int Q, int K>
struct ForwardMemory {
    bf16 *q, *k, *v, *p;
    float *s, *o, *m, *l;
    int64_t bytes;
    __host__ __device__ ForwardMemory(unsigned char* at, int64_t D) {
        const int64_t h = half_stride(D);
        q = (bf16*)at, k = q + Q * h, v = k + K * h;
        s = (float*)(v + K * h), p = (bf16*)s;  // the same rows: first scores, then their exponentials
        o = s + Q * float_stride(K), m = o + Q * float_stride(D), l = m + Q;
        bytes = (unsigned char*)(l + Q) - at;
    }
};
template <int Q, int K>
__global__ void attention_kernel(Attention a, bf16* out, float* lse) {
    JLORA_SHARED_MEMORY(memory);
    const ForwardMemory<Q, K> in(memory, a.D);
    constexpr int s_stride = K + 4, p_stride = 2 * s_stride;
    const int64_t q0 = (int64_t)blockIdx.x * Q, h = blockIdx.y, g = h / (a.H / a.G), D = a.D;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 2, side = lane % 2;
    const int hs = half_stride(D), os = float_stride(D);
    load_tile(in.q, a.q(0, h), a.width(), q0, Q, a.rows, D);
    for (int i = threadIdx.x; i < Q * os; i += blockDim.x) in.o[i] = 0;
    for (int i = threadIdx.x; i < Q; i += blockDim.x) in.m[i] = -INFINITY, in.l[i] = 0;
    const int64_t end = min(q0 + Q, a.rows), m = q0 + row;
    const int64_t own_first = m < a.rows ? a.first_key(m) : a.rows;
    for (int64_t k0 = a.first_key(q0); k0 < end; k0 += K) {
        __syncthreads();
        load_tile(in.k, a.k(0, g), a.width(), k0, K, a.rows, D);
        load_tile(in.v, a.v(0, g), a.width(), k0, K, a.rows, D);
        __syncthreads();
        tile_product<false, true, false>(in.q + warp * 16 * hs, hs, in.k, hs, in.s + warp * 16 * s_stride, s_stride, (int)D, K);
        __syncwarp();
        // Two lanes a query, half of the keys each.
        float own[K / 2], peak = -INFINITY;
        for (int j = 0; j < K / 2; j++) {
            const int64_t key = k0 + side * (K / 2) + j;
            own[j] = key >= own_first && key <= m ? a.score(in.s[row * s_stride + side * (K / 2) + j]) : -INFINITY;
            peak = fmaxf(peak, own[j]);
        }
        peak = fmaxf(peak, __shfl_xor_sync(0xFFFFFFFFu, peak, 1));
        const float before = in.m[row], now = fmaxf(before, peak), shift = now == -INFINITY ? 0.0f : now;
        const float factor = before == -INFINITY ? 0.0f : expf(before - shift);
        float total = 0;
        for (int j = 0; j < K / 2; j++) {
            own[j] = expf(own[j] - shift);
            total += own[j];
        }
        total += __shfl_xor_sync(0xFFFFFFFFu, total, 1);  // also: all have read their scores
        for (int j = 0; j < K / 2; j++) in.p[row * p_stride + side * (K / 2) + j] = bf16(own[j]);
        for (int j = side; j < D; j += 2) in.o[row * os + j] *= factor;
        if (side == 0) in.l[row] = in.l[row] * factor + total, in.m[row] = now;
        __syncwarp();
        tile_product<false, false, true>(in.p + warp * 16 * p_stride, p_stride, in.v, hs, in.o + warp * 16 * os, os, K, (int)D);
    }
    __syncthreads();
    if (m >= a.rows) return;
    const float total = in.l[row];
    for (int j = side; j < D; j += 2) out[(m * a.H + h) * D + j] = bf16(in.o[row * os + j] / total);
    if (side == 0) lse[m * a.H + h] = in.m[row] + logf(total);
}

// delta (rows, H): the sum of dout * out of each head. A warp each.
__global__ void attention_delta_kernel(const bf16* dout, const bf16* out, float* delta, int64_t D, int64_t count) {
    const int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) / 32;
    float sum = 0;
    if (i < count)
        for (int j = threadIdx.x % 32; j < D; j += 32) sum += (float)dout[i * D + j] * (float)out[i * D + j];
    sum = warp_sum(sum);
    if (i < count && threadIdx.x % 32 == 0) delta[i] = sum;
}

// What the backward pass reads, and dqkv, which it writes.
struct AttentionBack {
    Attention a;
    const bf16* dout;          // (rows, H D)
    const float *lse, *delta;  // (rows, H)
    bf16* dqkv;                // as qkv
};
template <int Q, int K, int kept>  // kept: rows of each sum
struct BackwardMemory {
    bf16 *q, *dout, *k, *v, *p;
    float *s, *dp, *sum1, *sum2;
    int64_t bytes;
    __host__ __device__ BackwardMemory(unsigned char* at, int64_t D, int sums) {
        const int64_t h = half_stride(D);
        q = (bf16*)at, dout = q + Q * h, k = dout + Q * h, v = k + K * h, p = v + K * h;
        s = (float*)(p + Q * half_stride(K)), dp = s + Q * float_stride(K);
        sum1 = dp + Q * float_stride(K), sum2 = sum1 + kept * float_stride(D);
        bytes = (unsigned char*)(sum2 + (sums - 1) * kept * float_stride(D)) - at;
    }
};
// Of a tile of queries from q0 and keys from k0: s = p and dp = ds, float32, by the warps of 16 queries.
template <int Q, int K, typename Memory>
__device__ inline void probabilities_back(const AttentionBack& b, const Memory& in, int64_t q0, int64_t k0, int64_t h) {
    const Attention& a = b.a;
    constexpr int stride = K + 4;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 2, side = lane % 2;
    const int hs = half_stride(a.D);
    const int64_t m = q0 + row;
    tile_product<false, true, false>(in.q + warp * 16 * hs, hs, in.k, hs, in.s + warp * 16 * stride, stride, (int)a.D, K);
    tile_product<false, true, false>(in.dout + warp * 16 * hs, hs, in.v, hs, in.dp + warp * 16 * stride, stride, (int)a.D, K);
    __syncwarp();
    const int64_t first = m < a.rows ? a.first_key(m) : a.rows;
    const float lse = m < a.rows ? b.lse[m * a.H + h] : 0.0f, delta = m < a.rows ? b.delta[m * a.H + h] : 0.0f;
    for (int j = 0; j < K / 2; j++) {
        const int at = row * stride + side * (K / 2) + j;
        const int64_t key = k0 + side * (K / 2) + j;
        const float score = a.score(in.s[at]), p = key >= first && key <= m ? expf(score - lse) : 0.0f;
        in.s[at] = p, in.dp[at] = p * (in.dp[at] - delta) * a.slope(score) * a.scale;
    }
}
// Rounds a (Q, K) tile to bf16.
template <int Q, int K>
__device__ inline void round_tile(const float* from, bf16* to) {
    for (int i = threadIdx.x; i < Q * K; i += blockDim.x) to[i / K * (K + 8) + i % K] = bf16(from[i / K * (K + 4) + i % K]);
}

template <int Q, int K>
__global__ void attention_dq_kernel(AttentionBack b) {
    JLORA_SHARED_MEMORY(memory);
    const Attention& a = b.a;
    const BackwardMemory<Q, K, Q> in(memory, a.D, 1);
    const int64_t q0 = (int64_t)blockIdx.x * Q, h = blockIdx.y, g = h / (a.H / a.G), D = a.D;
    const int warp = threadIdx.x / 32, hs = half_stride(D), os = float_stride(D);
    load_tile(in.q, a.q(0, h), a.width(), q0, Q, a.rows, D);
    load_tile(in.dout, b.dout + h * D, a.H * D, q0, Q, a.rows, D);
    for (int i = threadIdx.x; i < Q * os; i += blockDim.x) in.sum1[i] = 0;
    const int64_t end = min(q0 + Q, a.rows);
    for (int64_t k0 = a.first_key(q0); k0 < end; k0 += K) {
        __syncthreads();
        load_tile(in.k, a.k(0, g), a.width(), k0, K, a.rows, D);
        load_tile(in.v, a.v(0, g), a.width(), k0, K, a.rows, D);
        __syncthreads();
        probabilities_back<Q, K>(b, in, q0, k0, h);
        __syncthreads();
        round_tile<Q, K>(in.dp, in.p);
        __syncthreads();
        tile_product<false, false, true>(in.p + warp * 16 * (K + 8), K + 8, in.k, hs, in.sum1 + warp * 16 * os, os, K, (int)D);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < Q * D; i += blockDim.x) {
        const int64_t r = i / D, j = i % D;
        if (q0 + r < a.rows) b.dqkv[(q0 + r) * a.width() + h * D + j] = bf16(in.sum1[r * os + j]);
    }
}
// A block computes K keys and values of one key head, over all queries that see them.
template <int Q, int K>
__global__ void attention_dkv_kernel(AttentionBack b) {
    JLORA_SHARED_MEMORY(memory);
    const Attention& a = b.a;
    const BackwardMemory<Q, K, K> in(memory, a.D, 2);
    const int64_t k0 = (int64_t)blockIdx.x * K, g = blockIdx.y, D = a.D, per = a.H / a.G;
    const int warp = threadIdx.x / 32, warps = blockDim.x / 32, hs = half_stride(D), os = float_stride(D);
    load_tile(in.k, a.k(0, g), a.width(), k0, K, a.rows, D);
    load_tile(in.v, a.v(0, g), a.width(), k0, K, a.rows, D);
    for (int i = threadIdx.x; i < K * os; i += blockDim.x) in.sum1[i] = 0, in.sum2[i] = 0;
    const int64_t last = a.last[min(k0 + K, a.rows) - 1] + 1, end = a.window ? min(last, k0 + K + a.window - 1) : last;
    for (int64_t h = g * per; h < (g + 1) * per; h++)
        for (int64_t q0 = k0; q0 < end; q0 += Q) {
            __syncthreads();
            load_tile(in.q, a.q(0, h), a.width(), q0, Q, a.rows, D);
            load_tile(in.dout, b.dout + h * D, a.H * D, q0, Q, a.rows, D);
            __syncthreads();
            probabilities_back<Q, K>(b, in, q0, k0, h);
            for (int turn = 0; turn < 2; turn++) {  // values, then keys
                __syncthreads();
                round_tile<Q, K>(turn ? in.dp : in.s, in.p);
                __syncthreads();
                // Pieces of 16 keys by 16 numbers, shared out among the warps.
                for (int i = warp; i < K / 16 * (int)(D / 16); i += warps) {
                    const int r = i % (K / 16) * 16, j = i / (K / 16) * 16;
                    tile_product<true, false, true>(in.p + r, K + 8, (turn ? in.q : in.dout) + j, hs,
                        (turn ? in.sum2 : in.sum1) + r * os + j, os, Q, 16);
                }
            }
        }
    __syncthreads();
    for (int i = threadIdx.x; i < K * D; i += blockDim.x) {
        const int64_t r = i / D, j = i % D;
        if (k0 + r >= a.rows) continue;
        bf16* row = b.dqkv + (k0 + r) * a.width() + (a.H + g) * D + j;
        row[0] = bf16(in.sum2[r * os + j]), row[a.G * D] = bf16(in.sum1[r * os + j]);
    }
}

template <int Q, int K>
inline void run_attention(const Attention& a, bf16* out, float* lse) {
    const ForwardMemory<Q, K> memory(nullptr, a.D);
    launch(attention_kernel<Q, K>, dim3(blocks_for(a.rows, Q), (unsigned)a.H), 2 * Q, memory.bytes, a, out, lse);
}
template <int Q, int K>
inline void run_attention_back(const AttentionBack& b) {
    const BackwardMemory<Q, K, Q> for_dq(nullptr, b.a.D, 1);
    const BackwardMemory<Q, K, K> for_dkv(nullptr, b.a.D, 2);
    launch(attention_dq_kernel<Q, K>, dim3(blocks_for(b.a.rows, Q), (unsigned)b.a.H), 2 * Q, for_dq.bytes, b);
    launch(attention_dkv_kernel<Q, K>, dim3(blocks_for(b.a.rows, K), (unsigned)b.a.G), 2 * Q, for_dkv.bytes, b);
}
// Tiles that fit into the 99 KB of shared memory of the smaller cards.
inline void attention(const Attention& a, bf16* out, float* lse) {
    if (a.D <= 64) run_attention<64, 64>(a, out, lse); else run_attention<64, 32>(a, out, lse);
}
inline void attention_back(const AttentionBack& b, const bf16* out, float* delta) {
    const int64_t count = b.a.rows * b.a.H;
    launch(attention_delta_kernel, dim3(blocks_for(count, 8)), 256, 0, b.dout, out, delta, b.a.D, count);
    if (b.a.D <= 64) run_attention_back<64, 32>(b); else run_attention_back<32, 32>(b);
}
}  // namespace jlora
