// Before each source that nvcc was to compile: what nvcc itself declares, on top of CUDA's own headers.
#pragma once
#define __shared__ static
// Kernels of two operators may have one name.
#define __global__ __attribute__((visibility("hidden")))
#define __device__
#define __launch_bounds__(...)
#define JLORA_CUDA_EMULATOR
#define THRUST_DEVICE_SYSTEM THRUST_DEVICE_SYSTEM_CPP
#include <cuda_runtime.h>
#include <algorithm>
#include <math.h>  // of C++: with its overloads in the global namespace
#include <type_traits>

namespace emulator {
// The card's memory is readable only between these (libraries.cc).
extern "C" void emulator_open();
extern "C" void emulator_close();
struct Open {
    Open() { emulator_open(); }
    ~Open() { emulator_close(); }
};
}  // namespace emulator
#include "../device.h"

namespace emulator {
struct Launch {
    dim3 blocks, threads;
    size_t shared;
    Launch(dim3 blocks, dim3 threads, size_t shared = 0, cudaStream_t = nullptr) : blocks(blocks), threads(threads), shared(shared) {}
    template <typename Body>
    void operator()(Body body) const {
        run(blocks, threads, shared, body, EMULATOR_BARRIERS);
    }
};
}  // namespace emulator

#define EMULATOR_NUMBERS typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>
template <EMULATOR_NUMBERS> inline std::common_type_t<A, B> max(A a, B b) { return a < b ? b : a; }
template <EMULATOR_NUMBERS> inline std::common_type_t<A, B> min(A a, B b) { return b < a ? b : a; }

#define EMULATOR_ATOMIC(name, changed) \
    template <typename T, typename V> \
    inline T name(T* at, V given) { const T old = *at, x = (T)given; *at = changed; return old; }
EMULATOR_ATOMIC(atomicAdd, old + x)
EMULATOR_ATOMIC(atomicMax, old < x ? x : old)
EMULATOR_ATOMIC(atomicMin, x < old ? x : old)
EMULATOR_ATOMIC(atomicAnd, old & x)
EMULATOR_ATOMIC(atomicOr, old | x)
EMULATOR_ATOMIC(atomicXor, old ^ x)
EMULATOR_ATOMIC(atomicExch, x)
template <typename T>
inline T atomicCAS(T* at, T expected, T next) {
    const T old = *at;
    if (old == expected) *at = next;
    return old;
}

template <typename To, typename From>
inline To emulator_bits(From x) {
    To y;
    std::memcpy(&y, &x, sizeof(To));
    return y;
}
inline int __float_as_int(float x) { return emulator_bits<int>(x); }
inline float __int_as_float(int x) { return emulator_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulator_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulator_bits<double>(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
inline double rsqrt(double x) { return 1 / sqrt(x); }
