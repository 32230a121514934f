// A card's threads on the processor: a kernel runs block by block, its threads taking turns at the barriers.
// Far too slow for anything but tests. The includer has dim3, and
// emulator::Open, while which exists the card's memory can be read.
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

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
struct Block {
    std::vector<ucontext_t> threads;
    std::vector<std::unique_ptr<char[]>> stacks;
    enum State { runs, at_warp, at_block, done };
    std::vector<State> state;
    ucontext_t main;
    unsigned running = 0;
    std::vector<uint64_t> exchanged;
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
inline dim3 place_of(unsigned t, dim3 size) { return dim3(t % size.x, t / size.x % size.y, t / size.x / size.y); }
// The threads of the block at blockIdx, as contexts between which the barriers change.
inline void run_block(int threads) {
    constexpr size_t stack = 128 << 10;
    while ((int)block.stacks.size() < threads) block.stacks.emplace_back(new char[stack]);
    block.exchanged.assign(threads, 0);
    std::memset(shared.data(), 0xFF, shared.size());  // NaN: what nobody has written shows
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
            moved = true, block.running = t, threadIdx = place_of(t, blockDim);
            swapcontext(&block.main, &block.threads[t]);
        }
        for (int w = 0; w < threads; w += 32) release(w, std::min(w + 32, threads), Block::at_warp);
        release(0, threads, Block::at_block);
    }
    for (int t = 0; t < threads; t++) if (block.state[t] != Block::done) std::abort();  // a barrier that some miss
}
// has_barriers: else each thread is a call, a thousand times faster.
inline void run(dim3 blocks, dim3 size, size_t bytes, std::function<void()> body, bool has_barriers = true) {
    const int threads = size.x * size.y * size.z;
    shared.resize(bytes + 256);
    const Open open;
    blockDim = size, gridDim = blocks;
    block.body = body;
    for (unsigned z = 0; z < blocks.z; z++)
        for (unsigned y = 0; y < blocks.y; y++)
            for (unsigned x = 0; x < blocks.x; x++) {
                blockIdx = dim3(x, y, z);
                if (has_barriers) run_block(threads);
                else for (int t = 0; t < threads; t++) threadIdx = place_of(t, size), body();
            }
}
// What the thread of the warp at `lane` has as its x.
template <typename T>
inline T from_lane(T x, unsigned lane) {
    static_assert(sizeof(T) <= 8, "at most eight bytes");
    const unsigned own = block.running;
    std::memcpy(&block.exchanged[own], &x, sizeof(T));
    barrier(Block::at_warp);
    std::memcpy(&x, &block.exchanged[own / 32 * 32 + lane], sizeof(T));
    barrier(Block::at_warp);
    return x;
}
inline unsigned lane() { return block.running % 32; }
}  // namespace emulator

inline void __syncthreads() { emulator::barrier(emulator::Block::at_block); }
inline void __syncwarp(unsigned = 0) { emulator::barrier(emulator::Block::at_warp); }
template <typename T>
inline T __shfl_xor_sync(unsigned, T x, int far) { return emulator::from_lane(x, emulator::lane() ^ far); }
template <typename T>
inline T __shfl_up_sync(unsigned, T x, unsigned far) {
    const unsigned lane = emulator::lane();
    return emulator::from_lane(x, lane < far ? lane : lane - far);
}
template <typename T>
inline T __shfl_sync(unsigned, T x, int lane) { return emulator::from_lane(x, lane % 32); }
