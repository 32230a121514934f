// A linear layer of a model that decodes, by the addresses of its weights: the one place where the
// native decoder multiplies. The struct is LINEAR of decoder.py.
#pragma once
#include "lora.h"
#include "packed_linear.h"

namespace jlora {
struct Linear {
    enum Kind : int64_t { none, packed, rows_first, columns_first };
    Kind kind;              // packed bf16, or floats stored as (n, k) or as (k, n)
    const void* weight;
    int64_t bytes, n, k;    // bytes of a packed weight
    const float* bias;      // (n,) or null
    const float *A, *B;     // of a low-rank branch, or null; see lora.h
    int64_t r, blocks, flags;
    double scale;
};

// Activations (rows, k), in the types that the layers which read them want.
struct Activations {
    float* full;       // null where nobody reads it
    uint16_t* rounded; // bf16, likewise
};
inline bool reads_full(const Linear& l) { return l.kind != Linear::none && (l.kind != Linear::packed || l.A); }
inline bool reads_rounded(const Linear& l) { return l.kind == Linear::packed; }

inline const Product& plain_product(memory::dim rows, const Linear& l) {
    using Key = std::tuple<memory::dim, memory::dim, memory::dim, bool, bool>;
    static std::map<Key, Product> made;
    const bool turned = l.kind == Linear::columns_first;
    const Key key{rows, l.n, l.k, turned, l.bias != nullptr};
    auto found = made.find(key);
    if (found == made.end()) {
        const auto tag = turned ? memory::format_tag::ba : memory::format_tag::ab;
        const memory::desc weights({l.n, l.k}, memory::data_type::f32, tag);
        auto pd = describe(rows, l.n, l.k, false, l.bias != nullptr, weights);
        found = made.emplace(key, Product{pd, dnnl::inner_product_forward(pd)}).first;
    }
    return found->second;
}

// y (rows, n) = x W^T + bias + the low-rank branch.
inline void apply(const Linear& l, const Activations& x, float* y, int64_t rows) {
    if (l.kind == Linear::packed)
        execute(product(rows, l.n, l.k, true, l.bias != nullptr), x.rounded,
            Blob{(uint8_t*)l.weight, l.bytes}.weight(), l.bias, y);
    else execute(plain_product(rows, l), x.full, l.weight, l.bias, y);
    if (!l.A) return;
    const LoraShape s{rows, l.k, l.n, l.r, l.blocks, l.flags, (float)l.scale, 0.0, 0};
    static std::vector<float> low;
    low.resize(rows * s.rank());
    lora_forward(s, x.full, l.A, l.B, y, low.data());
}
}  // namespace jlora
