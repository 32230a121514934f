// y = x W^T with W packed once into the layout that oneDNN likes best, in bf16 or fp32.
// Activations come and go as fp32; for bf16 they are rounded on the way in and the products are
// summed in fp32. oneDNN picks AVX2, AVX-512, AVX512_BF16 or (from 3.x on) AMX code at run time.
#pragma once
#include <algorithm>
#include <dnnl.hpp>
#include <cstdint>
#include <cstring>
#include <map>
#include <mutex>
#include <tuple>
#include <unordered_map>
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
// To the nearest bf16, ties to even; NaN stays NaN.
inline uint16_t bf16_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : rounded);
}
inline void round_to_bf16(const float* x, uint16_t* y, int64_t n) {
    #pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; i++) y[i] = bf16_of(x[i]);
}
inline memory::data_type kind(bool bf16) {
    return bf16 ? memory::data_type::bf16 : memory::data_type::f32;
}

// The packed layout must not depend on the rows of one call, so it is asked for at a fixed count.
constexpr memory::dim typical_rows = 512;

inline dnnl::inner_product_forward::primitive_desc describe(
        memory::dim rows, memory::dim n, memory::dim k, bool bf16, bool biased, const memory::desc& weights) {
    memory::desc bias;
    if (biased) bias = {{n}, memory::data_type::f32, memory::format_tag::a};
    memory::desc src({rows, k}, kind(bf16), memory::format_tag::nc);
    memory::desc dst({rows, n}, memory::data_type::f32, memory::format_tag::nc);
    dnnl::primitive_attr attr;
    attr.set_scratchpad_mode(dnnl::scratchpad_mode::user);
#if DNNL_VERSION_MAJOR >= 3
    return {engine(), dnnl::prop_kind::forward_inference, src, weights, bias, dst, attr};
#else
    return {{dnnl::prop_kind::forward_inference, src, weights, bias, dst}, attr, engine()};
#endif
}

inline const memory::desc& packed_layout(memory::dim n, memory::dim k, bool bf16) {
    static std::map<std::tuple<memory::dim, memory::dim, bool>, memory::desc> layouts;
    static std::mutex mutex;
    std::lock_guard<std::mutex> lock(mutex);
    auto key = std::make_tuple(n, k, bf16);
    auto found = layouts.find(key);
    if (found == layouts.end()) {
        memory::desc any({n, k}, kind(bf16), memory::format_tag::any);
        auto layout = describe(typical_rows, n, k, bf16, false, any).weights_desc();
        found = layouts.emplace(key, layout).first;
    }
    return found->second;
}

// AMX reads lines of 64 bytes: from a weight that begins between two lines it is half as fast, and
// Jittor's memory begins at multiples of 32. So a packed weight is kept in a blob with room to begin
// on a line, whose last byte says how far in it begins, in case the blob is ever copied elsewhere.
constexpr int64_t line = 64;

// Bytes of a blob; 0 where oneDNN has no such product for this processor.
inline int64_t packed_size(memory::dim n, memory::dim k, bool bf16) {
    try {
        return packed_layout(n, k, bf16).get_size() + line;
    } catch (const dnnl::error&) {
        return 0;
    }
}
struct Blob {
    uint8_t* begin;
    int64_t size;
    uint8_t& shift() const { return begin[size - 1]; }
    void* weight() const { return begin + shift(); }
    void* place_weight() const {
        shift() = (line - (uintptr_t)begin % line) % line;
        return weight();
    }
};

// Memory that grows and begins on a line. One for each use: operators run one after another.
template <typename T>
struct Buffer {
    std::vector<char> bytes;
    T* of(int64_t count) {
        const size_t wanted = count * sizeof(T) + line;
        if (bytes.size() < wanted) bytes.resize(wanted);
        return (T*)(((uintptr_t)bytes.data() + line - 1) / line * line);
    }
};

// w: (n, k) row by row, or (k, n) when transposed.
inline void pack(const float* w, Blob out, memory::dim n, memory::dim k, bool transposed, bool bf16) {
    auto tag = transposed ? memory::format_tag::ba : memory::format_tag::ab;
    memory from(memory::desc({n, k}, memory::data_type::f32, tag), engine(), const_cast<float*>(w));
    memory to(packed_layout(n, k, bf16), engine(), out.place_weight());
    dnnl::reorder(from, to).execute(stream(), from, to);
    stream().wait();
}

inline void unpack(Blob packed, float* w, memory::dim n, memory::dim k, bool transposed, bool bf16) {
    auto tag = transposed ? memory::format_tag::ba : memory::format_tag::ab;
    memory from(packed_layout(n, k, bf16), engine(), packed.weight());
    memory to(memory::desc({n, k}, memory::data_type::f32, tag), engine(), w);
    dnnl::reorder(from, to).execute(stream(), from, to);
    stream().wait();
}

struct Product {
    dnnl::inner_product_forward::primitive_desc description;
    dnnl::inner_product_forward primitive;
};

// Made once for each number of rows: making one takes longer than a small product.
inline const Product& product(memory::dim rows, memory::dim n, memory::dim k, bool bf16, bool biased) {
    using Key = std::tuple<memory::dim, memory::dim, memory::dim, bool, bool>;
    static std::map<Key, Product> made;
    if (made.size() > 2000) made.clear();
    const Key key{rows, n, k, bf16, biased};
    auto found = made.find(key);
    if (found == made.end()) {
        auto pd = describe(rows, n, k, bf16, biased, packed_layout(n, k, bf16));
        found = made.emplace(key, Product{pd, dnnl::inner_product_forward(pd)}).first;
    }
    return found->second;
}

inline void execute(const Product& p, const void* x, const void* weight, const float* bias, float* y) {
    const auto& pd = p.description;
    static Buffer<char> scratch;
    std::unordered_map<int, memory> arguments = {
        {DNNL_ARG_SRC, memory(pd.src_desc(), engine(), const_cast<void*>(x))},
        {DNNL_ARG_WEIGHTS, memory(pd.weights_desc(), engine(), const_cast<void*>(weight))},
        {DNNL_ARG_DST, memory(pd.dst_desc(), engine(), y)},
        {DNNL_ARG_SCRATCHPAD, memory(pd.scratchpad_desc(), engine(), scratch.of(pd.scratchpad_desc().get_size()))},
    };
    if (bias) arguments[DNNL_ARG_BIAS] = memory(pd.bias_desc(), engine(), const_cast<float*>(bias));
    p.primitive.execute(stream(), arguments);
    stream().wait();
}

// x: (rows, k) in the type of the packed weight; bias: (n,) or null.
inline void multiply_as_stored(const void* x, Blob packed, const float* bias, float* y,
        memory::dim rows, memory::dim n, memory::dim k, bool bf16) {
    execute(product(rows, n, k, bf16, bias != nullptr), x, packed.weight(), bias, y);
}

// x: (rows, k) float32, rounded on the way where the weight is bf16.
inline void multiply(const float* x, Blob packed, const float* bias, float* y,
        memory::dim rows, memory::dim n, memory::dim k, bool bf16) {
    if (!rows) return;
    if (!bf16) return multiply_as_stored(x, packed, bias, y, rows, n, k, bf16);
    static Buffer<uint16_t> rounded;
    uint16_t* low = rounded.of(rows * k);
    round_to_bf16(x, low, rows * k);
    multiply_as_stored(low, packed, bias, y, rows, n, k, bf16);
}
}  // namespace jlora
