// The library of jlora's operators on an NVIDIA card. It has the names and arguments of ../library.cc, as far
// as it goes; arrays of Jittor's graph are on the card, those of `native.run` on the host.
#include <utility>
#include "block.h"
#include "decoder.h"
#include "head.h"
#define JLORA_PRODUCTS
#define JLORA_TILES 3
#include "../layouts.h"
#include "../operator.h"

using namespace jlora;

extern "C" const char* struct_layouts() {
    static const std::string text = layouts();
    return text.c_str();
}
// What went wrong in this thread since it asked last, or null; the text stays until it asks again.
extern "C" const char* gpu_failure() {
    static thread_local std::string text;
    text = std::exchange(failure(), {});
    return text.empty() ? nullptr : text.c_str();
}
extern "C" void* gpu_allocate(int64_t bytes) {
    void* memory = nullptr;
    check(cudaMalloc(&memory, std::max<int64_t>(bytes, 1)), "the card's memory");
    return memory;
}
extern "C" void gpu_free(void* memory) { cudaFree(memory); }
extern "C" void gpu_copy(void* to, const void* from, int64_t bytes, int64_t back) {
    copy(to, from, bytes, back ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice, "a copy");
}

extern "C" int64_t packed_bytes(int64_t n, int64_t k, int64_t kind) { return bytes_of(n, k, kind); }
extern "C" void pack_weight(const float* w, char* memory, Weight* out, int64_t n, int64_t k, int64_t kind, int64_t transposed) {
    const std::lock_guard<std::mutex> alone(running);
    Scratch<float> plain;  // not kept: the largest weight, in float32, has gigabytes
    *out = weight_in(memory, n, k, kind);
    const Plain from{to_card(plain, w, n * k), n, k, transposed != 0};
    if (kind == int4_kind) JLORA_EACH(pack_int4_kernel, n * k / group, from, *out);
    else launch(kind == int8_kind ? pack_int8_kernel : pack_bf16_kernel, dim3(n), each_threads, 0, from, *out);
    plain.free();
}
extern "C" void pack_blocks(const uint8_t* blocks, int64_t stride, int64_t form, char* memory, Weight* out, int64_t n, int64_t k) {
    const std::lock_guard<std::mutex> alone(running);
    Scratch<uint8_t> rows;
    *out = weight_in(memory, n, k, int4_kind);
    JLORA_EACH(take_blocks_kernel, n * k / group, to_card(rows, blocks, n * stride), stride, form, *out);
    rows.free();
}
extern "C" void unpack_weight(const Weight* w, float* out, int64_t transposed) {
    const std::lock_guard<std::mutex> alone(running);
    Scratch<float> plain;
    float* there = plain.of(w->n * w->k);
    launch(unpack_kernel, dim3(w->n), each_threads, 0, *w, there, transposed != 0);
    copy(out, there, w->n * w->k * sizeof(float), cudaMemcpyDeviceToHost, "a copy");
    plain.free();
}
static const Weight& weight_at(const int64_t* integer) { return *(const Weight*)(uintptr_t)integer[0]; }

// x (..., k), bias (n,) if there is one -> y (..., n). integer: address of the weight; number: back,
// whether there is a bias
JLORA_OPERATOR(multiply_op) {
    static Scratch<bf16> memory;
    const Weight& w = weight_at(integer);
    const bool back = number[0] != 0;
    const int64_t from = back ? w.n : w.k, to = back ? w.k : w.n, rows = in[0].size / from;
    const Matrix<bf16> x(memory.of(in[0].size), rows, from);
    round(in[0].in(), x.data, in[0].size);
    product(x, false, matrix_of(w), !back, Matrix<float>(out[0].out(), rows, to));
    if (number[1] != 0) JLORA_EACH(add_bias_kernel, out[0].size, out[0].out(), to, to, in[1].in(), out[0].size);
}
// A linear layer with its low-rank branch, as in ../library.cc.
static Branch branch_at(const Array* in, const Weight& w, const int64_t* integer, const double* number, float* dA, float* dB) {
    return {in[1].in(), in[2].in(), dA, dB, w.k, w.n, (int64_t)number[0], (int64_t)number[1], (int64_t)number[2], (float)number[3],
        number[4], Seed(integer + 1)};
}
JLORA_OPERATOR(lora_forward_op) {
    static Scratch<bf16> memory;
    const Weight& w = weight_at(integer);
    const Matrix<bf16> x(memory.of(in[0].size), in[0].size / w.k, w.k);
    const Matrix<float> y(out[0].out(), x.rows, w.n);
    round(in[0].in(), x.data, in[0].size);
    product(x, false, matrix_of(w), true, y);
    LowRank(branch_at(in, w, integer, number, nullptr, nullptr)).forward(x, out[1].out(), y);
    if (number[5] != 0) JLORA_EACH(add_bias_kernel, out[0].size, y.data, w.n, w.n, in[3].in(), out[0].size);
}
JLORA_OPERATOR(lora_backward_op) {
    static Scratch<bf16> for_x, for_dy;
    const Weight& w = weight_at(integer);
    const int64_t rows = in[0].size / w.k;
    const Matrix<bf16> x(for_x.of(in[0].size), rows, w.k), dy(for_dy.of(in[4].size), rows, w.n);
    const Matrix<float> dx(out[0].out(), rows, w.k);
    round(in[0].in(), x.data, in[0].size), round(in[4].in(), dy.data, in[4].size);
    product(dy, false, matrix_of(w), false, dx);
    LowRank(branch_at(in, w, integer, number, out[1].out(), out[2].out())).backward(x, dy, (float*)in[3].data, dx);
}
// integer: seed, first row; number: p, width of a row.
JLORA_OPERATOR(dropout_op) {
    const Dropout drop(number[0], integer[0], integer[1] * (int64_t)number[1]);
    JLORA_EACH(dropout_kernel<float>, in[0].size, in[0].in(), out[0].out(), drop, in[0].size);
}
// hidden (N, C), targets (N,) -> losses (N,), d hidden. integer: address of the head; number: smoothing,
// whether the gradient is wanted, cap.
JLORA_OPERATOR(target_loss_op) {
    target_loss(in[0].in(), weight_at(integer), in[1].as<int>(), out[0].out(), number[1] != 0 ? out[1].out() : nullptr,
        in[0].shape[0], (float)number[0], (float)number[2]);
}

// Blocks; the arrays and numbers of ../library.cc, where norms and biases always come with the call.
static float* wanted(const Array& array) { return array.size > 1 ? array.out() : nullptr; }
struct BlockArrays {
    const BlockSpec& s;
    BlockCall call{};
    int64_t next = 2;
    BlockArrays(const Array* in, const int64_t* integer, const double* number) : s(*(const BlockSpec*)(uintptr_t)integer[0]) {
        call.rows = in[0].size / s.width, call.sequences = in[1].size - 1, call.x = in[0].in(), call.starts = in[1].as<int>();
        call.seed = Seed(integer + 1);
        if (s.rotary) call.cos = in[next++].in(), call.sin = in[next++].in();
        for (int64_t i = 0; i < 2 * (int64_t)number[0]; i++) call.adapters.push_back(in[next++].in());
        call.norm1 = s.norms[0], call.norm2 = s.norms[2];
        for (Norm* norm : {&call.norm1, &call.norm2}) {
            norm->weight = in[next++].in();
            if (norm->bias) norm->bias = in[next++].in();
        }
        for (int64_t i = 0; i < joints; i++) if (joint(i).bias) call.biases[i] = in[next++].in();
    }
    const JointSpec& joint(int64_t i) const { return (&s.qkv)[i]; }
    void gradients(const Array* out) {
        int64_t o = 1;
        for (size_t i = 0; i < call.adapters.size(); i++) call.gradients.push_back(out[o++].out());
        for (int64_t i = 0; i < 4; i += 2) {
            call.norm_gradients[i] = wanted(out[o++]);
            if (s.norms[0].bias) call.norm_gradients[i + 1] = wanted(out[o++]);
        }
        for (int64_t i = 0; i < joints; i++) if (joint(i).bias) call.bias_gradients[i] = wanted(out[o++]);
    }
};
extern "C" int64_t saved_bytes(const BlockSpec* s, int64_t rows) { return Saved(nullptr, *s, rows).bytes; }
static unsigned char* memory_again(const BlockSpec& s, int64_t rows) {
    static Scratch<unsigned char> memory;
    return memory.of(Saved(nullptr, s, rows).bytes);
}
JLORA_OPERATOR(block_forward_op) {
    BlockArrays all(in, integer, number);
    unsigned char* memory = number[1] != 0 ? out[1].as<unsigned char>() : memory_again(all.s, all.call.rows);
    Block(all.s, all.call).forward(Saved(memory, all.s, all.call.rows), out[0].out());
}
JLORA_OPERATOR(block_backward_op) {
    static Scratch<float> again;
    BlockArrays all(in, integer, number);
    all.gradients(out);
    const bool kept = number[1] != 0;
    unsigned char* memory = kept ? in[all.next].as<unsigned char>() : memory_again(all.s, all.call.rows);
    const Saved saved(memory, all.s, all.call.rows);
    Block block(all.s, all.call);
    if (!kept) block.forward(saved, again.of(all.call.rows * all.s.width));
    block.backward(saved, in[all.next + 1].in(), wanted(out[0]));
}

// Decoding: arrays of the host, but for what addresses say; see ../library.cc.
JLORA_OPERATOR(run_prompts_op) {
    decode::run_prompts(*in[0].as<decode::Model>(), in[1].as<decode::Block>(), in[4].size, in[2].as<int>(), in[3].as<int>(),
        in[4].as<int>(), in[5].as<int>(), in[6].as<bf16*>(), out[0].out());
}
JLORA_OPERATOR(run_step_op) {
    decode::run_step(*in[0].as<decode::Model>(), in[1].as<decode::Block>(), in[2].size, in[2].as<int>(), in[3].as<int>(),
        in[4].as<bf16*>(), in[5].as<int>(), in[6].as<int>(), in[6].shape[1], in[7].as<int>(), in[8].as<bf16*>(), (int64_t)number[0],
        in[8].size, out[0].out());
}
JLORA_OPERATOR(head_topk_op) {
    static Scratch<float> for_hidden, for_values;
    static Scratch<bf16> for_rounded;
    static Scratch<int> for_ids, for_edits;
    const Weight& head = weight_at(integer);
    const int64_t rows = in[0].shape[0], k = out[0].shape[1];
    bf16* hidden = for_rounded.of(rows * head.k);
    round(to_card(for_hidden, in[0].in(), rows * head.k), hidden, rows * head.k);
    std::vector<int> edits(in[1].as<int>(), in[1].as<int>() + in[1].size);
    edits.insert(edits.end(), in[2].as<int>(), in[2].as<int>() + in[2].size);
    const int* there = to_card(for_edits, edits.data(), edits.size());
    float* values = for_values.of(rows * k);
    int* ids = for_ids.of(rows * k);
    head_topk(hidden, rows, head, {there, there + in[1].size, in[1].shape[1], in[2].shape[1], (float)number[0]}, k, (float)number[1],
        values, ids);
    copy(out[0].data, values, rows * k * 4, cudaMemcpyDeviceToHost, "a copy from the card");
    copy(out[1].data, ids, rows * k * 4, cudaMemcpyDeviceToHost, "a copy from the card");
}
