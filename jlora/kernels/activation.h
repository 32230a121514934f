// The activations of an MLP and their slopes, sixteen numbers at a time.
#pragma once
#include "lanes.h"

namespace jlora {
enum Activation : int64_t { silu, gelu_tanh };  // ACTIVATIONS in block.py

// gelu_tanh: u = sqrt(2 / pi) * (x + 0.044715 x^3), and 0.5 (1 + tanh u) = sigmoid(2u)
inline F16 activation16(int64_t kind, F16 x) {
    if (kind == silu) return x * sigmoid16(x);
    return x * sigmoid16(2.0f * 0.7978845608f * (x + 0.044715f * x * x * x));
}
inline F16 activation_slope16(int64_t kind, F16 x) {
    if (kind == silu) {
        const F16 s = sigmoid16(x);
        return s + x * s * (1.0f - s);
    }
    const F16 du = 0.7978845608f * (1.0f + 3 * 0.044715f * x * x);
    const F16 s = sigmoid16(2.0f * 0.7978845608f * (x + 0.044715f * x * x * x));
    return s + x * 2.0f * s * (1.0f - s) * du;
}
// Rotary embedding: a pair of numbers turned by an angle; with -sin it is turned back.
template <typename T>
inline void rotate_pair(T& left, T& right, T cos, T sin) {
    const T l = left;
    left = l * cos - right * sin;
    right = right * cos + l * sin;
}
}  // namespace jlora
