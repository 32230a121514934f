// Products of 16 x 16 tiles: here every thread of a warp has the whole tile.
#pragma once
#include <cuda_bf16.h>
namespace nvcuda::wmma {
struct matrix_a {};
struct matrix_b {};
struct accumulator {};
struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
template <typename Use, int M, int N, int K, typename T, typename Layout = void>
struct fragment { float x[16][16]; };
// What CUDA asks of a tile: that it begins at a multiple of 32 bytes, its rows at one of 16.
template <typename T>
inline void check_place(const T* tile, unsigned stride) {
    if ((uintptr_t)tile % 32 || stride * sizeof(T) % 16) std::abort();
}
template <typename F>
inline void fill_fragment(F& f, float v) {
    for (auto& row : f.x) for (float& x : row) x = v;
}
template <typename Use, typename Layout>
inline void load_matrix_sync(fragment<Use, 16, 16, 16, __nv_bfloat16, Layout>& f, const __nv_bfloat16* from, unsigned stride) {
    check_place(from, stride);
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++)
            f.x[i][j] = (float)(std::is_same_v<Layout, row_major> ? from[i * stride + j] : from[j * stride + i]);
}
inline void load_matrix_sync(fragment<accumulator, 16, 16, 16, float>& f, const float* from, unsigned stride, layout_t) {
    check_place(from, stride);
    for (int i = 0; i < 16; i++) for (int j = 0; j < 16; j++) f.x[i][j] = from[i * stride + j];
    __syncwarp();  // the warp loads together: nobody may have stored yet
}
inline void store_matrix_sync(float* to, const fragment<accumulator, 16, 16, 16, float>& f, unsigned stride, layout_t) {
    check_place(to, stride);
    __syncwarp();
    for (int i = 0; i < 16; i++) for (int j = 0; j < 16; j++) to[i * stride + j] = f.x[i][j];
}
template <typename D, typename A, typename B, typename C>
inline void mma_sync(D& d, const A& a, const B& b, const C& c) {
    D sum;
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 16; j++) {
            float all = c.x[i][j];
            for (int k = 0; k < 16; k++) all += a.x[i][k] * b.x[k][j];
            sum.x[i][j] = all;
        }
    d = sum;
}
}  // namespace nvcuda::wmma
