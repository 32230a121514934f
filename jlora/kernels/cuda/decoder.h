// A whole language model over rows of tokens, for decoding: prompts, and single steps of rows that share
// prompts. What ../decoder.h says holds here; keys and values are bf16, and stand on the card.
#pragma once
#include <vector>
#include "attention.h"
#include "lora.h"

namespace jlora::decode {
// The structs of decoder.py.
struct SlotBranch {
    const float *A, *B;
    const int* from;         // this and the next three are not read here
    int64_t rank, reach, narrow;
    int64_t r, blocks, flags;
    double scale;
};
struct Linear {
    int64_t kind;            // 1: a `Weight`; others are not computed here
    const void* weight;
    int64_t n, k;
    const float* bias;
    const SlotBranch* branches;  // on the host; one, or null
};
struct Block {
    Norm before_attention, after_attention, before_mlp, after_mlp, queries, keys;
    Linear qkv[3], out, in[2], down;
    int64_t rope, window;
};
struct Model {
    int64_t layers, C, H, G, D, inner;
    double eps;
    const float* tokens;
    const Weight* packed_tokens;
    const float *positions, *frequencies;
    Norm last;
    int64_t activation, gated, ropes, rotary, neighbours, long_from, grouped, whole;
    double amplitude, embedding_scale, scale, cap;
    int64_t narrow;          // keys and values are always bf16 here
};

// Rows of tokens, on the card; where each keeps its key and value.
struct Tokens {
    int64_t count;
    const int *ids, *positions;
    bf16* const* blocks;     // (count,) blocks of tokens (layers, 2, size, G D)
    const int *sizes, *places;
};

__global__ void embed_kernel(const float* tokens, Weight packed, const float* positions, const int* ids, const int* at, float scale, float* x, int64_t C) {
    const int64_t row = ids[blockIdx.x] * C, place = at[blockIdx.x] * C;
    for (int64_t j = threadIdx.x; j < C; j += blockDim.x)
        x[blockIdx.x * C + j] = (tokens ? tokens[row + j] : number_at(packed, ids[blockIdx.x], j)) * scale + (positions ? positions[place + j] : 0.0f);
}
__global__ void angles_kernel(const float* frequencies, const int* positions, float* cos, float* sin, int64_t half) {
    for (int64_t j = threadIdx.x; j < half; j += blockDim.x) {
        const float angle = positions[blockIdx.x] * frequencies[j];
        cos[blockIdx.x * half + j] = cosf(angle), sin[blockIdx.x * half + j] = sinf(angle);
    }
}
// Keys and values of qkv (rows, (H + 2 G) D) to their places.
__global__ void keep_kernel(const bf16* qkv, Tokens tokens, int64_t layer, int64_t queries, int64_t width, int64_t count) {
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= count) return;
    const int64_t m = i / (2 * width), value = i / width % 2, j = i % width;
    tokens.blocks[m][((layer * 2 + value) * tokens.sizes[m] + tokens.places[m]) * width + j] =
        qkv[m * (queries + 2 * width) + queries + value * width + j];
}

// What rows see: the first `shown` tokens of a block, then generated tokens by their places in slabs.
struct Seen {
    const bf16* const* prompts;  // (R,) blocks of (layers, 2, sizes[r], G D)
    const int *sizes, *shown, *table, *lengths;
    const bf16* const* slabs;
    int64_t most, slab_size;
};
constexpr int seen_warps = 4;
// A warp computes one query head of one row, 32 keys at a time: each lane one key's score, then all lanes the
// sum of the values.
__global__ void step_attention_kernel(const bf16* qkv, Seen seen, int64_t layer, int64_t R, int64_t H, int64_t G, int64_t D, float scale,
        float cap, int64_t window, bf16* out) {
    __shared__ float for_q[seen_warps][256], for_p[seen_warps][32];
    __shared__ const bf16* for_v[seen_warps][32];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t i = (int64_t)blockIdx.x * seen_warps + warp, r = min(i / H, R - 1), h = i % H, g = h / (H / G), width = G * D;
    float* q = for_q[warp];
    for (int64_t j = lane; j < D; j += 32) q[j] = (float)qkv[r * (H + 2 * G) * D + h * D + j];
    __syncwarp();
    const int64_t size = seen.sizes[r], prompt = seen.shown[r], total = prompt + seen.lengths[r];
    float peak = -INFINITY, sum = 0, y[8] = {};
    for (int64_t t0 = window && total > window ? total - window : 0; t0 < total; t0 += 32) {
        const int64_t t = min(t0 + lane, total - 1);
        const bf16 *key, *value;
        if (t < prompt) {
            key = seen.prompts[r] + (layer * 2 * size + t) * width + g * D, value = key + size * width;
        } else {
            const int place = seen.table[r * seen.most + t - prompt];
            key = seen.slabs[place / seen.slab_size] + (layer * 2 * seen.slab_size + place % seen.slab_size) * width + g * D;
            value = key + seen.slab_size * width;
        }
        float score = 0;
        for (int64_t j = 0; j < D; j += 8) {
            const float4 eight = *(const float4*)(key + j);
            const bf16* k = (const bf16*)&eight;
            for (int e = 0; e < 8; e++) score += q[j + e] * (float)k[e];
        }
        score *= scale;
        if (cap > 0) score = cap * tanhf(score / cap);
        if (t0 + lane >= total) score = -INFINITY;
        const float now = fmaxf(peak, warp_max(score)), factor = expf(peak - now), p = expf(score - now);
        sum = sum * factor + warp_sum(p), peak = now;
        for_p[warp][lane] = p, for_v[warp][lane] = value;
        __syncwarp();
        for (int64_t j = lane, e = 0; j < D; j += 32, e++) {
            float own = y[e] * factor;
            for (int n = 0; n < 32; n++) own += for_p[warp][n] * (float)for_v[warp][n][j];
            y[e] = own;
        }
        __syncwarp();
    }
    if (i >= R * H) return;
    for (int64_t j = lane, e = 0; j < D; j += 32, e++) out[(r * H + h) * D + j] = bf16(y[e] / sum);
}

// Layers that read the same rows; their outputs stand side by side in y. The bias of a layer that is alone is
// left to whoever reads y.
inline void apply(const Linear* layers, int64_t count, bf16* x, int64_t rows, float* y) {
    static Scratch<float> for_low;
    int64_t outputs = 0;
    for (int64_t i = 0; i < count; i++) outputs += layers[i].n;
    const Matrix<bf16> input(x, rows, layers[0].k);
    const Matrix<float> all(y, rows, outputs);
    for (int64_t i = 0, first = 0; i < count; first += layers[i++].n) {
        const Linear& l = layers[i];
        const Matrix<float> own = all.part(first, l.n);
        product(input, false, matrix_of(*(const Weight*)l.weight), true, own);
        if (const SlotBranch* s = l.branches) {
            const Branch b{s->A, s->B, nullptr, nullptr, l.k, l.n, s->r, s->blocks, s->flags, (float)s->scale, 0, {}};
            LowRank(b).forward(input, for_low.of(rows * b.rank()), own);
        }
        if (count > 1 && l.bias) JLORA_EACH(add_bias_kernel, rows * l.n, own.data, own.stride, l.n, l.bias, rows * l.n);
    }
}
inline const float* only_bias(const Linear* layers, int64_t count) { return count == 1 ? layers[0].bias : nullptr; }

// attend(layer, qkv, out) is the attention of one layer. hidden (rows, C) is what the head reads.
template <typename Attend>
inline void run_tokens(const Model& m, const Block* blocks, const Tokens& tokens, const Attend& attend, float* hidden) {
    static Scratch<float> for_x, for_wide, for_turns;
    static Scratch<bf16> for_rows, for_qkv, for_attended;
    const int64_t R = tokens.count, C = m.C, wide = m.H * m.D, heads = wide + 2 * m.G * m.D, parts = m.gated ? 2 : 1, half = m.D / 2;
    float *x = for_x.of(R * C), *y = for_wide.of(R * std::max({heads, parts * m.inner, C}));
    float *cos = m.frequencies ? for_turns.of(R * m.D) : nullptr, *sin = cos ? cos + R * half : nullptr;
    bf16 *rows = for_rows.of(R * std::max(C, m.inner)), *qkv = for_qkv.of(R * heads), *attended = for_attended.of(R * wide);
    launch(embed_kernel, dim3(R), 256, 0, m.tokens, m.packed_tokens ? *m.packed_tokens : Weight{}, m.positions, tokens.ids,
        tokens.positions, (float)m.embedding_scale, x, C);
    if (cos) launch(angles_kernel, dim3(R), 64, 0, m.frequencies, tokens.positions, cos, sin, half);
    // x += y + bias, and its norm
    auto add = [&](const float* bias, const Norm& norm, auto* normed) {
        using Y = std::remove_pointer_t<decltype(normed)>;
        launch(add_norm_kernel<Y>, dim3(R), row_threads, 0, x, y, bias, x, norm, (float)m.eps, normed, C);
    };
    normalise(x, blocks[0].before_attention, m.eps, rows, R, C);
    for (int64_t layer = 0; layer < m.layers; layer++) {
        const Block& b = blocks[layer];
        const int64_t count = b.qkv[1].kind ? 3 : 1;
        apply(b.qkv, count, rows, R, y);
        JLORA_EACH(finish_qkv_kernel, R * heads / 2, y, only_bias(b.qkv, count), cos, sin, qkv, heads, m.D, m.H + m.G, R * heads / 2);
        JLORA_EACH(keep_kernel, R * 2 * m.G * m.D, qkv, tokens, layer, wide, m.G * m.D, R * 2 * m.G * m.D);
        attend(layer, qkv, attended);
        apply(&b.out, 1, attended, R, y);
        add(b.out.bias, b.before_mlp, rows);
        apply(b.in, parts, rows, R, y);
        JLORA_EACH(activate_kernel, R * m.inner, y, only_bias(b.in, parts), nullptr, rows, m.activation, m.gated != 0, m.inner, R * m.inner);
        apply(&b.down, 1, rows, R, y);
        if (layer + 1 < m.layers) add(b.down.bias, blocks[layer + 1].before_attention, rows);
        else add(b.down.bias, m.last, hidden);
    }
}

// Arrays of the host that kernels read, in one copy.
class Carried {
public:
    template <typename T>
    int64_t add(const T* from, int64_t count) {
        const int64_t at = (bytes_.size() + 15) / 16 * 16;
        bytes_.resize(at + count * sizeof(T));
        std::copy_n((const char*)from, count * sizeof(T), bytes_.data() + at);
        return at;
    }
    void send() {
        static Scratch<char> memory;
        there_ = to_card(memory, bytes_.data(), bytes_.size());
    }
    template <typename T>
    const T* at(int64_t place) const { return (const T*)(there_ + place); }

private:
    std::vector<char> bytes_;
    const char* there_ = nullptr;
};

inline void attend_to(const Seen& seen, const Model& m, const Block& b, int64_t layer, int64_t R, const bf16* qkv, bf16* out) {
    launch(step_attention_kernel, dim3(blocks_for(R * m.H, seen_warps)), 32 * seen_warps, 0, qkv, seen, layer, R, m.H, m.G, m.D,
        (float)m.scale, (float)m.cap, b.window, out);
}

// Prompts behind the `before` tokens that stand in their blocks already. hidden (P, C) on the host: the state
// of each one's last token.
inline void run_prompts(const Model& m, const Block* blocks, int64_t P, const int* ids, const int* positions, const int* lengths,
        const int* before, bf16* const* prompts, float* hidden) {
    std::vector<int> starts{0}, sizes, places, shown, first, last;
    bool resumed = false;
    std::vector<bf16*> owners;
    for (int64_t p = 0; p < P; p++) {
        const int start = starts.back();
        starts.push_back(start + lengths[p]);
        resumed |= before[p] > 0;
        for (int t = 0; t < lengths[p]; t++) {
            owners.push_back(prompts[p]), sizes.push_back(before[p] + lengths[p]), places.push_back(before[p] + t);
            shown.push_back(before[p] + t + 1);
            first.push_back(start), last.push_back(start + lengths[p] - 1);
        }
    }
    const int64_t R = starts.back();
    if (!R) return;
    const std::vector<int> none(R);
    Carried c;
    const int64_t at[] = {c.add(ids, R), c.add(positions, R), c.add(owners.data(), R), c.add(sizes.data(), R), c.add(places.data(), R),
        c.add(first.data(), R), c.add(last.data(), R), c.add(shown.data(), R), c.add(none.data(), R)};
    c.send();
    static Scratch<float> for_hidden, for_lse;
    float *states = for_hidden.of(R * m.C), *lse = for_lse.of(R * m.H);
    const Tokens tokens{R, c.at<int>(at[0]), c.at<int>(at[1]), c.at<bf16*>(at[2]), c.at<int>(at[3]), c.at<int>(at[4])};
    const Seen seen{tokens.blocks, tokens.sizes, c.at<int>(at[7]), c.at<int>(at[8]), c.at<int>(at[8]), nullptr, 0, 1};
    run_tokens(m, blocks, tokens, [&](int64_t layer, const bf16* qkv, bf16* out) {
        if (resumed) attend_to(seen, m, blocks[layer], layer, R, qkv, out);
        else attention({R, m.H, m.G, m.D, qkv, c.at<int>(at[5]), c.at<int>(at[6]), (float)m.scale, (float)m.cap, blocks[layer].window}, out, lse);
    }, states);
    for (int64_t p = 0; p < P; p++)
        copy(hidden + p * m.C, states + (starts[p + 1] - 1) * m.C, m.C * sizeof(float), cudaMemcpyDeviceToHost, "a copy");
}

// One more token a row; the last of a row's places in the table is the new token's own.
inline void run_step(const Model& m, const Block* blocks, int64_t R, const int* ids, const int* positions, bf16* const* prompts,
        const int* prompt_tokens, const int* table, int64_t most, const int* lengths, bf16* const* slabs, int64_t slab_size,
        int64_t slab_count, float* hidden) {
    if (!R) return;
    std::vector<bf16*> owners;
    std::vector<int> sizes(R, (int)slab_size), places;
    for (int64_t r = 0; r < R; r++) {
        const int place = table[r * most + lengths[r] - 1];
        owners.push_back(slabs[place / slab_size]), places.push_back(place % slab_size);
    }
    Carried c;
    const int64_t at[] = {c.add(ids, R), c.add(positions, R), c.add(owners.data(), R), c.add(sizes.data(), R), c.add(places.data(), R),
        c.add(prompts, R), c.add(prompt_tokens, R), c.add(table, R * most), c.add(lengths, R), c.add(slabs, slab_count)};
    c.send();
    static Scratch<float> for_hidden;
    float* states = for_hidden.of(R * m.C);
    const Tokens tokens{R, c.at<int>(at[0]), c.at<int>(at[1]), c.at<bf16*>(at[2]), c.at<int>(at[3]), c.at<int>(at[4])};
    const Seen seen{c.at<const bf16*>(at[5]), c.at<int>(at[6]), c.at<int>(at[6]), c.at<int>(at[7]), c.at<int>(at[8]), c.at<const bf16*>(at[9]), most, slab_size};
    run_tokens(m, blocks, tokens, [&](int64_t layer, const bf16* qkv, bf16* out) {
        attend_to(seen, m, blocks[layer], layer, R, qkv, out);
    }, states);
    copy(hidden, states, R * m.C * sizeof(float), cudaMemcpyDeviceToHost, "a copy from the card");
}
}  // namespace jlora::decode
