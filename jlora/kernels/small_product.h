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
template <int64_t R, int64_t L>
inline void block(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
        float* c, int64_t c_row, int64_t K, bool add) {
    Lanes sum[R][L];
    for (int64_t i = 0; i < R; i++)
        for (int64_t l = 0; l < L; l++)
            sum[i][l] = add ? load(c + i * c_row + l * lanes) : Lanes{};
    for (int64_t k = 0; k < K; k++) {
        Lanes right[L];
        for (int64_t l = 0; l < L; l++) right[l] = load(b + k * b_row + l * lanes);
        for (int64_t i = 0; i < R; i++) {
            const float x = a[i * a_row + k * a_step];
            for (int64_t l = 0; l < L; l++) sum[i][l] += x * right[l];
        }
    }
    for (int64_t i = 0; i < R; i++)
        for (int64_t l = 0; l < L; l++) store(c + i * c_row + l * lanes, sum[i][l]);
}

// All rows of one block of columns.
template <int64_t L>
inline void column_block(int64_t M, int64_t K, const float* a, int64_t a_row, int64_t a_step,
        const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
    int64_t i = 0;
    for (; i + block_rows <= M; i += block_rows)
        block<block_rows, L>(a + i * a_row, a_row, a_step, b, b_row, c + i * c_row, c_row, K, add);
    for (; i < M; i++) block<1, L>(a + i * a_row, a_row, a_step, b, b_row, c + i * c_row, c_row, K, add);
}

// C (M, N) = A (M, K) B (K, N), or C += A B.
inline void small_product(int64_t M, int64_t N, int64_t K, const float* a, int64_t a_row, int64_t a_step,
        const float* b, int64_t b_row, float* c, int64_t c_row, bool add) {
    int64_t j = 0;
    for (; j + block_columns <= N; j += block_columns)
        column_block<block_lanes>(M, K, a, a_row, a_step, b + j, b_row, c + j, c_row, add);
    for (; j + lanes <= N; j += lanes)
        column_block<1>(M, K, a, a_row, a_step, b + j, b_row, c + j, c_row, add);
    if (j == N) return;
    for (int64_t i = 0; i < M; i++) {
        float* row = c + i * c_row;
        if (!add) std::fill(row + j, row + N, 0.0f);
        for (int64_t k = 0; k < K; k++) {
            const float x = a[i * a_row + k * a_step];
            for (int64_t n = j; n < N; n++) row[n] += x * b[k * b_row + n];
        }
    }
}

// A whole number of blocks, so that padded scores never meet the slow edge.
inline int64_t padded(int64_t n) { return (n + block_columns - 1) / block_columns * block_columns; }
}  // namespace jlora
