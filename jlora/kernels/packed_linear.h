// y = x W^T with W packed once into the layout that oneDNN likes best, in bf16 or fp32.
// Activations come and go as fp32; for bf16 they are rounded on the way in and the products are
// summed in fp32. oneDNN 2.2 (Jittor's own) picks AVX2, AVX-512 or AVX512_BF16 code at run time.
#pragma once
#include <dnnl.hpp>
#include <cstdint>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

namespace jlora {
using dnnl::memory;

inline dnnl::engine& engine() {
    static dnnl::engine e(dnnl::engine::kind::cpu, 0);
    return e;
}
inline dnnl::stream& stream() {
    static dnnl::stream s(engine());
    return s;
}
inline memory::data_type kind(bool bf16) {
    return bf16 ? memory::data_type::bf16 : memory::data_type::f32;
}

// The packed layout must not depend on the rows of one call, so it is asked for at a fixed count.
constexpr memory::dim typical_rows = 512;

inline dnnl::inner_product_forward::primitive_desc describe(
        memory::dim rows, memory::dim n, memory::dim k, bool bf16, const memory::desc& weights) {
    memory::desc src({rows, k}, kind(bf16), memory::format_tag::nc);
    memory::desc dst({rows, n}, memory::data_type::f32, memory::format_tag::nc);
    dnnl::inner_product_forward::desc d(dnnl::prop_kind::forward_inference, src, weights, dst);
    dnnl::primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
    return {d, attr, engine()};
}

inline const memory::desc& packed_layout(memory::dim n, memory::dim k, bool bf16) {
    static std::map<std::tuple<memory::dim, memory::dim, bool>, memory::desc> layouts;
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    auto key = std::make_tuple(n, k, bf16);
    auto found = layouts.find(key);
    if (found == layouts.end()) {
        memory::desc any({n, k}, kind(bf16), memory::format_tag::any);
        auto layout = describe(typical_rows, n, k, bf16, any).weights_desc();
        found = layouts.emplace(key, layout).first;
    }
    return found->second;
}

// Bytes of a packed weight; 0 where oneDNN has no such product for this processor.
inline int64_t packed_size(memory::dim n, memory::dim k, bool bf16) {
    try {
        return packed_layout(n, k, bf16).get_size();
    } catch (const dnnl::error&) {
        return 0;
    }
}

// w: (n, k) row by row, or (k, n) when transposed.
inline void pack(const float* w, void* out, memory::dim n, memory::dim k, bool transposed, bool bf16) {
    auto tag = transposed ? memory::format_tag::ba : memory::format_tag::ab;
    memory from(memory::desc({n, k}, memory::data_type::f32, tag), engine(), const_cast<float*>(w));
    memory to(packed_layout(n, k, bf16), engine(), out);
    dnnl::reorder(from, to).execute(stream(), from, to);
    stream().wait();
}

inline void unpack(void* packed, float* w, memory::dim n, memory::dim k, bool transposed, bool bf16) {
    auto tag = transposed ? memory::format_tag::ba : memory::format_tag::ab;
    memory from(packed_layout(n, k, bf16), engine(), packed);
    memory to(memory::desc({n, k}, memory::data_type::f32, tag), engine(), w);
    dnnl::reorder(from, to).execute(stream(), from, to);
    stream().wait();
}

inline void multiply(const float* x, void* packed, float* y,
        memory::dim rows, memory::dim n, memory::dim k, bool bf16) {
    if (!rows) return;
    auto pd = describe(rows, n, k, bf16, packed_layout(n, k, bf16));  // oneDNN caches primitives
    memory::desc plain({rows, k}, memory::data_type::f32, memory::format_tag::nc);
    memory src(plain, engine(), const_cast<float*>(x));
    static std::vector<uint16_t> rounded;  // operators run one after another
    if (bf16) {
        rounded.resize(rows * k);
        memory low(pd.src_desc(), engine(), rounded.data());
        dnnl::reorder(src, low).execute(stream(), src, low);
        src = low;
    }
    static std::vector<char> scratch;
    scratch.resize(pd.scratchpad_desc().get_size() + 64);
    auto aligned = (char*)(((uintptr_t)scratch.data() + 63) & ~(uintptr_t)63);
    dnnl::inner_product_forward(pd).execute(stream(), {
        {DNNL_ARG_SRC, src},
        {DNNL_ARG_WEIGHTS, memory(pd.weights_desc(), engine(), packed)},
        {DNNL_ARG_DST, memory(pd.dst_desc(), engine(), y)},
        {DNNL_ARG_SCRATCHPAD, memory(pd.scratchpad_desc(), engine(), aligned)},
    });
    stream().wait();
}
}  // namespace jlora
