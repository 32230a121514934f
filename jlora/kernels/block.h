// A whole transformer block, forward and backward, over a stream of tokens: query-key-value product,
// attention, output product, MLP, with low-rank branches on any of the products, and norms before and
// after attention and MLP and of queries and keys, as many of them as there are.
//
// Products read bf16, everything else and all sums are float32; the residual stream enters and leaves
// as float32. Of a pass is kept what the way back cannot recompute cheaply (`Saved`). Any parameter may be
// trained: then norms, biases and the weights packed anew come with the call (`BlockSpec::given`).
#pragma once
#include <algorithm>
#include <vector>
#include "activation.h"
#include "elementwise.h"
#include "lora.h"
#include "norm.h"
#include "product.h"
#include "weight_gradient.h"
#if defined(JLORA_TILES)
#include "tile_attention.h"
#else
#include "stream_attention.h"
#endif

namespace jlora {
// What Python hands over; block.py mirrors these.
struct LinearSpec {
    const Weight* weight;      // of a trained layer only n and k
    int64_t r, blocks, flags;  // of its low-rank branch; r 0: none
    double scale, p;
    int64_t trained;           // 0: frozen, 1: stored as (n, k), 2: as (k, n)
};
struct JointSpec {  // linear layers that read the same rows
    int64_t count;
    LinearSpec linears[3];
    const float* bias;  // (all outputs,) or null
};
constexpr int64_t joints = 4;
enum NormPlace : int64_t { before_attention, after_attention, before_mlp, after_mlp, of_queries, of_keys, norm_places };
struct BlockSpec {
    int64_t width, heads, key_heads, head_size, inner;
    int64_t rotary;         // how many numbers of queries and keys are turned by their positions
    int64_t neighbours;     // whether those are pairs of neighbours
    int64_t grouped;        // see Stream
    int64_t window;         // see Scores
    double scale, cap;
    int64_t activation;     // see activation.h
    int64_t gated;          // whether that of the first half of `up` multiplies the second
    double eps;
    Norm norms[norm_places];
    int64_t whole;          // whether those of queries and keys are of all heads together
    JointSpec qkv, out, up, down;
    int64_t given;          // whether norms and biases come with each call, for they may be trained
    int64_t qkv_width() const { return (heads + 2 * key_heads) * head_size; }
    // Of the queries and keys, which are normed before attention.
    int64_t normed_width() const { return norms[of_queries].weight ? (heads + key_heads) * head_size : 0; }
};

// The arrays of one call. A sequence i is rows starts[i] to starts[i + 1] of the stream.
struct BlockCall {
    int64_t rows, sequences;
    const float* x;              // (rows, width)
    const int* starts;
    const float *cos, *sin;      // (rows, head_size / 2), with rotary embedding
    std::vector<const float*> adapters;  // A and B of each branch, in the order of the layers
    std::vector<float*> gradients;       // likewise, in the backward pass
    Seed seed;                   // of dropout
    Norm norms[norm_places];
    const float* biases[joints];
    std::vector<void*> packed;   // of each trained weight
    // In the backward pass where it is wanted: of the first norm's weight and bias, and so on.
    float *norm_gradients[2 * norm_places], *bias_gradients[joints];
    std::vector<float*> weight_gradients;
};
// Places among what comes with a call; a joint moves them on.
struct Places { size_t adapter, joint, weight; };

// Kept from the forward to the backward pass, in one piece of memory.
struct Saved {
    float *mid, *lse, *low_qkv, *low_out, *low_up, *low_down;
    float *attention_branch, *mlp_branch;  // before the norms that follow, where these are
    Rows qkv, attended, up, gate;  // qkv: before rotary embedding; up: before the activation
    Rows raw;                      // queries and keys before their norms, as in qkv
    int64_t bytes = 0;

    // memory null: only counts the bytes
    Saved(char* memory, const BlockSpec& s, int64_t rows) {
        char* at = memory ? (char*)up_to((int64_t)(uintptr_t)memory, line) : nullptr;
        auto take = [&](int64_t size) {
            char* own = at + bytes;
            bytes += up_to(size, line);
            return own;
        };
        auto floats = [&](int64_t count) { return (float*)take(count * 4); };
        auto rows_of = [&](int64_t width) { return Rows{(uint16_t*)take(Rows::numbers(rows, width) * 2), rows, width}; };
        auto low = [&](const JointSpec& joint) {
            int64_t rank = 0;
            for (int64_t i = 0; i < joint.count; i++)
                rank += joint.linears[i].r * __builtin_popcountll(joint.linears[i].flags);
            return floats(rows * rank);
        };
        mid = floats(rows * s.width), lse = floats(rows * s.heads);
        low_qkv = low(s.qkv), low_out = low(s.out), low_up = low(s.up), low_down = low(s.down);
        qkv = rows_of(s.qkv_width()), attended = rows_of(s.heads * s.head_size);
        up = rows_of(s.inner), gate = rows_of(s.gated ? s.inner : 0);
        raw = rows_of(s.normed_width());
        attention_branch = floats(s.norms[after_attention].weight ? rows * s.width : 0);
        mlp_branch = floats(s.norms[after_mlp].weight ? rows * s.width : 0);
        bytes += line;  // room to begin on a line
    }
};

struct Joint {
    Weights weights;
    const float* bias;
    LowRank low;
    Weight own[3];               // of trained layers
    float* weight_gradients[3] = {};  // null: not wanted, or no such layer
    float* bias_gradient;
    const JointSpec& spec;

    // next: places of this joint's first branch, bias and trained weight.
    Joint(const JointSpec& s, const BlockCall& call, Places& next)
        : weights{{}, s.count}, bias(call.biases[next.joint]),
          low(s.linears[0].weight->k, outputs(s), branches(s, call, next.adapter)),
          bias_gradient(call.bias_gradients[next.joint]), spec(s) {
        next.joint++;
        for (int64_t i = 0; i < s.count; i++) {
            weights.list[i] = s.linears[i].weight;
#if defined(JLORA_TILES)
            if (!s.linears[i].trained) continue;
            own[i] = weight_of(call.packed[next.weight], weights.list[i]->n, weights.list[i]->k), weights.list[i] = &own[i];
            if (!call.weight_gradients.empty()) weight_gradients[i] = call.weight_gradients[next.weight];
            next.weight++;
#endif
        }
    }
    Joint(const Joint&) = delete;  // `weights` points into it
    static int64_t outputs(const JointSpec& s) {
        int64_t sum = 0;
        for (int64_t i = 0; i < s.count; i++) sum += s.linears[i].weight->n;
        return sum;
    }
    static std::vector<Branch> branches(const JointSpec& s, const BlockCall& call, size_t& next) {
        std::vector<Branch> all;
        for (int64_t i = 0, first = 0; i < s.count; first += s.linears[i++].weight->n) {
            const LinearSpec& l = s.linears[i];
            if (!l.r) continue;
            const bool back = !call.gradients.empty();
            Seed seed = call.seed;
            seed.value = seed.value * 64 + next;
            all.push_back({call.adapters[next], call.adapters[next + 1], back ? call.gradients[next] : nullptr,
                back ? call.gradients[next + 1] : nullptr, first, l.weight->n, l.r, l.blocks, l.flags, (float)l.scale,
                l.p, seed});
            next += 2;
        }
        return all;
    }
    // store(m, n, left, right): 32 finished outputs
    template <typename Store>
    void forward(const Rows& x, float* low_kept, Store store) {
        low.forward(x, low_kept);
        JLORA_PART("forward");
        product(x, weights, [&](int64_t m, int64_t n, F16 left, F16 right) {
            if (bias) left += load16(bias + n), right += load16(bias + n + 16);
            low.add(m, n, left, right);
            store(m, n, left, right);
        });
    }
    // store(m, k, left, right): the gradient of 32 inputs
    template <typename Store>
    void backward(const Rows& dy, Store store) {
        JLORA_PART("backward");
        product_back(dy, weights, [&](int64_t m, int64_t k, F16 left, F16 right) {
            if (low.rank()) low.add_back(m, k, left, right);
            store(m, k, left, right);
        });
    }
    // Whether gradients of its parameters depend on what it read.
    bool reads() const { return low.rank() || weight_gradients[0] || weight_gradients[1] || weight_gradients[2]; }
    // Gradients of its parameters; x: what it read, if it `reads`.
    void gradients(const Rows& x, const Rows& dy, const float* low_kept, Buffer<float>& memory) {
        if (bias_gradient) sum_columns(dy, bias_gradient);
        if (low.rank()) low.backward(x, dy, low_kept, memory);
#if defined(JLORA_TILES)
        JLORA_PART("gradients of weights");
        for (int64_t i = 0, first = 0; i < weights.count; first += weights.list[i++]->n)
            if (weight_gradients[i])
                weight_gradient(x, {dy, first, weights.list[i]->n}, spec.linears[i].trained == 2, weight_gradients[i]);
#endif
    }
};

// Takes the results of a branch's last product: y is x and these, or they are kept where a norm follows.
struct IntoBranch {
    const float* x;
    float *kept, *y;
    int64_t width;
    bool normed;
    void operator()(int64_t m, int64_t n, F16 left, F16 right) const {
        const int64_t at = m * width + n;
        for (int64_t i = 0; i < 32; i += 16) __builtin_prefetch(x + at + 4 * width + i), __builtin_prefetch(y + at + 4 * width + i, 1);
        if (normed) return store16(kept + at, left), store16(kept + at + 16, right);
        store16(y + at, load16(x + at) + left), store16(y + at + 16, load16(x + at + 16) + right);
    }
};

class Block {
public:
    Block(const BlockSpec& spec, const BlockCall& call) : s(spec), c(call), C(spec.width), M(call.rows),
        qkv(spec.qkv, call, next_), out(spec.out, call, next_), up(spec.up, call, next_), down(spec.down, call, next_) {}

    void forward(const Saved& saved, float* y) {
        static Buffer<uint16_t> for_normed, for_active;
        const Rows normed = rows_in(for_normed, M, C), active = rows_in(for_active, M, s.inner);
        const int64_t raw = s.normed_width();
        normalise(c.x, c.norms[before_attention], normed);
        qkv.forward(normed, saved.low_qkv, [&](int64_t m, int64_t n, F16 left, F16 right) {
            store32((n < raw ? saved.raw : saved.qkv).at(m, n), left, right);
        });
        if (raw) normalise_heads(saved);
        stream_attention(stream(saved));
        out.forward(saved.attended, saved.low_out, IntoBranch{c.x, saved.attention_branch, saved.mid, C, has(after_attention)});
        add_branch(c.x, saved.attention_branch, saved.mid, after_attention);
        normalise(saved.mid, c.norms[before_mlp], normed);
        up.forward(normed, saved.low_up, [&](int64_t m, int64_t n, F16 left, F16 right) {
            const bool gate = s.gated && n < s.inner;
            store32(gate ? saved.gate.at(m, n) : saved.up.at(m, s.gated ? n - s.inner : n), left, right);
            if (!s.gated) store32(active.at(m, n), activation16(s.activation, left), activation16(s.activation, right));
        });
        if (s.gated) activate(saved, active);
        down.forward(active, saved.low_down, IntoBranch{saved.mid, saved.mlp_branch, y, C, has(after_mlp)});
        add_branch(saved.mid, saved.mlp_branch, y, after_mlp);
    }

    // dx null: nobody asks for the gradient of the block's input.
    void backward(const Saved& saved, const float* dy, float* dx) {
        static Buffer<uint16_t> for_dres, for_rows, for_dup, for_dattended, for_dqkv;
        static Buffer<float> for_dmid, for_dnormed, for_dlow;
        const int64_t W = s.qkv_width(), A = s.heads * s.head_size;
        const Rows dres = rows_in(for_dres, M, C), dup = rows_in(for_dup, M, s.inner * (s.gated ? 2 : 1));
        const Rows dattended = rows_in(for_dattended, M, A), dqkv = rows_in(for_dqkv, M, W);
        float *dmid = for_dmid.of(M * C), *dnormed = for_dnormed.of(M * C);
        branch_back(saved.mlp_branch, dy, dres, dnormed, after_mlp);
        const Rows active = rows_in(for_rows, M, s.inner);
        if (down.reads()) activate(saved, active);
        down.gradients(active, dres, saved.low_down, for_dlow);
        down.backward(dres, [&](int64_t m, int64_t k, F16 left, F16 right) {
            const uint16_t* u = saved.up.at(m, k);
            if (!s.gated) {
                store32(dup.at(m, k), left * activation_slope16(s.activation, load16(u)),
                    right * activation_slope16(s.activation, load16(u + 16)));
                return;
            }
            const uint16_t* g = saved.gate.at(m, k);
            const F16 g0 = load16(g), g1 = load16(g + 16);
            store32(dup.at(m, s.inner + k), left * activation16(s.activation, g0), right * activation16(s.activation, g1));
            store32(dup.at(m, k), left * load16(u) * activation_slope16(s.activation, g0),
                right * load16(u + 16) * activation_slope16(s.activation, g1));
        });
        const Rows normed = rows_in(for_rows, M, C);
        if (up.reads()) normalise(saved.mid, c.norms[before_mlp], normed);
        up.gradients(normed, dup, saved.low_up, for_dlow);
        up.backward(dup, [&](int64_t m, int64_t k, F16 left, F16 right) {
            store16(dnormed + m * C + k, left), store16(dnormed + m * C + k + 16, right);
        });
        normalise_back(saved.mid, before_mlp, dnormed, dy, dmid);

        branch_back(saved.attention_branch, dmid, dres, dnormed, after_attention);
        out.gradients(saved.attended, dres, saved.low_out, for_dlow);
        out.backward(dres, [&](int64_t m, int64_t k, F16 left, F16 right) {
            store32(dattended.at(m, k), left, right);
        });
        stream_attention_back(stream(saved), dattended, dqkv);
        if (s.normed_width()) normalise_heads_back(saved, dqkv);
        if (qkv.reads()) normalise(c.x, c.norms[before_attention], normed);
        qkv.gradients(normed, dqkv, saved.low_qkv, for_dlow);
        if (!dx && !c.norm_gradients[0] && !c.norm_gradients[1]) return;
        qkv.backward(dqkv, [&](int64_t m, int64_t k, F16 left, F16 right) {
            store16(dnormed + m * C + k, left), store16(dnormed + m * C + k + 16, right);
        });
        normalise_back(c.x, before_attention, dnormed, dmid, dx);
    }

private:
    const BlockSpec& s;
    const BlockCall& c;
    const int64_t C, M;
    Places next_{};  // before the joints, which count with it
    Joint qkv, out, up, down;

    Stream stream(const Saved& saved) const {
        return {M, c.sequences, c.starts, s.heads, s.key_heads, s.head_size, c.cos, c.sin, {s.rotary, s.neighbours},
            {(float)s.scale, (float)s.cap, s.window}, s.grouped, saved.qkv, saved.attended, saved.lse};
    }
    bool has(NormPlace place) const { return c.norms[place].weight; }
    // y = x + the norm of what was kept
    void add_branch(const float* x, const float* kept, float* y, NormPlace place) const {
        const Norm& norm = c.norms[place];
        if (!has(place)) return;
        JLORA_PART("norms");
        #pragma omp parallel for schedule(static)
        for (int64_t m = 0; m < M; m++) {
            const NormRow row(norm, (float)s.eps, kept + m * C, C);
            for (int64_t k = 0; k < C; k += 32) {
                F16 left, right;
                row(k, 32, left, right);
                const int64_t at = m * C + k;
                store16(y + at, load16(x + at) + left), store16(y + at + 16, load16(x + at + 16) + right);
            }
        }
    }
    // The gradient of a sum with a branch -> of the branch's product, rounded. memory (M, C)
    void branch_back(const float* kept, const float* dy, const Rows& to, float* memory, NormPlace place) const {
        JLORA_PART("rounding");
        if (!has(place)) return round_rows(dy, to);
        normalise_back(kept, place, dy, nullptr, memory);
        round_rows(memory, to);
    }
    // work(norm, first number, count) of each head of queries and keys, or of all heads of each
    template <typename Work>
    void each_head(Work work) const {
        for (NormPlace place : {of_queries, of_keys}) {
            const int64_t heads = place == of_queries ? s.heads : s.key_heads, from = place == of_queries ? 0 : s.heads;
            const int64_t size = s.head_size * (s.whole ? heads : 1);
            for (int64_t i = 0; i < heads * s.head_size; i += size) work(place, from * s.head_size + i, size);
        }
    }
    void normalise_heads(const Saved& saved) const {
        JLORA_PART("norms");
        const int64_t width = s.normed_width();
        #pragma omp parallel
        {
            std::vector<float> x(width);
            #pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++) {
                row_of(saved.raw, m, x);
                each_head([&](NormPlace place, int64_t from, int64_t size) {
                    const NormRow row(c.norms[place], (float)s.eps, x.data() + from, size);
                    for (int64_t k = 0; k < size; k += 32) {
                        F16 left, right;
                        row(k, 32, left, right);
                        store32(saved.qkv.at(m, from + k), left, right);
                    }
                });
            }
        }
    }
    // The gradients of normed queries and keys become those of raw ones.
    void normalise_heads_back(const Saved& saved, const Rows& dqkv) const {
        JLORA_PART("norms");
        const int64_t width = s.normed_width(), D = s.head_size;
        float* const* all = c.norm_gradients;
        const NormGradient of_q(all[2 * of_queries], all[2 * of_queries + 1], s.whole ? s.heads * D : D);
        const NormGradient of_k(all[2 * of_keys], all[2 * of_keys + 1], s.whole ? s.key_heads * D : D);
        #pragma omp parallel
        {
            NormGradient::Part q(of_q), k(of_k);
            std::vector<float> x(width), d(width), dx(width);
            #pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++) {
                row_of(saved.raw, m, x), row_of(dqkv, m, d);
                each_head([&](NormPlace place, int64_t from, int64_t size) {
                    const float *own = x.data() + from, *dy = d.data() + from;
                    const NormRow of(c.norms[place], (float)s.eps, own, size);
                    (place == of_queries ? q : k).take(own, dy, of.mean, of.r);
                    norm_row_back(c.norms[place], own, of.mean, of.r, dy, nullptr, dx.data() + from, size);
                });
                for (int64_t n = 0; n < width; n += 32) store32(dqkv.at(m, n), load16(&dx[n]), load16(&dx[n + 16]));
            }
            of_q.join(q), of_k.join(k);
        }
    }
    static void row_of(const Rows& from, int64_t m, std::vector<float>& to) {
        for (int64_t n = 0; n < (int64_t)to.size(); n += 32) to_float(from.at(m, n), to.data() + n, 32);
    }

    void normalise(const float* x, const Norm& norm, const Rows& y) const {
        JLORA_PART("norms");
        #pragma omp parallel for schedule(static)
        for (int64_t m = 0; m < M; m++) {
            const NormRow row(norm, (float)s.eps, x + m * C, C);
            for (int64_t k = 0; k < C; k += 32) {
                F16 left, right;
                row(k, 32, left, right);
                store32(y.at(m, k), left, right);
            }
        }
    }
    // dx = the norm's gradient + what flows past it, if anything; also of the norm's weight and bias. dx null:
    // not wanted.
    void normalise_back(const float* x, NormPlace place, const float* dy, const float* past, float* dx) const {
        JLORA_PART("norms");
        const Norm& norm = c.norms[place];
        float* const* parameters = c.norm_gradients + 2 * place;
        if (!norm.weight) {
            #pragma omp parallel for schedule(static)
            for (int64_t i = 0; i < M * C; i++) dx[i] = past[i] + dy[i];
            return;
        }
        const NormGradient gradient(parameters[0], parameters[1], C);
        #pragma omp parallel
        {
            NormGradient::Part part(gradient);
            #pragma omp for schedule(static)
            for (int64_t m = 0; m < M; m++) {
                const float *row = x + m * C, *g = dy + m * C;
                const NormRow of(norm, (float)s.eps, row, C);
                part.take(row, g, of.mean, of.r);
                if (dx) norm_row_back(norm, row, of.mean, of.r, g, past ? past + m * C : nullptr, dx + m * C, C);
            }
            gradient.join(part);
        }
    }
    void activate(const Saved& saved, const Rows& active) const {
        JLORA_PART("activations");
        #pragma omp parallel for schedule(static)
        for (int64_t m = 0; m < M; m++)
            for (int64_t k = 0; k < s.inner; k += 32) {
                const uint16_t* x = (s.gated ? saved.gate : saved.up).at(m, k);
                F16 left = activation16(s.activation, load16(x)), right = activation16(s.activation, load16(x + 16));
                if (s.gated) left *= load16(saved.up.at(m, k)), right *= load16(saved.up.at(m, k) + 16);
                store32(active.at(m, k), left, right);
            }
    }
};
}  // namespace jlora
