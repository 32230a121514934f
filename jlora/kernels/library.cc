// The library of jlora's operators: each takes its arrays and numbers as native.h says.
#include "operator.h"
#include "adamw.h"
#include "attention.h"
#include "elementwise.h"
#include "topk.h"
#if defined(JLORA_TILES) || defined(JLORA_ONEDNN)
#define JLORA_PRODUCTS
#include "block.h"
#include "decoder.h"
#include "head_topk.h"
#include "target_loss.h"
#endif
#include "layouts.h"

using namespace jlora;

extern "C" const char* struct_layouts() {
    static const std::string text = layouts();
    return text.c_str();
}

// Attention: q (..., H, D), k and v (..., G, D), sequences (n, 5) -> out, lse (H, rows); number: scale,
// cap, window, 0 where there is none.
static Batch batch(const Array* in, const double* number) {
    const int last = in[0].dims - 1;
    const int64_t H = in[0].shape[last - 1], D = in[0].shape[last], G = in[1].shape[last - 1];
    return {in[0].size / (H * D), H, G, D, in[3].shape[0],
        {(float)number[0], (float)number[1], (int64_t)number[2]}, in[3].as<int>()};
}
JLORA_OPERATOR(attention_forward_op) {
    attention_forward(batch(in, number), in[0].in(), in[1].in(), in[2].in(), out[0].out(), out[1].out());
}
// As above, then out, lse and d out -> dq, dk, dv.
JLORA_OPERATOR(attention_backward_op) {
    const Batch b = batch(in, number);
    attention_backward(b, in[0].in(), in[1].in(), in[2].in(), in[4].in(), in[5].in(), in[6].in(),
        in[1].size / (b.G * b.D), out[0].out(), out[1].out(), out[2].out());
}

// Norms: x (..., n), weight (n,) -> y and what the backward pass needs; number: n, eps, of RMSNorm what is
// added to the weight.
JLORA_OPERATOR(rms_forward_op) {
    const int64_t n = number[0];
    norm_forward({in[1].in(), nullptr, 0, number[2]}, in[0].in(), out[0].out(), nullptr, out[1].out(), in[0].size / n, n,
        number[1]);
}
// number: n, for each gradient of a parameter whether it is wanted; RMSNorm's offset.
static float* wanted(const Array& array, double flag) { return flag != 0 ? array.out() : nullptr; }
JLORA_OPERATOR(rms_backward_op) {
    const int64_t n = number[0];
    norm_backward({in[1].in(), nullptr, 0, number[2]}, in[0].in(), nullptr, in[2].in(), in[3].in(), out[0].out(),
        wanted(out[1], number[1]), nullptr, in[0].size / n, n);
}
JLORA_OPERATOR(layer_forward_op) {
    const int64_t n = number[0];
    norm_forward({in[1].in(), in[2].in(), 1, 0}, in[0].in(), out[0].out(), out[1].out(), out[2].out(), in[0].size / n, n,
        number[1]);
}
JLORA_OPERATOR(layer_backward_op) {
    const int64_t n = number[0];
    norm_backward({in[1].in(), nullptr, 1, 0}, in[0].in(), in[2].in(), in[3].in(), in[4].in(), out[0].out(),
        wanted(out[1], number[1]), wanted(out[2], number[2]), in[0].size / n, n);
}

// Rows of a table (n, C) by ids, and back: gradient of the rows -> of the table; ids outside give NaN and
// change nothing. Threads share the columns out, so that equal runs give equal bits.
JLORA_OPERATOR(embedding_op) {
    const int64_t n = in[0].shape[0], C = in[0].shape[1];
    #pragma omp parallel for
    for (int64_t i = 0; i < in[1].size; i++) {
        const int64_t id = in[1].as<int>()[i];
        if (id < 0 || id >= n) std::fill_n(out[0].out() + i * C, C, NAN);
        else std::copy_n(in[0].in() + id * C, C, out[0].out() + i * C);
    }
}
JLORA_OPERATOR(embedding_back_op) {
    const int64_t n = out[0].shape[0], C = out[0].shape[1];
    #pragma omp parallel for schedule(static)
    for (int64_t j = 0; j < n; j++) std::fill_n(out[0].out() + j * C, C, 0.0f);
    #pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < C; k += 32)
        for (int64_t i = 0; i < in[1].size; i++) {
            const int64_t id = in[1].as<int>()[i];
            if (id >= 0 && id < n) add_scaled(out[0].out() + id * C + k, 1.0f, in[0].in() + i * C + k, std::min<int64_t>(32, C - k));
        }
}

// values, gradient, numbers (AdamWNumbers) -> new values, m, v; number: whether it is loralib's variant.
JLORA_OPERATOR(adamw_op) {
    adamw(in[0].in(), in[1].in(), *in[2].as<AdamWNumbers>(), number[0] != 0, out[0].out(), out[1].out(), out[2].out(), in[0].size);
}

// Activations, element by element. number: which.
JLORA_OPERATOR(gated_forward_op) {
    gated_forward((int64_t)number[0], in[0].in(), in[1].in(), out[0].out(), in[0].size);
}
JLORA_OPERATOR(gated_backward_op) {
    gated_backward((int64_t)number[0], in[0].in(), in[1].in(), in[2].in(), out[0].out(), out[1].out(), in[0].size);
}
JLORA_OPERATOR(gelu_forward_op) { activation_forward(gelu_tanh, in[0].in(), out[0].out(), in[0].size); }
JLORA_OPERATOR(gelu_backward_op) {
    activation_backward(gelu_tanh, in[0].in(), in[1].in(), out[0].out(), in[0].size);
}
// x (..., H, D), cos and sin (..., R / 2); number: H, D, R, whether neighbours turn, sign.
JLORA_OPERATOR(rotate_op) {
    const int64_t H = number[0], D = number[1];
    rotate(in[0].in(), in[1].in(), in[2].in(), out[0].out(), in[0].size / (H * D), H, D,
        {(int64_t)number[2], (int64_t)number[3]}, number[4]);
}
// integer: seed, first row; number: p, width of a row.
JLORA_OPERATOR(dropout_op) {
    dropout(in[0].in(), out[0].out(), in[0].size, number[1], Seed(integer), number[0]);
}

// Edits of logits from six inputs: penalised ids and penalties, biased ids and biases, allowed bits, banned ids.
static Edits edits_of(const Array* in, bool restricted) {
    return {in[0].as<int>(), in[0].shape[1], in[1].in(), in[2].as<int>(), in[2].shape[1], in[3].in(),
        restricted ? in[4].as<uint32_t>() : nullptr, in[4].shape[1], in[5].as<int>(), in[5].shape[1]};
}
// values, ids (rows, k), and where there are draws (rows, 5) those of the drawn words, (rows,) each.
static Chosen chosen_of(const Array* draws, const Array* out) {
    if (!draws) return {out[0].shape[1], out[0].out(), out[1].as<int>(), nullptr, nullptr, nullptr};
    return {out[0].shape[1], out[0].out(), out[1].as<int>(), draws->as<Draw>(), out[2].out(), out[3].as<int>()};
}
// logits (rows, V), edits, draws -> see chosen_of; number: whether there are allowed bits, draws.
JLORA_OPERATOR(topk_op) {
    topk(in[0].in(), in[0].shape[0], in[0].shape[1], edits_of(in + 1, number[0] != 0), chosen_of(number[1] ? in + 7 : nullptr, out));
}

#ifdef JLORA_TILES
// 2: by AMX, 1: by AVX-512; without this function products are oneDNN's
extern "C" int64_t tile_products() { return tiles::permitted() ? JLORA_TILES : 0; }
#endif
#ifdef JLORA_PRODUCTS
// Packed weights: Python owns the memory, a `Weight` describes it.
extern "C" int64_t packed_bytes(int64_t n, int64_t k, int64_t kind) {
    const std::lock_guard<std::mutex> alone(running);
    return weight_bytes(n, k, kind);
}
extern "C" void pack_weight(const float* w, char* memory, Weight* out, int64_t n, int64_t k, int64_t kind, int64_t transposed) {
    const std::lock_guard<std::mutex> alone(running);
    *out = weight_in(memory, n, k, kind);
    pack(w, *out, transposed != 0);
}
#ifdef JLORA_TILES
// The same of GGUF's blocks of 4 bits, to int4; see int4.h.
extern "C" void pack_blocks(const uint8_t* blocks, int64_t stride, int64_t form, char* memory, Weight* out, int64_t n, int64_t k) {
    const std::lock_guard<std::mutex> alone(running);
    *out = weight_in(memory, n, k, int4_kind);
    int4::pack_blocks(blocks, stride, (int4::Form)form, *out);
}
#endif
extern "C" void unpack_weight(const Weight* w, float* out, int64_t transposed) {
    const std::lock_guard<std::mutex> alone(running);
    unpack(*w, out, transposed != 0);
}

// The first integer is the address of a weight.
static const Weight& weight_at(const int64_t* integer) { return *(const Weight*)(uintptr_t)integer[0]; }
#ifdef JLORA_TILES
// ids (...) -> rows of the weight (..., k); ids outside give NaN. integer: address of the weight
JLORA_OPERATOR(rows_op) {
    const Weight& w = weight_at(integer);
    #pragma omp parallel for
    for (int64_t i = 0; i < in[0].size; i++) {
        const int64_t n = in[0].as<int>()[i];
        float* row = out[0].out() + i * w.k;
        if (n < 0 || n >= w.n) std::fill_n(row, w.k, NAN);
        else unpack_row(w, n, row);
    }
}
#endif
// Stores 32 results, fewer at a row's end, with the bias if there is one.
struct StoreRows {
    float* y;
    int64_t width;
    const float* bias;
    void operator()(int64_t m, int64_t n, F16 left, F16 right) const {
        const int64_t count = std::min<int64_t>(32, width - n);
        F16 l{}, r{};
        if (bias) load_some(bias + n, l, r, count);
        store_some(y + m * width + n, left + l, right + r, count);
    }
};
// x (..., k), bias (n,) if there is one -> y (..., n). integer: address of the weight; number: back,
// whether there is a bias
JLORA_OPERATOR(multiply_op) {
    const Weight& w = weight_at(integer);
    static Buffer<uint16_t> memory;
    const bool back = number[0] != 0;
    const int64_t from = back ? w.n : w.k, to = back ? w.k : w.n;
    const Rows x = rows_in(memory, in[0].size / from, from);
    round_rows(in[0].in(), x);
    const float* bias = number[1] != 0 ? in[1].in() : nullptr;
    const StoreRows sink{out[0].out(), to, bias};
    if (back) product_back(x, {{&w}, 1}, sink); else product(x, {{&w}, 1}, sink);
}
#ifdef JLORA_TILES
// Trained weights: packed anew for each step, as an array. weight -> packed; number: n, k, transposed.
extern "C" int64_t trained_bytes(int64_t n, int64_t k) { return weight_bytes(n, k, bf16_kind) + line; }
extern "C" void describe_trained(void* packed, Weight* out, int64_t n, int64_t k) { *out = weight_of(packed, n, k); }
JLORA_OPERATOR(pack_op) {
    pack(in[0].in(), weight_of(out[0].data, number[0], number[1]), number[2] != 0);
}
// x (..., k), packed, bias (n,) if there is one -> y (..., n); number: n, k, whether there is a bias
JLORA_OPERATOR(trained_forward_op) {
    const Weight w = weight_of(in[1].data, number[0], number[1]);
    static Buffer<uint16_t> memory;
    const Rows x = rows_in(memory, in[0].size / w.k, w.k);
    round_rows(in[0].in(), x);
    product(x, {{&w}, 1}, StoreRows{out[0].out(), w.n, number[2] != 0 ? in[2].in() : nullptr});
}
// x, packed, dy -> dx, gradients of weight and bias; number: n, k, transposed, whether each is wanted
JLORA_OPERATOR(trained_backward_op) {
    const Weight w = weight_of(in[1].data, number[0], number[1]);
    static Buffer<uint16_t> for_x, for_dy;
    const int64_t rows = in[0].size / w.k;
    const Rows x = rows_in(for_x, rows, w.k), dy = rows_in(for_dy, rows, w.n);
    round_rows(in[2].in(), dy);
    if (float* dx = wanted(out[0], number[3])) product_back(dy, {{&w}, 1}, StoreRows{dx, w.k, nullptr});
    if (float* db = wanted(out[2], number[5])) sum_columns(dy, db);
    if (float* dw = wanted(out[1], number[4])) {
        round_rows(in[0].in(), x);
        weight_gradient(x, dy, number[2] != 0, dw);
    }
}
// hidden (N, C), targets (N,), packed head (V, C) -> losses, log_sums (N,); number: V, smoothing, cap
JLORA_OPERATOR(trained_loss_op) {
    const int64_t* shape = in[0].shape;
    target_loss(in[0].in(), weight_of(in[2].data, number[0], shape[1]), in[1].as<int>(), out[0].out(), out[1].out(),
        nullptr, shape[0], number[1], number[2]);
}
// As above, then log_sums and dlosses -> dhidden, dhead
JLORA_OPERATOR(trained_loss_back_op) {
    const int64_t* shape = in[0].shape;
    target_loss_back(in[0].in(), weight_of(in[2].data, number[0], shape[1]), in[1].as<int>(), in[3].in(), in[4].in(),
        out[0].out(), out[1].out(), shape[0], number[1], number[2]);
}
#endif
// A linear layer with its low-rank branch. integer: address of the weight, seed, first row; number: r,
// blocks, flags, scale, p, whether there is a bias.
struct LoraCall {
    const Weight& w;
    int64_t rows;
    LowRank low;
    LoraCall(const Array* in, const int64_t* integer, const double* number, float* dA, float* dB)
        : w(weight_at(integer)), rows(in[0].size / w.k),
          low(w.k, w.n, {{in[1].in(), in[2].in(), dA, dB, 0, w.n, (int64_t)number[0], (int64_t)number[1],
              (int64_t)number[2], (float)number[3], number[4], Seed(integer + 1)}}) {}
};
// x, A, B, bias if there is one -> y, low (rows, rank)
JLORA_OPERATOR(lora_forward_op) {
    LoraCall call(in, integer, number, nullptr, nullptr);
    static Buffer<uint16_t> memory;
    const Rows x = rows_in(memory, call.rows, call.w.k);
    round_rows(in[0].in(), x);
    call.low.forward(x, out[1].out());
    const StoreRows sink{out[0].out(), call.w.n, number[5] != 0 ? in[3].in() : nullptr};
    product(x, {{&call.w}, 1}, [&](int64_t m, int64_t n, F16 left, F16 right) {
        call.low.add(m, n, left, right);
        sink(m, n, left, right);
    });
}
// x, A, B, low, dy -> dx, dA, dB
JLORA_OPERATOR(lora_backward_op) {
    LoraCall call(in, integer, number, out[1].out(), out[2].out());
    static Buffer<uint16_t> for_x, for_dy;
    static Buffer<float> for_low;
    const Rows x = rows_in(for_x, call.rows, call.w.k), dy = rows_in(for_dy, call.rows, call.w.n);
    round_rows(in[0].in(), x);
    round_rows(in[4].in(), dy);
    call.low.backward(x, dy, in[3].in(), for_low);
    const StoreRows sink{out[0].out(), call.w.k, nullptr};
    product_back(dy, {{&call.w}, 1}, [&](int64_t m, int64_t k, F16 left, F16 right) {
        call.low.add_back(m, k, left, right);
        sink(m, k, left, right);
    });
}
// hidden (N, C), targets (N,) -> losses (N,), d hidden. integer: address of the head; number:
// smoothing, whether the gradient is wanted, cap.
JLORA_OPERATOR(target_loss_op) {
    std::vector<float> log_sums(in[0].shape[0]);
    target_loss(in[0].in(), weight_at(integer), in[1].as<int>(), out[0].out(), log_sums.data(),
        number[1] != 0 ? out[1].out() : nullptr, in[0].shape[0], number[0], number[2]);
}

// A gradient that is not wanted is an array of one number.
static float* wanted(const Array& array) { return wanted(array, array.size > 1); }
// Blocks. in: x, starts, cos and sin if there are, A and B of each branch; where `given`, weights and
// biases of the norms, biases of the joints that have some, trained weights packed.
// integer: address of the BlockSpec, seed, first row; number: branches, whether `saved` is kept, trained
// weights.
struct BlockArrays {
    const BlockSpec& s;
    BlockCall call;
    int64_t next = 2;  // input after all these
    BlockArrays(const Array* in, const int64_t* integer, const double* number)
        : s(*(const BlockSpec*)(uintptr_t)integer[0]), call{in[0].size / s.width, in[1].size - 1, in[0].in(), in[1].as<int>()} {
        call.seed = Seed(integer + 1);
        if (s.rotary) call.cos = in[next++].in(), call.sin = in[next++].in();
        for (int64_t i = 0; i < 2 * (int64_t)number[0]; i++) call.adapters.push_back(in[next++].in());
        std::copy_n(s.norms, norm_places, call.norms);
        for (int64_t i = 0; i < joints; i++) call.biases[i] = joint(i).bias;
        if (!s.given) return;
        for (Norm& norm : call.norms) {
            if (norm.weight) norm.weight = in[next++].in();
            if (norm.bias) norm.bias = in[next++].in();
        }
        for (int64_t i = 0; i < joints; i++) if (joint(i).bias) call.biases[i] = in[next++].in();
        for (int64_t i = 0; i < (int64_t)number[2]; i++) call.packed.push_back(in[next++].data);
    }
    const JointSpec& joint(int64_t i) const { return (&s.qkv)[i]; }
    // Gradients go to outputs in the order of the inputs, after that of x.
    void gradients(const Array* out) {
        int64_t o = 1;
        for (size_t i = 0; i < call.adapters.size(); i++) call.gradients.push_back(out[o++].out());
        if (!s.given) return;
        for (int64_t i = 0; i < norm_places; i++) {
            if (s.norms[i].weight) call.norm_gradients[2 * i] = wanted(out[o++]);
            if (s.norms[i].bias) call.norm_gradients[2 * i + 1] = wanted(out[o++]);
        }
        for (int64_t i = 0; i < joints; i++) if (joint(i).bias) call.bias_gradients[i] = wanted(out[o++]);
        for (size_t i = 0; i < call.packed.size(); i++) call.weight_gradients.push_back(wanted(out[o++]));
    }
};
extern "C" int64_t saved_bytes(const BlockSpec* s, int64_t rows) { return Saved(nullptr, *s, rows).bytes; }
static Buffer<char> block_memory;
// -> y, saved
JLORA_OPERATOR(block_forward_op) {
    const BlockArrays all(in, integer, number);
    const int64_t rows = all.call.rows;
    char* memory = number[1] != 0 ? out[1].as<char>() : block_memory.of(saved_bytes(&all.s, rows));
    Block(all.s, all.call).forward(Saved(memory, all.s, rows), out[0].out());
}
// As above, then saved and dy -> gradients of x, of A and B of each branch and of what was given
JLORA_OPERATOR(block_backward_op) {
    BlockArrays all(in, integer, number);
    const BlockSpec& s = all.s;
    const int64_t rows = all.call.rows;
    all.gradients(out);
    Block block(s, all.call);
    const bool kept = number[1] != 0;
    const Saved saved(kept ? in[all.next].as<char>() : block_memory.of(saved_bytes(&s, rows)), s, rows);
    static Buffer<float> again;
    if (!kept) block.forward(saved, again.of(rows * s.width));
    block.backward(saved, in[all.next + 1].in(), wanted(out[0]));
}

// Decoding; see decoder.h. model, blocks, then of all tokens ids, positions and slots; of pieces of prompts
// addresses of blocks of keys and values, lengths, tokens before and sizes of the blocks; of rows addresses and
// lengths of prompts, table, lengths; addresses of slabs; wanted tokens (W,) -> hidden (W, C); number: tokens of a slab.
JLORA_OPERATOR(run_rows_op) {
    const decode::Pieces pieces{in[6].size, in[5].as<char*>(), in[6].as<int>(), in[7].as<int>(), in[8].as<int>()};
    const decode::Step step{in[10].size, in[9].as<char*>(), in[10].as<int>(), in[11].as<int>(), in[11].shape[1],
        in[12].as<int>(), in[13].as<char*>(), (int64_t)number[0], in[13].size};
    decode::run_rows(*in[0].as<decode::Model>(), in[1].as<decode::Block>(), in[2].size, in[2].as<int>(), in[3].as<int>(),
        in[4].as<int>(), pieces, step, in[14].as<int>(), in[14].size, out[0].out());
}
// A head (V, C). integer: its address, and V if it is of floats, 0 if it is packed.
static decode::Linear head_of(const int64_t* integer, int64_t C) {
    const void* address = (const void*)(uintptr_t)integer[0];
    if (integer[1]) return {decode::Linear::rows_first, address, integer[1], C, nullptr, nullptr};
    return {decode::Linear::packed, address, weight_at(integer).n, C, nullptr, nullptr};
}
// hidden (rows, C), edits, draws -> see chosen_of. integer: a head; number: cap of the logits, whether there are
// allowed bits, draws.
JLORA_OPERATOR(head_topk_op) {
    head_topk(in[0].in(), in[0].shape[0], head_of(integer, in[0].shape[1]), edits_of(in + 1, number[1] != 0),
        chosen_of(number[2] ? in + 7 : nullptr, out), number[0]);
}
// hidden (rows, C) -> logits (rows, V). integer: a head; number: cap of the logits.
JLORA_OPERATOR(head_logits_op) {
    head_logits(in[0].in(), in[0].shape[0], head_of(integer, in[0].shape[1]), out[0].out(), number[0]);
}
// hidden (rows, C), targets (rows,) -> log-probabilities (rows,). integer: a head; number: cap of the logits.
JLORA_OPERATOR(head_logprobs_op) {
    head_logprobs(in[0].in(), in[0].shape[0], head_of(integer, in[0].shape[1]), in[1].as<int>(), out[0].out(), number[0]);
}
#endif

#if defined(JLORA_PROFILE)
// A line for each part: its seconds, operations, calls and name; and all are forgotten.
extern "C" const char* profile_lines() {
    static std::string text;
    text.clear();
    for (const auto& [name, part] : profile::times())
        text += std::to_string(part.seconds) + " " + std::to_string(part.operations) + " " + std::to_string(part.calls)
            + " " + name + "\n";
    profile::times().clear();
    return text.c_str();
}
#if defined(JLORA_PRODUCTS)
// Rows by a weight n x k or, `back`, by its transpose, `times` times, without doing anything with the results.
extern "C" void bare_product(int64_t weight, int64_t rows, int64_t back, int64_t times) {
    const Weight& w = *(const Weight*)(uintptr_t)weight;
    static Buffer<uint16_t> memory;
    const int64_t width = back ? w.n : w.k;
    const Rows x = rows_in(memory, rows, width);
    std::fill_n(x.data, Rows::numbers(rows, width), bf16_of(1.0f));
    const auto sink = [](int64_t, int64_t, F16, F16) {};
    for (int64_t i = 0; i < times; i++)
        if (back) product_back(x, {{&w}, 1}, sink); else product(x, {{&w}, 1}, sink);
}
#endif
#endif
