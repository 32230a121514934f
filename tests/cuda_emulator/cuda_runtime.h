// CUDA on the processor, as far as jlora's kernels use it: memory of the card is memory, and a kernel runs
// block by block, its threads taking turns at the barriers. Far too slow for anything but tests.
#pragma once
#include <ucontext.h>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

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
inline dim3 threadIdx, blockIdx, blockDim, gridDim;
using std::max;
using std::min;
template <typename A, typename B> inline int64_t min(A a, B b) { return (int64_t)a < (int64_t)b ? a : b; }
template <typename A, typename B> inline int64_t max(A a, B b) { return (int64_t)a > (int64_t)b ? a : b; }

namespace emulator {
struct Block {
    std::vector<ucontext_t> threads;
    std::vector<std::unique_ptr<char[]>> stacks;
    enum State { runs, at_warp, at_block, done };
    std::vector<State> state;
    ucontext_t main;
    unsigned running = 0;
    std::vector<float> exchanged;
    std::function<void()> body;
};
inline Block block;
inline std::vector<unsigned char> shared;
inline unsigned char* shared_memory() { return (unsigned char*)(((uintptr_t)shared.data() + 127) / 128 * 128); }
inline void start() {
    block.body();
    block.state[block.running] = Block::done;
    setcontext(&block.main);
}
// Until all threads of the warp, or of the block, that still run have come here.
inline void barrier(Block::State kind) {
    block.state[block.running] = kind;
    swapcontext(&block.threads[block.running], &block.main);
}
inline void release(int from, int to, Block::State kind) {
    for (int t = from; t < to; t++) if (block.state[t] != kind && block.state[t] != Block::done) return;
    for (int t = from; t < to; t++) if (block.state[t] == kind) block.state[t] = Block::runs;
}
inline void run(dim3 blocks, int threads, size_t bytes, std::function<void()> body) {
    constexpr size_t stack = 128 << 10;
    shared.resize(bytes + 256);
    blockDim = dim3(threads), gridDim = blocks;
    block.body = body;
    while ((int)block.stacks.size() < threads) block.stacks.emplace_back(new char[stack]);
    block.exchanged.assign(threads, 0.0f);
    for (unsigned z = 0; z < blocks.z; z++)
    for (unsigned y = 0; y < blocks.y; y++)
    for (unsigned x = 0; x < blocks.x; x++) {
        std::memset(shared.data(), 0xFF, shared.size());  // NaN: what nobody has written shows
        blockIdx = dim3(x, y, z);
        block.threads.assign(threads, ucontext_t{});
        block.state.assign(threads, Block::runs);
        for (int t = 0; t < threads; t++) {
            getcontext(&block.threads[t]);
            block.threads[t].uc_stack.ss_sp = block.stacks[t].get();
            block.threads[t].uc_stack.ss_size = stack;
            makecontext(&block.threads[t], start, 0);
        }
        for (bool moved = true; moved;) {
            moved = false;
            for (int t = 0; t < threads; t++) {
                if (block.state[t] != Block::runs) continue;
                moved = true, block.running = t, threadIdx = dim3(t);
                swapcontext(&block.main, &block.threads[t]);
            }
            for (int w = 0; w < threads; w += 32) release(w, min(w + 32, threads), Block::at_warp);
            release(0, threads, Block::at_block);
        }
        for (int t = 0; t < threads; t++) if (block.state[t] != Block::done) std::abort();  // a barrier that some miss
    }
}
}  // namespace emulator

inline void __syncthreads() { emulator::barrier(emulator::Block::at_block); }
inline void __syncwarp() { emulator::barrier(emulator::Block::at_warp); }
template <typename T>
inline T __shfl_xor_sync(unsigned, T x, int far) {
    static_assert(sizeof(T) == 4, "four bytes");
    const unsigned own = threadIdx.x;
    std::memcpy(&emulator::block.exchanged[own], &x, 4);
    __syncwarp();
    T result;
    std::memcpy(&result, &emulator::block.exchanged[own / 32 * 32 + ((own % 32) ^ far)], 4);
    __syncwarp();
    return result;
}

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
