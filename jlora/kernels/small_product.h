// C (+)= A B for the small matrices inside attention, by blocks of registers.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace jlora {
#if defined(__AVX512F__)
constexpr int64_t lanes = 16, block_rows = 8;  // half of the registers hold sums
#elif defined(__AVX__)
constexpr int64_t lanes = 8, block_rows = 4;
#else
constexpr int64_t lanes = 4, block_rows = 4;
#endif
typedef float Lanes __attribute__((vector_size(lanes * sizeof(float))));
constexpr int64_t block_lanes = 2, block_columns = block_lanes * lanes;

inline Lanes load(const float* p) { Lanes v; std::memcpy(&v, p, sizeof v); return v; }
inline void store(float* p, Lanes v) { std::memcpy(p, &v, sizeof v); }

// A(i, k) = a[i * a_row + k * a_step], B(k, j) = b[k * b_row + j], C(i, j) = c[i * c_row + j].
template <int64_t R>
inline void block(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
        float* c, int64_t c_row, int64_t K, bool add) {
    Lanes sum[R][block_lanes];
    for (int64_t i = 0; i < R; i++)
        for (int64_t l = 0; l < block_lanes; l++)
            sum[i][l] = add ? load(c + i * c_row + l * lanes) : Lanes{};
    for (int64_t k = 0; k < K; k++) {
        const Lanes b0 = load(b + k * b_row), b1 = load(b + k * b_row + lanes);
        for (int64_t i = 0; i < R; i++) {
            const float x = a[i * a_row + k * a_step];
            sum[i][0] += x * b0;
            sum[i][1] += x * b1;
        }
    }
    for (int64_t i = 0; i < R; i++)
        for (int64_t l = 0; l < block_lanes; l++) store(c + i * c_row + l * lanes, sum[i][l]);
}

// C (M, N) = A (M, K) B (K, N), or C += A B.
inline void small_product(int64_t M, int64_t N, int64_t K, const float* a, int64_t a_row, int64_t a_step,
        const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
    const int64_t whole = N / block_columns * block_columns;
    int64_t i = 0;
    for (; i + block_rows <= M; i += block_rows)
        for (int64_t j = 0; j < whole; j += block_columns)
            block<block_rows>(a + i * a_row, a_row, a_step, b + j, b_row, c + i * c_row + j, c_row, K, add);
    for (; i < M; i++)
        for (int64_t j = 0; j < whole; j += block_columns)
            block<1>(a + i * a_row, a_row, a_step, b + j, b_row, c + i * c_row + j, c_row, K, add);
    if (whole == N) return;
    for (i = 0; i < M; i++) {
        float* row = c + i * c_row;
        if (!add) std::fill(row + whole, row + N, 0.0f);
        for (int64_t k = 0; k < K; k++) {
            const float x = a[i * a_row + k * a_step];
            for (int64_t j = whole; j < N; j++) row[j] += x * b[k * b_row + j];
        }
    }
}

// A whole number of blocks, so that padded scores never meet the slow edge.
inline int64_t padded(int64_t n) { return (n + block_columns - 1) / block_columns * block_columns; }
}  // namespace jlora
