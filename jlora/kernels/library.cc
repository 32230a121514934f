// The library of jlora's operators: each takes its arrays and numbers as native.h says.
#include "native.h"
#include "attention.h"
#include "decode_attention.h"
#include "elementwise.h"
#include "topk.h"
#ifdef JLORA_ONEDNN
#include "decoder.h"
#include "lora.h"
#include "target_loss.h"
#endif

using namespace jlora;

// Attention: q (B, T, H, D), k and v (B, S, G, D), first and last (B,) -> out, lse; number: scale.
static AttentionShape attention_shape(const Array* in, double scale) {
    const int64_t *q = in[0].shape, *k = in[1].shape;
    return {q[0], q[1], k[1], q[2], k[2], q[3], (float)scale};
}
JLORA_OPERATOR(attention_forward_op) {
    attention_forward(attention_shape(in, number[0]), in[0].in(), in[1].in(), in[2].in(),
        in[3].as<int>(), in[4].as<int>(), out[0].out(), out[1].out());
}
// As above, then out, lse and d out -> dq, dk, dv.
JLORA_OPERATOR(attention_backward_op) {
    attention_backward(attention_shape(in, number[0]), in[0].in(), in[1].in(), in[2].in(),
        in[3].as<int>(), in[4].as<int>(), in[5].in(), in[6].in(), in[7].in(),
        out[0].out(), out[1].out(), out[2].out());
}

// Decoding; see decode_attention.h.
extern "C" int64_t padded_width(int64_t n) { return padded(n); }
JLORA_OPERATOR(turn_keys_op) {
    const int64_t* k = in[0].shape;
    turn_keys(in[0].in(), out[0].out(), k[0], k[1], k[2], k[3]);
}
// q, k, v, turned, values, owner, first, ancestors, addresses -> out, the addresses of k and v;
// number: T, steps, scale.
JLORA_OPERATOR(decode_attention_op) {
    const int64_t *q = in[0].shape, steps = number[1];
    const DecodeShape s{q[0], q[2], in[1].shape[2], q[3], (int64_t)number[0], steps, (float)number[2]};
    const int64_t* addresses = in[8].as<int64_t>();
    decode_attention(s, in[0].in(), in[1].in(), in[2].in(), in[3].in(), in[4].in(), in[5].as<int>(),
        in[6].as<int>(), in[7].as<int>(), in[7].shape[1], addresses, addresses + steps, out[0].out());
    out[1].as<int64_t>()[0] = (int64_t)in[1].data;
    out[1].as<int64_t>()[1] = (int64_t)in[2].data;
}

// Norms: x (..., n), weight (n,) -> y and what the backward pass needs; number: n, eps.
JLORA_OPERATOR(rms_forward_op) {
    const int64_t n = number[0];
    rms_forward(in[0].in(), in[1].in(), out[0].out(), out[1].out(), in[0].size / n, n, number[1]);
}
JLORA_OPERATOR(rms_backward_op) {
    const int64_t n = number[0];
    rms_backward(in[0].in(), in[1].in(), in[2].in(), in[3].in(), out[0].out(), in[0].size / n, n);
}
JLORA_OPERATOR(layer_forward_op) {
    const int64_t n = number[0];
    layer_forward(in[0].in(), in[1].in(), in[2].in(), out[0].out(), out[1].out(), out[2].out(),
        in[0].size / n, n, number[1]);
}
JLORA_OPERATOR(layer_backward_op) {
    const int64_t n = number[0];
    layer_backward(in[0].in(), in[1].in(), in[2].in(), in[3].in(), in[4].in(), out[0].out(),
        in[0].size / n, n);
}

// Activations, element by element.
JLORA_OPERATOR(swiglu_forward_op) {
    swiglu_forward(in[0].in(), in[1].in(), out[0].out(), in[0].size);
}
JLORA_OPERATOR(swiglu_backward_op) {
    swiglu_backward(in[0].in(), in[1].in(), in[2].in(), out[0].out(), out[1].out(), in[0].size);
}
JLORA_OPERATOR(gelu_forward_op) { gelu_forward(in[0].in(), out[0].out(), in[0].size); }
JLORA_OPERATOR(gelu_backward_op) {
    gelu_backward(in[0].in(), in[1].in(), out[0].out(), in[0].size);
}
// x (..., H, D), cos and sin (..., D / 2); number: H, D, sign.
JLORA_OPERATOR(rotate_op) {
    const int64_t H = number[0], D = number[1];
    rotate(in[0].in(), in[1].in(), in[2].in(), out[0].out(), in[0].size / (H * D), H, D, number[2]);
}
// number: p, seed.
JLORA_OPERATOR(dropout_op) {
    dropout(in[0].in(), out[0].out(), in[0].size, (uint64_t)number[1], number[0]);
}

// logits (rows, V), penalised and banned ids (rows, any) -> values, ids (rows, k); number: penalty.
JLORA_OPERATOR(topk_op) {
    Edits edits{in[1].as<int>(), in[2].as<int>(), in[1].shape[1], in[2].shape[1], (float)number[0]};
    topk(in[0].in(), in[0].shape[0], in[0].shape[1], edits, out[0].shape[1],
        out[0].out(), out[1].as<int>());
}

#ifdef JLORA_ONEDNN
static Blob blob(const Array& a) { return {a.as<uint8_t>(), a.size}; }
// Packed products; number: n, k, bf16 and, for packing, whether the weight is stored as (k, n).
extern "C" int64_t packed_bytes(int64_t n, int64_t k, int64_t bf16) { return packed_size(n, k, bf16); }
JLORA_OPERATOR(pack_op) {
    pack(in[0].in(), blob(out[0]), number[0], number[1], number[3] != 0, number[2] != 0);
}
JLORA_OPERATOR(unpack_op) {
    unpack(blob(in[0]), out[0].out(), number[0], number[1], number[3] != 0, number[2] != 0);
}
// x (..., k), packed, bias (n,) if there is one -> y (..., n); number[3]: whether there is.
JLORA_OPERATOR(multiply_op) {
    const int64_t n = number[0], k = number[1];
    const float* bias = number[3] != 0 ? in[2].in() : nullptr;
    multiply(in[0].in(), blob(in[1]), bias, out[0].out(), in[0].size / k, n, k, number[2] != 0);
}
// The same with a low-rank branch. number: r, blocks, flags, scale, p, seed, n, bf16 and a bias.
static LoraShape lora_shape(const Array& x, const Array& A, const double* number) {
    const int64_t in = A.shape[1];
    return {x.size / in, in, (int64_t)number[6], (int64_t)number[0], (int64_t)number[1],
            (int64_t)number[2], (float)number[3], number[4], (uint64_t)number[5]};
}
// x, packed, A, B, bias if there is one -> y, low (rows, rank)
JLORA_OPERATOR(lora_forward_op) {
    const LoraShape s = lora_shape(in[0], in[2], number);
    const int64_t bf16_and_bias = number[7];
    const float* bias = bf16_and_bias & 2 ? in[4].in() : nullptr;
    multiply(in[0].in(), blob(in[1]), bias, out[0].out(), s.rows, s.out, s.in, bf16_and_bias & 1);
    lora_forward(s, in[0].in(), in[2].in(), in[3].in(), out[0].out(), out[1].out());
}
// x, packed transposed, A, B, low, dy -> dx, dA, dB
JLORA_OPERATOR(lora_backward_op) {
    const LoraShape s = lora_shape(in[0], in[2], number);
    multiply(in[5].in(), blob(in[1]), nullptr, out[0].out(), s.rows, s.in, s.out, (int64_t)number[7] & 1);
    lora_backward(s, in[0].in(), in[2].in(), in[3].in(), in[4].in(), in[5].in(),
        out[0].out(), out[1].out(), out[2].out());
}
// hidden (N, C), head packed both ways, targets (N,) -> losses (N,), d hidden;
// number: V, smoothing, whether the gradient is wanted, bf16.
JLORA_OPERATOR(target_loss_op) {
    target_loss(in[0].in(), blob(in[1]), blob(in[2]), in[3].as<int>(), out[0].out(), out[1].out(),
        in[0].shape[0], in[0].shape[1], (int64_t)number[0], number[1], number[2] != 0, number[3] != 0);
}

// Decoding; see decoder.h. model, blocks, ids, positions, lengths (P,), addresses of blocks of keys
// and values (P,) -> hidden (P, C)
JLORA_OPERATOR(run_prompts_op) {
    run_prompts(*in[0].as<Model>(), in[1].as<Block>(), in[4].size, in[2].as<int>(), in[3].as<int>(),
        in[4].as<int>(), in[5].as<float*>(), out[0].out());
}
// model, blocks, ids, positions, addresses and lengths of prompts, table, lengths, addresses of slabs
// -> hidden (R, C); number: tokens of a slab.
JLORA_OPERATOR(run_step_op) {
    run_step(*in[0].as<Model>(), in[1].as<Block>(), in[2].size, in[2].as<int>(), in[3].as<int>(),
        in[4].as<float*>(), in[5].as<int>(), in[6].as<int>(), in[6].shape[1], in[7].as<int>(),
        in[8].as<float*>(), (int64_t)number[0], in[8].size, out[0].out());
}
#endif
