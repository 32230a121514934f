// Where the structs that Python mirrors (structs.py) have their fields, for its check. Whoever includes this
// has included the structs.
#pragma once
#include <cstddef>
#include <string>
#include "native.h"

namespace jlora {
#define JLORA_FIELD(S, name) (std::string(" " #name " ") + std::to_string(offsetof(S, name)) + " " + std::to_string(sizeof(S::name)))
#define JLORA_STRUCT(S, name) ("\n" #name " " + std::to_string(sizeof(S)))

inline std::string layouts() {
    std::string text = JLORA_STRUCT(Array, Array) + JLORA_FIELD(Array, data) + JLORA_FIELD(Array, size)
        + JLORA_FIELD(Array, shape) + JLORA_FIELD(Array, dims);
#if !defined(__CUDACC__) && !defined(JLORA_CUDA_EMULATOR)
    using A = AdamWNumbers;
    text += JLORA_STRUCT(A, AdamWNumbers) + JLORA_FIELD(A, beta1) + JLORA_FIELD(A, rest1) + JLORA_FIELD(A, beta2)
        + JLORA_FIELD(A, rest2) + JLORA_FIELD(A, rate) + JLORA_FIELD(A, root2) + JLORA_FIELD(A, decay)
        + JLORA_FIELD(A, eps) + JLORA_FIELD(A, clip);
#endif
#if defined(JLORA_PRODUCTS)
#if defined(JLORA_TILES)
    using W = Weight;
    text += JLORA_STRUCT(W, Weight) + JLORA_FIELD(W, tiles) + JLORA_FIELD(W, n) + JLORA_FIELD(W, k)
        + JLORA_FIELD(W, stride) + JLORA_FIELD(W, scales) + JLORA_FIELD(W, kind);
#endif
    text += JLORA_STRUCT(Norm, Norm) + JLORA_FIELD(Norm, weight) + JLORA_FIELD(Norm, bias)
        + JLORA_FIELD(Norm, centred) + JLORA_FIELD(Norm, offset);
    using L = LinearSpec;
    text += JLORA_STRUCT(L, LinearSpec) + JLORA_FIELD(L, weight) + JLORA_FIELD(L, r) + JLORA_FIELD(L, blocks)
        + JLORA_FIELD(L, flags) + JLORA_FIELD(L, scale) + JLORA_FIELD(L, p) + JLORA_FIELD(L, trained);
    using J = JointSpec;
    text += JLORA_STRUCT(J, JointSpec) + JLORA_FIELD(J, count) + JLORA_FIELD(J, linears) + JLORA_FIELD(J, bias);
    using B = BlockSpec;
    text += JLORA_STRUCT(B, BlockSpec) + JLORA_FIELD(B, width) + JLORA_FIELD(B, heads) + JLORA_FIELD(B, key_heads)
        + JLORA_FIELD(B, head_size) + JLORA_FIELD(B, inner) + JLORA_FIELD(B, rotary)
        + JLORA_FIELD(B, neighbours) + JLORA_FIELD(B, grouped) + JLORA_FIELD(B, window) + JLORA_FIELD(B, scale)
        + JLORA_FIELD(B, cap) + JLORA_FIELD(B, activation) + JLORA_FIELD(B, gated) + JLORA_FIELD(B, eps)
        + JLORA_FIELD(B, norms) + JLORA_FIELD(B, whole) + JLORA_FIELD(B, qkv) + JLORA_FIELD(B, out)
        + JLORA_FIELD(B, up) + JLORA_FIELD(B, down) + JLORA_FIELD(B, given);
    using D = decode::Linear;
    text += JLORA_STRUCT(D, Linear) + JLORA_FIELD(D, kind) + JLORA_FIELD(D, weight) + JLORA_FIELD(D, n)
        + JLORA_FIELD(D, k) + JLORA_FIELD(D, bias) + JLORA_FIELD(D, branches);
    using S = decode::SlotBranch;
    text += JLORA_STRUCT(S, SlotBranch) + JLORA_FIELD(S, A) + JLORA_FIELD(S, B) + JLORA_FIELD(S, from)
        + JLORA_FIELD(S, rank) + JLORA_FIELD(S, reach) + JLORA_FIELD(S, narrow) + JLORA_FIELD(S, r)
        + JLORA_FIELD(S, blocks) + JLORA_FIELD(S, flags) + JLORA_FIELD(S, scale);
    using E = decode::Block;
    text += JLORA_STRUCT(E, Block) + JLORA_FIELD(E, before_attention) + JLORA_FIELD(E, after_attention)
        + JLORA_FIELD(E, before_mlp) + JLORA_FIELD(E, after_mlp) + JLORA_FIELD(E, queries) + JLORA_FIELD(E, keys)
        + JLORA_FIELD(E, qkv) + JLORA_FIELD(E, out) + JLORA_FIELD(E, in) + JLORA_FIELD(E, down)
        + JLORA_FIELD(E, rope) + JLORA_FIELD(E, window);
    using M = decode::Model;
    text += JLORA_STRUCT(M, Model) + JLORA_FIELD(M, layers) + JLORA_FIELD(M, C) + JLORA_FIELD(M, H)
        + JLORA_FIELD(M, G) + JLORA_FIELD(M, D) + JLORA_FIELD(M, inner) + JLORA_FIELD(M, eps) + JLORA_FIELD(M, tokens)
        + JLORA_FIELD(M, packed_tokens) + JLORA_FIELD(M, positions) + JLORA_FIELD(M, frequencies)
        + JLORA_FIELD(M, last) + JLORA_FIELD(M, activation) + JLORA_FIELD(M, gated) + JLORA_FIELD(M, ropes)
        + JLORA_FIELD(M, rotary) + JLORA_FIELD(M, neighbours) + JLORA_FIELD(M, long_from) + JLORA_FIELD(M, grouped)
        + JLORA_FIELD(M, whole) + JLORA_FIELD(M, amplitude) + JLORA_FIELD(M, embedding_scale) + JLORA_FIELD(M, scale)
        + JLORA_FIELD(M, cap) + JLORA_FIELD(M, narrow);
#endif
    return text;
}
#undef JLORA_FIELD
#undef JLORA_STRUCT
}  // namespace jlora
