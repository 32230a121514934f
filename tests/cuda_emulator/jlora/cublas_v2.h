// The one product of cuBLAS that jlora uses. Matrices stand column by column.
#pragma once
#include "cuda_bf16.h"
using cublasHandle_t = void*;
enum cublasStatus_t { CUBLAS_STATUS_SUCCESS, CUBLAS_STATUS_NOT_INITIALIZED };

enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cudaDataType_t { CUDA_R_16BF, CUDA_R_32F };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F };
enum cublasGemmAlgo_t { CUBLAS_GEMM_DEFAULT };
inline cublasStatus_t cublasCreate(cublasHandle_t* h) { *h = nullptr; return CUBLAS_STATUS_SUCCESS; }
inline cublasStatus_t cublasGemmEx(cublasHandle_t, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const float* alpha,
        const void* a, cudaDataType_t at, int lda, const void* b, cudaDataType_t bt, int ldb, const float* beta, void* c,
        cudaDataType_t ct, int ldc, cublasComputeType_t, cublasGemmAlgo_t) {
    auto read = [](const void* p, cudaDataType_t t, int64_t i) {
        return t == CUDA_R_16BF ? (float)((const __nv_bfloat16*)p)[i] : ((const float*)p)[i];
    };
    for (int j = 0; j < n; j++)
        for (int i = 0; i < m; i++) {
            float sum = 0;
            for (int l = 0; l < k; l++)
                sum += read(a, at, ta == CUBLAS_OP_N ? i + (int64_t)l * lda : l + (int64_t)i * lda)
                    * read(b, bt, tb == CUBLAS_OP_N ? l + (int64_t)j * ldb : j + (int64_t)l * ldb);
            const int64_t to = i + (int64_t)j * ldc;
            sum = *alpha * sum + (*beta != 0 ? *beta * read(c, ct, to) : 0.0f);
            if (ct == CUDA_R_16BF) ((__nv_bfloat16*)c)[to] = __nv_bfloat16(sum); else ((float*)c)[to] = sum;
        }
    return CUBLAS_STATUS_SUCCESS;
}
