// The activations of an MLP and their slopes, sixteen numbers at a time.
#pragma once
#include "lanes.h"
#include "vector_math.h"

namespace jlora {
enum Activation : int64_t { silu, gelu_tanh };  // ACTIVATIONS in elementwise.py

// gelu_tanh: u = sqrt(2 / pi) * (x + 0.044715 x^3), and 0.5 (1 + tanh u) = sigmoid(2u)
JLORA_INLINE F16 activation16(int64_t kind, F16 x) {
    if (kind == silu) return x * sigmoid16(x);
    return x * sigmoid16(2.0f * 0.7978845608f * (x + 0.044715f * x * x * x));
}
JLORA_INLINE F16 activation_slope16(int64_t kind, F16 x) {
    if (kind == silu) {
        const F16 s = sigmoid16(x), y = x * s;
        return s + y - y * s;
    }
    const F16 du = 0.7978845608f * (1.0f + 3 * 0.044715f * x * x);
    const F16 s = sigmoid16(2.0f * 0.7978845608f * (x + 0.044715f * x * x * x));
    return s + x * 2.0f * s * (1.0f - s) * du;
}
// cap tanh(x / cap), and its slope by the result
JLORA_INLINE F16 soft_cap16(F16 x, float cap) { return cap * (2.0f * sigmoid16(x * (2.0f / cap)) - 1.0f); }
inline float soft_cap(float x, float cap) { return cap * (2.0f / (1.0f + fast_exp(x * (-2.0f / cap))) - 1.0f); }
template <typename T>
JLORA_INLINE T soft_cap_slope(T y, float cap) { return 1.0f - y * y * (1.0f / (cap * cap)); }
// Rotary embedding: a pair of numbers turned by an angle; with -sin it is turned back.
template <typename T>
JLORA_INLINE void rotate_pair(T& left, T& right, T cos, T sin) {
    const T l = left;
    left = l * cos - right * sin;
    right = right * cos + l * sin;
}
// As rotate_pair for 8 pairs of neighbours among 16 numbers; cos and sin: 8 numbers of 16, from `from` on.
JLORA_INLINE F16 rotate_neighbours(F16 x, F16 cos, F16 sin, int from) {
    static constexpr int32_t pairs[32] = {0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7,
        8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
    static constexpr int32_t others[16] = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
    static constexpr float signs[16] = {-1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1};
    const int32_t* own = pairs + 2 * from;
    return x * shuffle(cos, own) + load16(signs) * shuffle(x, others) * shuffle(sin, own);
}
// How queries and keys are turned: the first `size` numbers of a head, in halves or neighbour by neighbour.
struct Turn {
    int64_t size, neighbours;
    // cos, sin (size / 2)
    void operator()(float* x, const float* cos, const float* sin, float sign) const {
        const int64_t half = size / 2, apart = neighbours ? 1 : half, step = neighbours ? 2 : 1;
        for (int64_t j = 0; j < half; j++) rotate_pair(x[j * step], x[j * step + apart], cos[j], sign * sin[j]);
    }
};
}  // namespace jlora
