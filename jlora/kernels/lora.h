// The low-rank branches of the linear layers that read the same rows: y += s (dropout(x) A^T) B^T, and
// their gradients. The sums that have many terms run over rows here, four rows at a time, so that
// what is read of A and of the gradients serves four; what is added to the result of the frozen
// weights is added 32 columns at a time, where that result appears.
#pragma once
#include <omp.h>
#include <algorithm>
#include <vector>
#include "elementwise.h"
#include "product.h"

namespace jlora {
// One layer's branch. A layer may be several blocks of equal width, some of them with LoRA (loralib's
// MergedLinear): A (enabled * r, in), B (enabled * width, r), the enabled blocks one after the other.
struct Branch {
    const float *A, *B;
    float *dA, *dB;          // where their gradients go
    int64_t first, out;      // its layer's outputs among all
    int64_t r, blocks, flags;  // bit i of flags: block i is enabled
    float scale;
    double p;                // of dropout; 0: none
    Seed seed;
    int64_t width() const { return out / blocks; }
    int64_t rank() const { return __builtin_popcountll(flags) * r; }
};

class LowRank {
public:
    // in, out: width of the rows and of all layers' outputs together
    LowRank(int64_t in, int64_t out, std::vector<Branch> branches)
        : own_in_(in), in_(up_to(in, 32)), out_(up_to(out, 32)), branches_(std::move(branches)) {
        for (const Branch& b : branches_)
            for (int64_t block = 0; block < b.blocks; block++)
                if (b.flags >> block & 1)
                    for (int64_t i = 0; i < b.r; i++) first_.push_back(b.first + block * b.width());
        JLORA_PART("LoRA branches");
        // A's rows filled up to whole runs of 32; B's columns become rows that stand where their outputs do, so that they can be added.
        a_.assign(rank() * in_, 0.0f), table_.assign(rank() * out_, 0.0f);
        each([&](const Branch& b, int64_t j, int64_t own) {
            std::copy_n(b.A + own * own_in_, own_in_, a_.data() + j * in_);
            for (int64_t o = 0; o < b.width(); o++)
                table_[j * out_ + first_[j] + o] = b.B[(own / b.r * b.width() + o) * b.r + own % b.r];
        });
        for (int64_t n = 0; n < out_; n += 32) {
            int64_t from = rank(), to = 0;
            each([&](const Branch& b, int64_t j, int64_t) {
                if (first_[j] < n + 32 && first_[j] + b.width() > n) from = std::min(from, j), to = j + 1;
            });
            reach_.push_back({from, to});
        }
    }
    int64_t rank() const { return first_.size(); }

    // low (rows, rank) = s dropout(x) A^T, kept for the backward pass
    void forward(const Rows& x, float* low) {
        low_ = low;
        if (!rank()) return;
        JLORA_PART("LoRA branches");
        #pragma omp parallel
        {
            std::vector<float> row(FOUR * in_), kept(FOUR * in_);
            #pragma omp for schedule(static)
            for (int64_t m = 0; m < x.rows; m += FOUR) {
                const int64_t count = std::min<int64_t>(FOUR, x.rows - m);
                for (int64_t i = 0; i < count; i++) read(x, m + i, row.data() + i * in_);
                each_branch([&](const Branch& b, int64_t first) {
                    const float* source = dropped(b, m, count, row.data(), kept.data());
                    for (int64_t j = first; j < first + b.rank(); j++) {
                        float y[FOUR];
                        dots(a_.data() + j * in_, source, in_, in_, y);
                        for (int64_t i = 0; i < count; i++) low[(m + i) * rank() + j] = b.scale * y[i];
                    }
                });
            }
        }
    }
    // Adds the branches' part to outputs n to n + 31 of row m.
    void add(int64_t m, int64_t n, F16& left, F16& right) const {
        if (!rank()) return;
        for (int64_t j = reach_[n / 32].from; j < reach_[n / 32].to; j++) {
            const float x = low_[m * rank() + j];
            const float* row = table_.data() + j * out_ + n;
            left += x * load16(row), right += x * load16(row + 16);
        }
    }

    // x: what the forward pass read; low: what it kept. Writes dA and dB, and keeps what add_back adds.
    void backward(const Rows& x, const Rows& dy, const float* low, Buffer<float>& memory) {
        if (!rank()) return;
        JLORA_PART("LoRA branches");
        const int64_t R = rank();
        float* dlow = dlow_ = memory.of(x.rows * R);
        std::vector<float> sum_a(R * in_), sum_b(R * out_);
        #pragma omp parallel
        {
            std::vector<float> row(FOUR * in_), kept(FOUR * in_), g(FOUR * out_), own_a(R * in_), own_b(R * out_);
            #pragma omp for schedule(static)
            for (int64_t m = 0; m < x.rows; m += FOUR) {
                const int64_t count = std::min<int64_t>(FOUR, x.rows - m);
                for (int64_t i = 0; i < count; i++)
                    read(x, m + i, row.data() + i * in_), read(dy, m + i, g.data() + i * out_);
                each_branch([&](const Branch& b, int64_t first) {
                    const float* source = dropped(b, m, count, row.data(), kept.data());
                    for (int64_t j = first; j < first + b.rank(); j++) {
                        const float* own = g.data() + first_[j];
                        float d[FOUR], y[FOUR] = {};  // zero beyond the last row
                        dots(table_.data() + j * out_ + first_[j], own, out_, b.width(), d);
                        for (int64_t i = 0; i < FOUR; i++) d[i] = i < count ? b.scale * d[i] : 0.0f;
                        for (int64_t i = 0; i < count; i++) dlow[(m + i) * R + j] = d[i], y[i] = low[(m + i) * R + j];
                        add_rows(own_b.data() + j * out_ + first_[j], y, own, out_, b.width());
                        add_rows(own_a.data() + j * in_, d, source, in_, in_);
                    }
                });
            }
            // In the order of the threads, so that equal runs give equal bits.
            #pragma omp for ordered schedule(static, 1)
            for (int t = 0; t < omp_get_num_threads(); t++) {
                #pragma omp ordered
                {
                    add_scaled(sum_a.data(), 1.0f, own_a.data(), R * in_);
                    add_scaled(sum_b.data(), 1.0f, own_b.data(), R * out_);
                }
            }
        }
        each([&](const Branch& b, int64_t j, int64_t own) {
            std::copy_n(sum_a.data() + j * in_, own_in_, b.dA + own * own_in_);
            for (int64_t o = 0; o < b.width(); o++)
                b.dB[(own / b.r * b.width() + o) * b.r + own % b.r] = sum_b[j * out_ + first_[j] + o];
        });
    }
    // Adds the branches' part to the gradient of inputs k to k + 31 of row m.
    void add_back(int64_t m, int64_t k, F16& left, F16& right) const {
        each_branch([&](const Branch& b, int64_t first) {
            F16 l{}, r{};
            for (int64_t j = first; j < first + b.rank(); j++) {
                const float x = dlow_[m * rank() + j];
                const float* row = a_.data() + j * in_ + k;
                l += x * load16(row), r += x * load16(row + 16);
            }
            const Dropout drop(b.p, b.seed.value);
            const int64_t first_number = (b.seed.first_row + m) * in_ + k;
            if (b.p > 0) l *= drop.factors(first_number), r *= drop.factors(first_number + 16);
            left += l, right += r;
        });
    }

private:
    static constexpr int64_t FOUR = 4;
    struct Reach { int64_t from, to; };  // of ranks that change a panel of 32 outputs
    // visit(branch, number of its first rank)
    template <typename Visit>
    void each_branch(Visit visit) const {
        int64_t j = 0;
        for (const Branch& b : branches_) visit(b, j), j += b.rank();
    }
    // visit(branch, number of a rank, its number in the branch)
    template <typename Visit>
    void each(Visit visit) const {
        each_branch([&](const Branch& b, int64_t first) {
            for (int64_t i = 0; i < b.rank(); i++) visit(b, first + i, i);
        });
    }
    static void read(const Rows& x, int64_t m, float* row) {
        for (int64_t k = 0; k < x.width; k += 32) to_float(x.at(m, k), row + k, std::min<int64_t>(32, x.width - k));
    }
    // Rows m to m + count - 1, in_ apart.
    const float* dropped(const Branch& b, int64_t m, int64_t count, const float* rows, float* kept) const {
        if (b.p <= 0) return rows;
        const Dropout drop(b.p, b.seed.value);
        const int64_t first = (b.seed.first_row + m) * in_;
        for (int64_t i = 0; i < count * in_; i += 16) store16(kept + i, load16(rows + i) * drop.factors(first + i));
        return kept;
    }

    // y[i] = a . row i of x, n numbers of four rows
    static void dots(const float* a, const float* x, int64_t stride, int64_t n, float* y) {
        F16 sums[FOUR] = {};
        int64_t k = 0;
        for (; k + 16 <= n; k += 16) {
            const F16 v = load16(a + k);
            for (int64_t i = 0; i < FOUR; i++) sums[i] += v * load16(x + i * stride + k);
        }
        for (int64_t i = 0; i < FOUR; i++) {
            y[i] = sum16(sums[i]);
            for (int64_t rest = k; rest < n; rest++) y[i] += a[rest] * x[i * stride + rest];
        }
    }
    // y += scale[i] * row i of x, n numbers of four rows
    static void add_rows(float* y, const float* scale, const float* x, int64_t stride, int64_t n) {
        int64_t k = 0;
        for (; k + 16 <= n; k += 16) {
            F16 sum = load16(y + k);
            for (int64_t i = 0; i < FOUR; i++) sum += scale[i] * load16(x + i * stride + k);
            store16(y + k, sum);
        }
        for (; k < n; k++)
            for (int64_t i = 0; i < FOUR; i++) y[k] += scale[i] * x[i * stride + k];
    }

    int64_t own_in_, in_, out_;    // the last two filled up to runs of 32
    std::vector<Branch> branches_;
    std::vector<int64_t> first_;   // first output of each rank
    std::vector<float> a_, table_;  // (rank, in), (rank, out)
    std::vector<Reach> reach_;
    const float* low_ = nullptr;
    float* dlow_ = nullptr;
};
}  // namespace jlora
