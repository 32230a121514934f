// The parts of NVIDIA's library cub that Jittor's operators use: the whole-array ones at once, those of a block
// by its first thread. Found as cccl/cub/cub.cuh, as in CUDA 13.
#pragma once
#include <algorithm>
#include <cstddef>
#include <iterator>
#include <numeric>
#include <vector>

namespace cub {
template <typename Key, typename Value> struct KeyValuePair { Key key; Value value; };

template <typename T, int Threads>
struct BlockReduce {
    struct TempStorage { T of[Threads]; };
    TempStorage& room;
    explicit BlockReduce(TempStorage& room) : room(room) {}
    // The result is the first thread's; others get what they gave.
    template <typename Join>
    T Reduce(T x, Join join) {
        room.of[threadIdx.x] = x;
        __syncthreads();
        if (threadIdx.x == 0) for (int i = 1; i < Threads; i++) x = join(x, room.of[i]);
        __syncthreads();
        return x;
    }
    T Sum(T x) { return Reduce(x, [](T a, T b) { return a + b; }); }
};

template <typename T, int Threads>
struct BlockScan {
    struct TempStorage { T of[Threads]; };
    TempStorage& room;
    explicit BlockScan(TempStorage& room) : room(room) {}
    template <int Items>
    void InclusiveSum(T (&from)[Items], T (&to)[Items]) {
        std::partial_sum(from, from + Items, to);
        room.of[threadIdx.x] = to[Items - 1];
        __syncthreads();
        T before = 0;
        for (unsigned i = 0; i < threadIdx.x; i++) before += room.of[i];
        __syncthreads();
        for (T& x : to) x += before;
    }
};

// The first call of each asks for the size of its scratch memory.
struct DeviceScan {
    template <typename From, typename To>
    static cudaError_t InclusiveSum(void* room, size_t& bytes, From from, To to, int count) {
        if (!room) return bytes = 1, cudaSuccess;
        emulator::Open open;
        std::partial_sum(from, from + count, to);
        return cudaSuccess;
    }
};
struct DeviceSelect {
    template <typename From, typename Flags, typename To, typename Count>
    static cudaError_t Flagged(void* room, size_t& bytes, From from, Flags flags, To to, Count found, int count) {
        if (!room) return bytes = 1, cudaSuccess;
        emulator::Open open;
        *found = 0;
        for (int i = 0; i < count; i++) if (flags[i]) to[(*found)++] = from[i];
        return cudaSuccess;
    }
};
struct DeviceSegmentedReduce {
    template <typename T, typename Before, typename Offsets>
    static cudaError_t best(void* room, size_t& bytes, const T* x, KeyValuePair<int, T>* out, int count, Offsets from, Offsets to, Before before) {
        if (!room) return bytes = 1, cudaSuccess;
        emulator::Open open;
        for (int s = 0; s < count; s++) {
            const T* first = x + from[s];
            const T* found = first;
            for (const T* p = first; p < x + to[s]; p++) if (before(*p, *found)) found = p;
            out[s] = {(int)(found - first), *found};
        }
        return cudaSuccess;
    }
    template <typename T, typename Offsets>
    static cudaError_t ArgMax(void* room, size_t& bytes, const T* x, KeyValuePair<int, T>* out, int count, Offsets from, Offsets to) {
        return best(room, bytes, x, out, count, from, to, [](T a, T b) { return a > b; });
    }
    template <typename T, typename Offsets>
    static cudaError_t ArgMin(void* room, size_t& bytes, const T* x, KeyValuePair<int, T>* out, int count, Offsets from, Offsets to) {
        return best(room, bytes, x, out, count, from, to, [](T a, T b) { return a < b; });
    }
};
struct DeviceSegmentedRadixSort {
    template <typename T, typename V, typename W, typename Before, typename Offsets>
    static cudaError_t sort(void* room, size_t& bytes, const T* keys, T* sorted, const V* values, W* moved, int count, Offsets from, Offsets to, Before before) {
        if (!room) return bytes = 1, cudaSuccess;
        emulator::Open open;
        for (int s = 0; s < count; s++) {
            std::vector<int> order(to[s] - from[s]);
            std::iota(order.begin(), order.end(), from[s]);
            std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return before(keys[a], keys[b]); });
            for (size_t i = 0; i < order.size(); i++)
                sorted[from[s] + i] = keys[order[i]], moved[from[s] + i] = values[order[i]];
        }
        return cudaSuccess;
    }
    template <typename T, typename V, typename W, typename Offsets>
    static cudaError_t SortPairs(void* room, size_t& bytes, const T* keys, T* sorted, const V* values, W* moved, int, int count, Offsets from, Offsets to) {
        return sort(room, bytes, keys, sorted, values, moved, count, from, to, [](T a, T b) { return a < b; });
    }
    template <typename T, typename V, typename W, typename Offsets>
    static cudaError_t SortPairsDescending(void* room, size_t& bytes, const T* keys, T* sorted, const V* values, W* moved, int, int count, Offsets from, Offsets to) {
        return sort(room, bytes, keys, sorted, values, moved, count, from, to, [](T a, T b) { return a > b; });
    }
};
}  // namespace cub
