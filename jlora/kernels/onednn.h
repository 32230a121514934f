// Products with bf16 weights by oneDNN, for processors without AMX and AVX-512's bf16: y = x W^T with W packed once into
// the layout that oneDNN likes best. It picks what the processor has at run time.
#pragma once
#include <algorithm>
#include <cstdint>
#include <dnnl.hpp>
#include <map>
#include <tuple>
#include <unordered_map>
#include "buffer.h"

namespace jlora::onednn {
using dnnl::memory;

inline dnnl::engine& engine() {
    static dnnl::engine e(dnnl::engine::kind::cpu, 0);
    return e;
}
inline dnnl::stream& stream() {
    static dnnl::stream s(engine());
    return s;
}

// The packed layout must not depend on the rows of one call, so it is asked for at a fixed count.
constexpr memory::dim typical_rows = 512;

inline dnnl::inner_product_forward::primitive_desc describe(
        memory::dim rows, memory::dim n, memory::dim k, const memory::desc& weights) {
    memory::desc src({rows, k}, memory::data_type::bf16, memory::format_tag::nc);
    memory::desc dst({rows, n}, memory::data_type::f32, memory::format_tag::nc);
    memory::desc bias;
    dnnl::primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
#if DNNL_VERSION_MAJOR >= 3
    return {engine(), dnnl::prop_kind::forward_inference, src, weights, bias, dst, attr};
#else
    return {{dnnl::prop_kind::forward_inference, src, weights, bias, dst}, attr, engine()};
#endif
}

inline const memory::desc& packed_layout(memory::dim n, memory::dim k) {
    static std::map<std::tuple<memory::dim, memory::dim>, memory::desc> layouts;
    auto found = layouts.find({n, k});
    if (found == layouts.end()) {
        memory::desc any({n, k}, memory::data_type::bf16, memory::format_tag::any);
        found = layouts.emplace(std::make_tuple(n, k), describe(typical_rows, n, k, any).weights_desc()).first;
    }
    return found->second;
}

// Bytes of a packed (n, k); 0 where oneDNN has no such product for this processor.
inline int64_t bytes(memory::dim n, memory::dim k) {
    try {
        return packed_layout(n, k).get_size();
    } catch (const dnnl::error&) {
        return 0;
    }
}

inline void convert(const memory::desc& from, const void* x, const memory::desc& to, void* y) {
    memory a(from, engine(), const_cast<void*>(x)), b(to, engine(), y);
    dnnl::reorder(a, b).execute(stream(), a, b);
    stream().wait();
}
inline memory::desc plain(memory::dim n, memory::dim k, bool transposed) {
    return {{n, k}, memory::data_type::f32, transposed ? memory::format_tag::ba : memory::format_tag::ab};
}

struct Product {
    dnnl::inner_product_forward::primitive_desc description;
    dnnl::inner_product_forward primitive;
};
// Made once for each number of rows: making one takes longer than a small product.
inline const Product& product(memory::dim rows, memory::dim n, memory::dim k) {
    static std::map<std::tuple<memory::dim, memory::dim, memory::dim>, Product> made;
    if (made.size() > 2000) made.clear();
    auto found = made.find({rows, n, k});
    if (found == made.end()) {
        auto pd = describe(rows, n, k, packed_layout(n, k));
        found = made.emplace(std::make_tuple(rows, n, k), Product{pd, dnnl::inner_product_forward(pd)}).first;
    }
    return found->second;
}

// x (rows, k) bf16, w a packed (n, k) -> y (rows, n) float32
inline void multiply(const void* x, const void* w, float* y, memory::dim rows, memory::dim n, memory::dim k) {
    const Product& p = product(rows, n, k);
    const auto& pd = p.description;
    static Buffer<char> scratch;
    std::unordered_map<int, memory> arguments = {
        {DNNL_ARG_SRC, memory(pd.src_desc(), engine(), const_cast<void*>(x))},
        {DNNL_ARG_WEIGHTS, memory(pd.weights_desc(), engine(), const_cast<void*>(w))},
        {DNNL_ARG_DST, memory(pd.dst_desc(), engine(), y)},
        {DNNL_ARG_SCRATCHPAD, memory(pd.scratchpad_desc(), engine(), scratch.of(pd.scratchpad_desc().get_size()))},
    };
    p.primitive.execute(stream(), arguments);
    stream().wait();
}
}  // namespace jlora::onednn
