// CUDA on the processor, as far as jlora's kernels use it: memory of the card is memory.
#pragma once
#include <algorithm>
#include <cstdint>

#define __global__ inline
#define __device__
#define __host__
#define __shared__ static
#define __forceinline__ inline
#define __align__(n) alignas(n)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
using std::max;
using std::min;
template <typename A, typename B> inline int64_t min(A a, B b) { return (int64_t)a < (int64_t)b ? a : b; }
template <typename A, typename B> inline int64_t max(A a, B b) { return (int64_t)a > (int64_t)b ? a : b; }
namespace emulator { struct Open { Open() {} }; }
#include "../device.h"

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorMemoryAllocation = 2;
namespace emulator {
inline cudaError_t last = 0;
inline size_t most = (size_t)1 << 40;  // bytes of one piece of memory
}  // namespace emulator
extern "C" void emulator_memory(int64_t most) { emulator::most = most; }
inline cudaError_t cudaGetLastError() { return std::exchange(emulator::last, 0); }
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
inline const char* cudaGetErrorString(cudaError_t) { return "emulated"; }
inline cudaError_t cudaMalloc(void** p, size_t n) {
    *p = n < emulator::most ? std::malloc(n) : nullptr;
    if (*p) std::memset(*p, 0xFF, n);
    else emulator::last = cudaErrorMemoryAllocation;
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
inline cudaError_t cudaFree(void* p) { std::free(p); return 0; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t n, cudaMemcpyKind) { std::memcpy(to, from, n); return 0; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, int = 0) { std::memcpy(to, from, n); return 0; }
inline cudaError_t cudaMemset(void* to, int v, size_t n) { std::memset(to, v, n); return 0; }
inline cudaError_t cudaMemsetAsync(void* to, int v, size_t n, int = 0) { std::memset(to, v, n); return 0; }
inline cudaError_t cudaDeviceSynchronize() { return 0; }
