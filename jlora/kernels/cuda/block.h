// A whole transformer block, forward and backward, over a stream of tokens; what ../block.h says of it
// holds here, but that products are cuBLAS's, and that all arrays are on the card.
#pragma once
#include <vector>
#include "attention.h"
#include "lora.h"

namespace jlora {
// What Python hands over; the same structs as in ../block.h.
struct LinearSpec {
    const Weight* weight;
    int64_t r, blocks, flags;
    double scale, p;
    int64_t trained;
};
struct JointSpec {
    int64_t count;
    LinearSpec linears[3];
    const float* bias;  // null: there is none
    int64_t outputs() const {
        int64_t sum = 0;
        for (int64_t i = 0; i < count; i++) sum += linears[i].weight->n;
        return sum;
    }
    int64_t rank() const {
        int64_t sum = 0;
        for (int64_t i = 0; i < count; i++) sum += linears[i].r * __builtin_popcountll(linears[i].flags);
        return sum;
    }
};
constexpr int64_t joints = 4;
struct BlockSpec {
    int64_t width, heads, key_heads, head_size, inner, rotary, neighbours, grouped, window;
    double scale, cap;
    int64_t activation, gated;
    double eps;
    Norm norms[6];           // the first and the third are there; of the others Python has seen that they are not
    int64_t whole;
    JointSpec qkv, out, up, down;
    int64_t given;
    int64_t qkv_width() const { return (heads + 2 * key_heads) * head_size; }
    int64_t up_width() const { return inner * (gated ? 2 : 1); }
};
// The arrays of one call. A sequence i is rows starts[i] to starts[i + 1] of the stream.
struct BlockCall {
    int64_t rows, sequences;
    const float* x;
    const int* starts;
    const float *cos, *sin;
    std::vector<const float*> adapters;
    std::vector<float*> gradients;
    Seed seed;
    Norm norm1, norm2;
    const float* biases[joints];
    float *norm_gradients[4], *bias_gradients[joints];
};

// Kept from the forward to the backward pass, in one piece of memory.
struct Saved {
    float *mid, *lse, *low[joints];
    bf16 *qkv, *attended, *up;
    int64_t bytes = 0;

    // memory null: only counts the bytes
    Saved(unsigned char* memory, const BlockSpec& s, int64_t rows) {
        auto take = [&](int64_t size) {
            unsigned char* own = memory + bytes;
            bytes += (size + 255) / 256 * 256;
            return own;
        };
        auto halves = [&](int64_t width) { return (bf16*)take(rows * width * 2); };
        mid = (float*)take(rows * s.width * 4), lse = (float*)take(rows * s.heads * 4);
        qkv = halves(s.qkv_width()), attended = halves(s.heads * s.head_size), up = halves(s.up_width());
        for (int64_t i = 0; i < joints; i++) low[i] = (float*)take(rows * (&s.qkv)[i].rank() * 4);
    }
};

class Block {
public:
    Block(const BlockSpec& spec, const BlockCall& call) : s(spec), c(call), C(spec.width), M(call.rows) {
        size_t next = 0;
        for (int64_t i = 0; i < joints; i++)
            for (int64_t j = 0; j < (&s.qkv)[i].count; j++) {
                const LinearSpec& l = (&s.qkv)[i].linears[j];
                branches_[i][j] = {};
                if (!l.r) continue;
                const bool back = !c.gradients.empty();
                Seed seed = c.seed;
                seed.value = seed.value * 64 + next;
                branches_[i][j] = {c.adapters[next], c.adapters[next + 1], back ? c.gradients[next] : nullptr,
                    back ? c.gradients[next + 1] : nullptr, l.weight->k, l.weight->n, l.r, l.blocks, l.flags, (float)l.scale, l.p, seed};
                next += 2;
            }
    }

    void forward(const Saved& saved, float* y) {
        static Scratch<float> for_wide;
        float* wide = for_wide.of(M * std::max({s.qkv_width(), s.up_width(), C}));
        bf16* normed = rows_memory(0, std::max(C, s.inner));
        normalise(c.x, c.norm1, s.eps, normed, M, C);
        multiply(0, normed, saved, wide);
        JLORA_EACH(finish_qkv_kernel, M * s.qkv_width() / 2, wide, c.biases[0], c.cos, c.sin, saved.qkv, s.qkv_width(),
            s.head_size, s.heads + s.key_heads, M * s.qkv_width() / 2);
        attention(stream(saved), saved.attended, saved.lse);
        multiply(1, saved.attended, saved, wide);
        launch(add_norm_kernel<bf16>, dim3(M), row_threads, 0, c.x, wide, c.biases[1], saved.mid, c.norm2, (float)s.eps, normed, C);
        multiply(2, normed, saved, wide);
        JLORA_EACH(activate_kernel, M * s.inner, wide, c.biases[2], saved.up, normed, s.activation, s.gated != 0, s.inner, M * s.inner);
        multiply(3, normed, saved, wide);
        launch(add_norm_kernel<bf16>, dim3(M), row_threads, 0, saved.mid, wide, c.biases[3], y, Norm{}, 0.0f, nullptr, C);
    }

    // dx null: nobody asks for the gradient of the block's input.
    void backward(const Saved& saved, const float* dy, float* dx) {
        static Scratch<float> for_wide, for_mid, for_delta;
        const int64_t W = s.qkv_width(), A = s.heads * s.head_size;
        float* wide = for_wide.of(M * std::max({s.inner, A, C}));
        float* dmid = for_mid.of(M * C);
        bf16 *rows = rows_memory(0, std::max(C, s.inner)), *d = rows_memory(1, std::max({W, A, C, s.up_width()}));
        bf16* dres = rows_memory(2, std::max(A, C));
        round(dy, dres, M * C);
        const int64_t active = M * s.inner;
        if (reads(3)) JLORA_EACH(activate_again_kernel, active, saved.up, rows, s.activation, s.gated != 0, s.inner, active);
        back(3, rows, dres, saved, wide);
        JLORA_EACH(activate_back_kernel, active, wide, saved.up, d, s.activation, s.gated != 0, s.inner, active);
        if (reads(2)) normalise(saved.mid, c.norm2, s.eps, rows, M, C);
        back(2, rows, d, saved, wide);
        norm_gradients(saved.mid, c.norm2, s.eps, wide, c.norm_gradients[2], c.norm_gradients[3], M, C);
        launch(norm_back_kernel, dim3(M), row_threads, 0, saved.mid, c.norm2, (float)s.eps, wide, dy, dmid, dres, C);

        back(1, saved.attended, dres, saved, wide);
        bf16* dattended = dres;
        round(wide, dattended, M * A);
        attention_back({stream(saved), dattended, saved.lse, for_delta.of(M * s.heads), d}, saved.attended, for_delta.of(M * s.heads));
        if (c.cos) {
            const int64_t heads = s.heads + s.key_heads, pairs = M * heads * s.head_size / 2;
            JLORA_EACH(turn_back_kernel, pairs, d, c.cos, c.sin, W, s.head_size, heads, pairs);
        }
        if (reads(0)) normalise(c.x, c.norm1, s.eps, rows, M, C);
        const bool goes_on = dx || c.norm_gradients[0] || c.norm_gradients[1];
        back(0, rows, d, saved, goes_on ? wide : nullptr);
        norm_gradients(c.x, c.norm1, s.eps, wide, c.norm_gradients[0], c.norm_gradients[1], M, C);
        if (dx) launch(norm_back_kernel, dim3(M), row_threads, 0, c.x, c.norm1, (float)s.eps, wide, dmid, dx, nullptr, C);
    }

private:
    const BlockSpec& s;
    const BlockCall& c;
    const int64_t C, M;
    Branch branches_[joints][3];

    bf16* rows_memory(int which, int64_t width) const {
        static Scratch<bf16> memory[3];
        return memory[which].of(M * width);
    }
    Attention stream(const Saved& saved) const {
        static Scratch<int> memory;
        int *first = memory.of(2 * M), *last = first + M;
        launch(sequence_bounds_kernel, dim3(blocks_for(M, 256)), 256, 0, c.starts, (int)c.sequences, first, last, (int)M);
        return {M, s.heads, s.key_heads, s.head_size, saved.qkv, first, last, (float)s.scale, (float)s.cap, s.window};
    }
    const JointSpec& joint(int64_t i) const { return (&s.qkv)[i]; }
    // Whether gradients of its parameters depend on what a joint read.
    bool reads(int64_t i) const { return joint(i).rank() > 0; }
    // y (M, outputs) = x W^T with the low-rank branches of a joint's layers, side by side
    void multiply(int64_t i, bf16* x, const Saved& saved, float* y) const {
        const JointSpec& all = joint(i);
        const Matrix<bf16> input(x, M, all.linears[0].weight->k);
        const Matrix<float> outputs(y, M, all.outputs());
        float* low = saved.low[i];
        for (int64_t j = 0, first = 0; j < all.count; first += all.linears[j++].weight->n) {
            const Weight& w = *all.linears[j].weight;
            const Matrix<float> own = outputs.part(first, w.n);
            product(input, false, matrix_of(w), true, own);
            const Branch& b = branches_[i][j];
            if (b.r) LowRank(b).forward(input, low, own), low += M * b.rank();
        }
    }
    // Gradients of a joint's parameters, and dx (M, inputs), unless it is null, of what it read.
    void back(int64_t i, bf16* x, bf16* dy, const Saved& saved, float* dx) const {
        const JointSpec& all = joint(i);
        const Matrix<bf16> input(x, M, all.linears[0].weight->k), outputs(dy, M, all.outputs());
        const Matrix<float> dinput(dx, M, input.columns);
        if (c.bias_gradients[i]) column_sums(dy, c.bias_gradients[i], M, outputs.columns);
        for (int64_t j = 0, first = 0; dx && j < all.count; first += all.linears[j++].weight->n) {
            const Weight& w = *all.linears[j].weight;
            product(outputs.part(first, w.n), false, matrix_of(w), false, dinput, 1.0f, j ? 1.0f : 0.0f);
        }
        float* low = saved.low[i];
        for (int64_t j = 0, first = 0; j < all.count; first += all.linears[j++].weight->n) {
            const Branch& b = branches_[i][j];
            if (b.r) LowRank(b).backward(input, outputs.part(first, all.linears[j].weight->n), low, dinput), low += M * b.rank();
        }
    }
};
}  // namespace jlora
