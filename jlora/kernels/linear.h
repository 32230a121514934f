// The linear layers of a model that decodes, by the addresses of their weights: packed bf16 where the
// engine has packed them, and plain floats elsewhere. Results go to a function as in product.h.
#pragma once
#include "activation.h"
#include "branches.h"
#include "product.h"
#include "small_product.h"

namespace jlora::decode {
// LINEAR of decoder.py.
struct Linear {
    enum Kind : int64_t { none, packed, rows_first, columns_first };
    Kind kind;
    const void* weight;      // a `Weight`, or floats stored as (n, k) or as (k, n)
    int64_t n, k;
    const float* bias;       // (n,) or null
    const SlotBranch* branches;  // its low-rank branches by slot, or null
};

// What linear layers read, in the types that they want.
struct Input {
    Rows rounded;
    float* full;             // (rows, width up to a multiple of 32)
    bool wants_rounded = false, wants_full = false;
    int64_t stride() const { return up_to(rounded.width, 32); }
    void want(const Linear* layers, int64_t count) {
        wants_rounded = wants_full = false;
        for (int64_t i = 0; i < count; i++) {
            wants_rounded |= layers[i].kind == Linear::packed;
            wants_full |= layers[i].kind > Linear::packed;
        }
    }
    // 32 numbers of row m from column k, a multiple of 32, on; zeros beyond the width.
    void put(int64_t m, int64_t k, F16 left, F16 right) const {
        if (wants_full) store16(full + m * stride() + k, left), store16(full + m * stride() + k + 16, right);
        if (!wants_rounded) return;
        const int64_t count = rounded.width - k;
        if (Rows::filled_up || count >= 32) return store32(rounded.at(m, k), left, right);
        uint16_t all[32];
        store32(all, left, right);
        std::copy_n(all, count, rounded.at(m, k));
    }
    // make(k, n, left, right) makes n numbers from column k on, and zeros beyond.
    template <typename Make>
    void put_row(int64_t m, Make make) const {
        for (int64_t k = 0; k < rounded.width; k += 32) {
            F16 left{}, right{};
            make(k, std::min<int64_t>(32, rounded.width - k), left, right);
            put(m, k, left, right);
        }
    }
};
struct InputMemory {
    Buffer<uint16_t> rounded;
    Buffer<float> full;
    Input of(int64_t rows, int64_t width, const Linear* readers, int64_t count) {
        Input x{rows_in(rounded, rows, width), full.of(rows * up_to(width, 32))};
        x.want(readers, count);
        return x;
    }
};

// y = x W^T of plain floats: the rows of x become columns, which are vectors, 32 of them together. steady: see
// tiles::product.
template <typename Sink>
inline void product_of_floats(const Input& x, const Linear& l, Sink sink, bool steady = false) {
    const int64_t rows = x.rounded.rows, columns = up_to(rows, 32), panels = up_to(l.n, 32) / 32;
    static Buffer<float> for_turned;
    float* turned = for_turned.of(l.k * columns);
    const bool by_row = l.kind == Linear::rows_first;
    const float* w = (const float*)l.weight;
    omp_set_schedule(steady ? omp_sched_static : omp_sched_dynamic, steady ? 0 : 1);
    #pragma omp parallel
    {
        #pragma omp for schedule(static)
        for (int64_t c = 0; c < columns; c += 32)
            for (int64_t k = 0; k < l.k; k++)
                for (int64_t m = c; m < c + 32; m++)
                    turned[c * l.k + k * 32 + m - c] = m < rows ? x.full[m * x.stride() + k] : 0.0f;
        std::vector<float> y(32 * columns);
        #pragma omp for schedule(runtime)
        for (int64_t p = 0; p < panels; p++) {
            const int64_t count = std::min<int64_t>(32, l.n - p * 32);
            for (int64_t c = 0; c < columns; c += 32)
                small_product(count, 32, l.k, w + p * 32 * (by_row ? l.k : 1), by_row ? l.k : 1, by_row ? 1 : l.n,
                    turned + c * l.k, 32, y.data() + c, columns, false);
            for (int64_t m = 0; m < rows; m++) {
                float v[32] = {};
                for (int64_t i = 0; i < count; i++) v[i] = y[i * columns + m];
                sink(m, p * 32, load16(v), load16(v + 16));
            }
        }
    }
}

// Layers that are multiplied in one product: all packed, with whole panels of outputs, and in one form. (A trained
// layer is in bf16, whatever its neighbours are in.)
inline bool joined(const Linear* layers, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (layers[i].kind != Linear::packed || (i + 1 < count && layers[i].n % 32)) return false;
#if defined(JLORA_TILES)  // oneDNN has bf16 alone
        if (((const Weight*)layers[i].weight)->kind != ((const Weight*)layers[0].weight)->kind) return false;
#endif
    }
    return true;
}

// A x of the layers' branches, of what their products read.
inline SlotLowRank branches_of(const Linear* layers, int64_t count, const Input& x, const Slots& slots) {
    const SlotBranch* tables[3];
    for (int64_t i = 0; i < count; i++) tables[i] = layers[i].branches;
    SlotLowRank low(tables, count, slots);
    const bool packed = layers[0].kind == Linear::packed;
    const auto bf16 = [&](int64_t m) { return packed && Rows::filled_up ? x.rounded.at(m, 0) : nullptr; };
    low.forward(x.stride(), bf16, [&](int64_t m, float* row) {
        for (int64_t k = 0; k < x.stride(); k += 32) {
            const int64_t n = std::min<int64_t>(32, x.rounded.width - k);
            F16 left, right;
            if (!packed) left = load16(x.full + m * x.stride() + k), right = load16(x.full + m * x.stride() + k + 16);
            else {
                uint16_t all[32] = {};
                std::copy_n(x.rounded.at(m, k), n, all);
                left = load16(all), right = load16(all + 16);
            }
            store16(row + k, left), store16(row + k + 16, right);
        }
    });
    return low;
}

// The outputs of layers with the same input stand side by side. store(m, n, left, right, count): count of
// them, 32 at most, from output n of row m on.
template <typename Store>
void apply(const Linear* layers, int64_t count, const Input& x, const Slots& slots, Store store, int64_t first = 0) {
    if (count > 1 && !joined(layers, count)) {
        for (int64_t i = 0; i < count; first += layers[i++].n) apply(layers + i, 1, x, slots, store, first);
        return;
    }
    Weights weights{{}, count};
    int64_t ends[3], outputs = 0;
    for (int64_t i = 0; i < count; ends[i++] = outputs) {
        weights.list[i] = (const Weight*)layers[i].weight;
        outputs += layers[i].n;
    }
    const SlotLowRank low = branches_of(layers, count, x, slots);
    const bool packed = layers[0].kind == Linear::packed;
    const auto sink = [&](int64_t m, int64_t n, F16 left, F16 right) {
        int64_t i = 0;
        while (n >= ends[i]) i++;
        const int64_t own = std::min<int64_t>(32, ends[i] - n), at = n - (ends[i] - layers[i].n);
        if (const float* bias = layers[i].bias) {
            F16 l, r;
            load_some(bias + at, l, r, own);
            left += l, right += r;
        }
        if (low.any()) left = low.add(m, i, at / 16, left), right = low.add(m, i, at / 16 + 1, right);
        store(m, first + n, left, right, own);
    };
    if (!packed) return product_of_floats(x, layers[0], sink);
#if defined(JLORA_TILES)
    // What the sink reads of branches is fetched with the weights before it, see tiles::product.
    const int64_t factor = low.fetch_factor(weights.list[0]->steps() * 16);
    const auto fetch = [&](int64_t n, int64_t part) {
        int64_t i = 0;
        while (n >= ends[i]) i++;
        low.fetch(i, (n - (ends[i] - layers[i].n)) / 16, 2, part, factor);
    };
    if (low.any()) return product(x.rounded, weights, sink, false, fetch);
#endif
    product(x.rounded, weights, sink);
}

// The gated activation of two layers straight from their product, where that can be: a panel takes 16
// outputs of each, so that gate and value meet in registers. active (rows, n) is what it makes.
#if defined(JLORA_TILES)
struct Paired {
    const Weight &gate, &up;
    const SlotLowRank& low;
    int64_t up_layer, up_panel;  // of whose branches those of `up` are, and where they begin
    int64_t factor;
    bool in_order;
    int64_t tile(int64_t p) const {  // neighbours, which share a line of `active`, far apart in time
        const int64_t half = gate.n / 32;
        return in_order ? p : p < half ? 2 * p : 2 * (p - half) + 1;
    }
#if defined(JLORA_COLUMNS)
    static constexpr bool by_columns = true;
    template <bool int8, int R>
    tiles::Column<int8, R> column(int64_t p, int64_t half, const char* a) const {
        tiles::Column<int8, R> column;
        column.add_tiles(a, (const char*)(half ? up : gate).tile(tile(p), 0), gate.steps());
        return column;
    }
#endif
    void panel(int64_t p, int64_t s, int64_t, char*, const char*& b0, const char*& b1) const {
        b0 = (const char*)gate.tile(tile(p), s), b1 = (const char*)up.tile(tile(p), s);
    }
    void fetch(int64_t p, int64_t s, int64_t line) const {
        tiles::fetch_line((const char*)gate.tile(tile(p), s) + line * 64);
        tiles::fetch_line((const char*)up.tile(tile(p), s) + line * 64);
        const int64_t part = s * 16 + line;
        low.fetch(0, tile(p), 1, part, factor), low.fetch(up_layer, up_panel + tile(p), 1, part, factor);
    }
};
// count: 2, or 1 where one layer is both, the gate's outputs first.
inline bool gate_in_registers(int64_t activation, const Linear* layers, int64_t count, const Input& x, const Slots& slots,
        const Input& active) {
    const int64_t inner = active.rounded.width;
    if (!joined(layers, count) || active.wants_full || inner % 32) return false;
    for (int i = 0; i < count; i++)
        if (layers[i].bias) return false;
    const Weight& first = *(const Weight*)layers[0].weight;
    const Weight gate{first.tiles, inner, first.k, first.stride, first.scales, first.kind};
    Weight up = count == 2 ? *(const Weight*)layers[1].weight : gate;
    if (gate.kind != bf16_kind || up.kind != bf16_kind) return false;
    if (count == 1) up.tiles = (char*)first.tile(inner / 16, 0);
    const SlotLowRank low = branches_of(layers, count, x, slots);
    const Paired paired{gate, up, low, count - 1, count == 1 ? inner / 16 : 0, low.fetch_factor(gate.steps() * 16),
        x.rounded.rows <= tiles::few};
    tiles::product<false>((const char*)x.rounded.data, x.rounded.rows, inner / 16, x.rounded.steps(), paired,
        [&](int64_t m, int64_t n, F16 gate, F16 up) {
            const int64_t tile = paired.tile(n / 32), k = tile * 16;
            if (low.any()) gate = low.add(m, 0, tile, gate), up = low.add(m, paired.up_layer, paired.up_panel + tile, up);
            const F16 y = activation16(activation, gate) * up;
            uint16_t both[32];
            store32(both, y, y);
            std::memcpy(active.rounded.at(m, k / 32 * 32) + k % 32, both, 32);
        });
    return true;
}
#else
inline bool gate_in_registers(int64_t, const Linear*, int64_t, const Input&, const Slots&, const Input&) { return false; }
#endif
}  // namespace jlora::decode
