// The low-rank branch of a linear layer, y += s (dropout(x) A^T) B^T by blocks of outputs, and its gradients;
// see ../lora.h. Its products are cuBLAS's too, on bf16 copies of A and B.
#pragma once
#include "product.h"
#include "rows.h"

namespace jlora {
struct Seed {
    uint64_t value = 0;
    int64_t first_row = 0;
    Seed() = default;
    explicit Seed(const int64_t* both) : value(both[0]), first_row(both[1]) {}
};
// One layer's branch: A (rank, in), B (enabled * width, r), the enabled blocks one after the other.
struct Branch {
    const float *A, *B;
    float *dA, *dB;          // where their gradients go
    int64_t in, out, r, blocks, flags;
    float scale;
    double p;
    Seed seed;
    int64_t width() const { return out / blocks; }
    int64_t enabled() const { return __builtin_popcountll(flags); }
    int64_t rank() const { return enabled() * r; }
    Dropout dropout() const { return {p, seed.value, seed.first_row * in}; }
    // visit(outputs' first column, number of the enabled block)
    template <typename Visit>
    void each_block(Visit visit) const {
        for (int64_t block = 0, own = 0; block < blocks; block++)
            if (flags >> block & 1) visit(block * width(), own++);
    }
};

// Products over the width of the rows are of bf16 copies; those over the rank, which are small, are float32.
class LowRank {
public:
    explicit LowRank(const Branch& b) : b_(b), A_((float*)b.A, b.rank(), b.in), B_((float*)b.B, b.enabled() * b.width(), b.r) {}

    // x (rows, in) -> low (rows, rank), kept for the backward pass; added to y (rows, out).
    void forward(const Matrix<bf16>& x, float* low, const Matrix<float>& y) const {
        const Matrix<float> kept(low, x.rows, b_.rank());
        product(dropped(x), false, rounded(A_, 0), true, kept, b_.scale);
        b_.each_block([&](int64_t first, int64_t own) {
            product(kept.part(own * b_.r, b_.r), false, of_block(B_, own), true, y.part(first, b_.width()), 1.0f, 1.0f);
        });
    }
    // dy (rows, out), low as kept, x as read -> dA, dB; what flows to x is added to dx (rows, in).
    void backward(const Matrix<bf16>& x, const Matrix<bf16>& dy, float* low, const Matrix<float>& dx) const {
        static Scratch<float> for_dlow, for_dropped;
        const Matrix<float> dlow(for_dlow.of(x.rows * b_.rank()), x.rows, b_.rank()), dA(b_.dA, b_.rank(), b_.in);
        const Matrix<bf16> B = rounded(B_, 0), kept = rounded(Matrix<float>(low, x.rows, b_.rank()), 1);
        b_.each_block([&](int64_t first, int64_t own) {
            const Matrix<bf16> block = dy.part(first, b_.width());
            const Matrix<float> dB(b_.dB + own * b_.width() * b_.r, b_.width(), b_.r);
            product(block, false, of_block(B, own), false, dlow.part(own * b_.r, b_.r), b_.scale);
            product(block, true, kept.part(own * b_.r, b_.r), false, dB);
        });
        product(rounded(dlow, 1), true, dropped(x), false, dA);
        if (!dx.data) return;
        if (b_.p <= 0) return product(dlow, false, A_, false, dx, 1.0f, 1.0f);
        const Matrix<float> own(for_dropped.of(x.rows * b_.in), x.rows, b_.in);
        product(dlow, false, A_, false, own);
        JLORA_EACH(add_dropped_kernel, x.rows * b_.in, own.data, dx.data, b_.dropout(), x.rows * b_.in);
    }

private:
    // In one of two pieces of memory that are used again.
    static Matrix<bf16> rounded(const Matrix<float>& x, int which) {
        static Scratch<bf16> memory[2];
        Matrix<bf16> y(memory[which].of(x.rows * x.columns), x.rows, x.columns);
        round(x.data, y.data, x.rows * x.columns);
        return y;
    }
    template <typename T>
    Matrix<T> of_block(const Matrix<T>& B, int64_t own) const { return B.below(own * b_.width(), b_.width()); }
    Matrix<bf16> dropped(const Matrix<bf16>& x) const {
        if (b_.p <= 0) return x;
        static Scratch<bf16> memory;
        const int64_t count = x.rows * x.columns;
        Matrix<bf16> y(memory.of(count), x.rows, x.columns);
        JLORA_EACH(dropout_kernel<bf16>, count, (const bf16*)x.data, y.data, b_.dropout(), count);
        return y;
    }
    const Branch b_;
    Matrix<float> A_, B_;
};
}  // namespace jlora
