// Matrix products by cuBLAS: operands in bf16, sums in float32.
#pragma once
#include "weights.h"

namespace jlora {
inline cublasHandle_t cublas() {
    static cublasHandle_t handle = [] {
        cublasHandle_t made = nullptr;
        check(cublasCreate(&made), "starting cuBLAS");
        return made;
    }();
    return handle;
}

// A matrix as it stands in memory: rows one after the other, `stride` numbers from one to the next.
template <typename T>
struct Matrix {
    T* data;
    int64_t rows, columns, stride;
    Matrix(T* data, int64_t rows, int64_t columns, int64_t stride = 0)
        : data(data), rows(rows), columns(columns), stride(stride ? stride : columns) {}
    // Columns from `first` on.
    Matrix part(int64_t first, int64_t count) const { return {data + first, rows, count, stride}; }
    Matrix below(int64_t first, int64_t count) const { return {data + first * stride, count, columns, stride}; }
};
inline cudaDataType_t type_of(const bf16*) { return CUDA_R_16BF; }
inline cudaDataType_t type_of(const float*) { return CUDA_R_32F; }

// y = scale * op(a) op(b) + keep * y, where op turns its matrix if asked.
template <typename A, typename B, typename Y>
inline void product(const Matrix<A>& a, bool turn_a, const Matrix<B>& b, bool turn_b, const Matrix<Y>& y,
        float scale = 1.0f, float keep = 0.0f) {
    const int64_t inner = turn_a ? a.rows : a.columns;
    if (failed() || !y.rows || !y.columns) return;
    // cuBLAS reads matrices column by column, so each is its own transpose there, and so is the result.
    check(cublasGemmEx(cublas(), turn_b ? CUBLAS_OP_T : CUBLAS_OP_N, turn_a ? CUBLAS_OP_T : CUBLAS_OP_N,
        (int)y.columns, (int)y.rows, (int)inner, &scale, b.data, type_of(b.data), (int)b.stride,
        a.data, type_of(a.data), (int)a.stride, &keep, y.data, type_of(y.data), (int)y.stride,
        CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT), "a matrix product");
}
// In bf16; of a weight in fewer bits until the next one is asked for.
inline Matrix<bf16> matrix_of(const Weight& w) {
    static Scratch<bf16> memory;
    if (w.kind == bf16_kind) return {(bf16*)w.tiles, w.n, w.k};
    bf16* widened = memory.of(w.n * w.k);
    launch(widen_kernel, dim3(w.n), each_threads, 0, w, widened);
    return {widened, w.n, w.k};
}
}  // namespace jlora
