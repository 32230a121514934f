// What the CUDA files share: launches, errors, scratch memory, numbers in bf16.
//
// They also compile as C++ beside tests/cuda_emulator, whose headers have the names of CUDA's: there a
// kernel runs on the processor, thread by thread, so that what it computes is tested without a card.
#pragma once
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <mma.h>
#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include "../native.h"

namespace jlora {
using bf16 = __nv_bfloat16;

// The first thing that went wrong on the card in a call; Python asks for it after each call, in the call's thread.
inline std::string& failure() {
    static thread_local std::string first;
    return first;
}
// Whether the rest of a call is left out: memory may be missing, and a kernel that writes to none ends CUDA for
// the whole process.
inline bool failed() { return !failure().empty(); }
inline void note(const std::string& text) { if (!failed()) failure() = text; }
inline void check(cudaError_t error, const char* what) {
    if (error == cudaSuccess) return;
    note(std::string(what) + ": " + cudaGetErrorString(error));
    cudaGetLastError();  // else CUDA says it again after the next kernel, ours or Jittor's
}
inline void check(cublasStatus_t status, const char* what) {
    if (status != CUBLAS_STATUS_SUCCESS) note(std::string(what) + ": cuBLAS error " + std::to_string((int)status));
}
inline void copy(void* to, const void* from, int64_t bytes, cudaMemcpyKind kind, const char* what) {
    if (!failed() && bytes) check(cudaMemcpy(to, from, bytes, kind), what);
}

// Everything runs on the default stream, where Jittor's own kernels run, in the order of the calls.
#if defined(__CUDACC__)
#define JLORA_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#else
#define JLORA_SHARED_MEMORY(name) unsigned char* name = emulator::shared_memory()
#endif
template <typename... Takes, typename... Given>
inline void launch(void (*kernel)(Takes...), dim3 blocks, int threads, size_t shared, Given... given) {
    if (failed() || !blocks.x || !blocks.y || !blocks.z) return;
#if defined(__CUDACC__)
    if (shared > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared), "shared memory");
    kernel<<<blocks, threads, shared>>>(static_cast<Takes>(given)...);
#else
    emulator::run(blocks, threads, shared, [&] { kernel(static_cast<Takes>(given)...); });
#endif
    check(cudaGetLastError(), "a kernel");
}
inline int blocks_for(int64_t items, int64_t each) { return (int)((items + each - 1) / each); }
// A thread for each of `count` items.
constexpr int each_threads = 256;
#define JLORA_EACH(kernel, count, ...) launch(kernel, dim3(blocks_for(count, each_threads)), each_threads, 0, __VA_ARGS__)

// Memory of the card that is used again from call to call and only grows.
template <typename T>
class Scratch {
public:
    T* of(int64_t count) {
        if (count > size_) {
            free();
            check(cudaMalloc((void**)&data_, count * sizeof(T)), "the card's memory");
            if (data_) size_ = count;
        }
        return data_;
    }
    void free() {
        if (data_) check(cudaFree(data_), "freeing memory");
        data_ = nullptr, size_ = 0;
    }

private:
    T* data_ = nullptr;
    int64_t size_ = 0;
};
// A copy of arrays of the host, for kernels that are launched next.
template <typename T>
inline const T* to_card(Scratch<T>& memory, const T* host, int64_t count) {
    T* there = memory.of(std::max<int64_t>(count, 1));
    copy(there, host, count * sizeof(T), cudaMemcpyHostToDevice, "a copy to the card");
    return there;
}

// Sums over the threads of a block, whose number is a multiple of 32; everyone gets the result.
__device__ inline float warp_sum(float x) {
    for (int far = 16; far; far >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, far);
    return x;
}
__device__ inline float warp_max(float x) {
    for (int far = 16; far; far >>= 1) x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, far));
    return x;
}
__device__ inline float block_sum(float x, float* room) {  // room: 33 floats of shared memory
    x = warp_sum(x);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x == 0) {
        float all = 0;
        for (int i = 0; i < (int)blockDim.x / 32; i++) all += room[i];
        room[32] = all;
    }
    __syncthreads();
    const float all = room[32];
    __syncthreads();
    return all;
}
__device__ inline float block_max(float x, float* room) {
    x = warp_max(x);
    if (threadIdx.x % 32 == 0) room[threadIdx.x / 32] = x;
    __syncthreads();
    if (threadIdx.x == 0) {
        float all = room[0];
        for (int i = 1; i < (int)blockDim.x / 32; i++) all = fmaxf(all, room[i]);
        room[32] = all;
    }
    __syncthreads();
    const float all = room[32];
    __syncthreads();
    return all;
}
}  // namespace jlora
