// Low-rank branches of many adapters: each row is changed by that of its slot, y += B (A x). An adapter's are laid
// out once, when it is added, in the order in which a step reads them; sums are float32 and those of a row do
// not depend on the other rows, bit for bit.
#pragma once
#include <algorithm>
#include <vector>
#include "bf16.h"
#include "buffer.h"
#include "lanes.h"
#include "weights.h"

namespace jlora::decode {
// SLOT_BRANCH of decoder.py: the branch that one slot has on one layer.
struct SlotBranch {
    // A (rank / 4, lines, 4, numbers a line), lines of 64 bytes of its rows in turn, inputs filled up to a multiple of
    // 32; B (panels of 16 outputs, reach, 16), in bf16 (panels, reach / 2, 16, 2). A null: none.
    const void *A, *B;
    const int* from;         // (panels,) the first of the `reach` rows of A that a panel reads; -1: it has no branch
    int64_t rank, reach, narrow;  // narrow: A, B and A x are bf16, else float32
    // Read on a GPU alone, where A and B are those of the layer, with its scale (see lora.h).
    int64_t r, blocks, flags;
    double scale;
};

// Rows with their slots, those of a slot together in fours, which read A together.
struct Slots {
    struct Four { int slot, count; int64_t rows[4]; };
    std::vector<int> of;     // of each row; -1: it has no adapter
    std::vector<Four> fours;
    std::vector<int> present;  // slots that there are
    Slots(const int* slots, int64_t count, int64_t whole) : of(slots, slots + count) {
        of.resize(whole, -1);  // rows that only fill a block
        std::vector<int64_t> order(count);
        for (int64_t i = 0; i < count; i++) order[i] = i;
        std::stable_sort(order.begin(), order.end(), [&](int64_t i, int64_t j) { return of[i] < of[j]; });
        for (const int64_t row : order) {
            const int slot = of[row];
            if (slot < 0) continue;
            if (present.empty() || present.back() != slot) present.push_back(slot);
            if (fours.empty() || fours.back().slot != slot || fours.back().count == 4) fours.push_back({slot, 0, {}});
            fours.back().rows[fours.back().count++] = row;
        }
    }
};

// In an order that the compiler may not change.
inline float sum_lanes(F16 v) {
#if defined(__AVX512F__)
    v += __builtin_shuffle(v, I16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v += __builtin_shuffle(v, I16{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    v += __builtin_shuffle(v, I16{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    v += __builtin_shuffle(v, I16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
    return v[0];
#else
    return sum16(v);
#endif
}
// Numbers are multiplied line by line of 64 bytes: of A in float32 or bf16 with x in float32, or both in bf16.
typedef U16 Pairs;  // 32 bf16 numbers
inline F16 even(Pairs v) { return (F16)(v << 16); }
inline F16 odd(Pairs v) { return (F16)(v & 0xffff0000u); }
inline Pairs load_pairs(const uint16_t* p) { Pairs v; std::memcpy(&v, p, 64); return v; }
inline F16 add_products(F16 sum, const float* x, const float* a) { return sum + load16(x) * load16(a); }
inline F16 add_products(F16 sum, const float* x, const uint16_t* a) {
    return sum + load16(x) * load16(a) + load16(x + 16) * load16(a + 16);
}
inline F16 add_pairs(F16 sum, Pairs x, Pairs a) {
#if defined(__AVX512BF16__)
    return (F16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)a);
#else
    sum += even(x) * even(a);
    return sum + odd(x) * odd(a);
#endif
}
inline F16 add_products(F16 sum, const uint16_t* x, const uint16_t* a) { return add_pairs(sum, load_pairs(x), load_pairs(a)); }

constexpr int64_t ranks_together = 4;
// low[n][j] = row j of A . x[n] for N rows and four rows of A, whose lines stand in turn. next: fetched ahead.
template <int N, typename X, typename T>
inline void low_dots(const T* A, int64_t lines, const X* const* x, int64_t x_line, const char* next, float* const* low) {
    F16 sums[N][ranks_together] = {};
    for (int64_t i = 0; i < lines; i++)
        for (int j = 0; j < ranks_together; j++) {
            const T* a = A + (i * ranks_together + j) * (64 / sizeof(T));
            __builtin_prefetch(next + (i * ranks_together + j) * 64, 0, 2);
            for (int n = 0; n < N; n++) sums[n][j] = add_products(sums[n][j], x[n] + i * x_line, a);
        }
    for (int n = 0; n < N; n++)
        for (int j = 0; j < ranks_together; j++) low[n][j] = sum_lanes(sums[n][j]);
}
template <typename X, typename T>
inline void low_dots(int count, const T* A, int64_t lines, const X* const* x, int64_t x_line, const char* next, float* const* low) {
    if (count == 1) low_dots<1>(A, lines, x, x_line, next, low);
    else if (count == 2) low_dots<2>(A, lines, x, x_line, next, low);
    else if (count == 3) low_dots<3>(A, lines, x, x_line, next, low);
    else low_dots<4>(A, lines, x, x_line, next, low);
}
// The branches of layers that read the same rows. tables[i]: of layer i by slot, or null.
class SlotLowRank {
public:
    SlotLowRank(const SlotBranch* const* tables, int64_t count, const Slots& slots) : slots_(slots) {
        for (int64_t i = 0; i < count; i++) {
            tables_[i] = tables[i], starts_[i] = stride_;
            int64_t most = 0;
            if (tables[i]) for (const int slot : slots.present) most = std::max(most, tables[i][slot].A ? tables[i][slot].rank : 0);
            stride_ += most;
        }
        count_ = count;
    }
    bool any() const { return stride_ > 0; }

    // Keeps A x in static memory. width: of x, up to a multiple of 32. bf16(m): its row m as lines of 32 numbers,
    // 512 apart, or null where there are none; floats(m, row) writes it as floats.
    template <typename Bf16, typename Floats>
    void forward(int64_t width, const Bf16& bf16, const Floats& floats) {
        if (!any()) return;
        std::vector<Piece> pieces;
        bool wants_floats = false;
        for (const Slots::Four& four : slots_.fours)
            for (int64_t i = 0; i < count_; i++) {
                if (!tables_[i] || !tables_[i][four.slot].A) continue;
                const SlotBranch& b = tables_[i][four.slot];
                const int64_t bytes = width * (b.narrow ? 2 : 4);
                for (int64_t j = 0; j < b.rank; j += ranks_together)
                    pieces.push_back({&four, (const char*)b.A + j * bytes, starts_[i] + j, b.narrow != 0});
                wants_floats |= !b.narrow || !bf16(0);
            }
        const int64_t rows = slots_.of.size(), count = pieces.size();
        static Buffer<float> for_x, for_low;
        static Buffer<uint16_t> for_narrow;
        float *x = for_x.of(wants_floats ? rows * width : 0), *low = for_low.of(rows * stride_);
        uint16_t* narrow = for_narrow.of(rows * stride_);
        low_ = low, narrow_ = narrow;
        #pragma omp parallel
        {
            if (wants_floats) {
                #pragma omp for schedule(static)
                for (int64_t m = 0; m < rows; m++)
                    if (slots_.of[m] >= 0) floats(m, x + m * width);
            }
            #pragma omp for schedule(static)
            for (int64_t p = 0; p < count; p++) {
                const Piece& piece = pieces[p];
                const Slots::Four& four = *piece.four;
                const char* next = pieces[std::min<int64_t>(p + 4, count - 1)].A;
                const float* own[4];
                const uint16_t* own_bf16[4];
                float* out[4];
                for (int n = 0; n < four.count; n++) {
                    own[n] = x + four.rows[n] * width, own_bf16[n] = bf16(four.rows[n]);
                    out[n] = low + four.rows[n] * stride_ + piece.start;
                }
                if (!piece.narrow) low_dots(four.count, (const float*)piece.A, width / 16, own, 16, next, out);
                else if (wants_floats) low_dots(four.count, (const uint16_t*)piece.A, width / 32, own, 32, next, out);
                else low_dots(four.count, (const uint16_t*)piece.A, width / 32, own_bf16, 512, next, out);
                if (piece.narrow)
                    for (int n = 0; n < four.count; n++)
                        to_bf16(out[n], narrow + four.rows[n] * stride_ + piece.start, ranks_together);
            }
        }
    }
    // Fetches some of what `add` will read for `panels` panels of a layer: slots from part * factor / 2^20 on, see
    // fetch_factor; so that the parts together are all of it.
    int64_t fetch_factor(int64_t parts) const { return ((int64_t)slots_.present.size() << 20) / parts + 1; }
    void fetch(int64_t layer, int64_t panel, int64_t panels, int64_t part, int64_t factor) const {
        if (!any() || !tables_[layer]) return;
        const int64_t end = std::min<int64_t>(slots_.present.size(), (part + 1) * factor >> 20);
        for (int64_t s = part * factor >> 20; s < end; s++) {
            const SlotBranch& b = tables_[layer][slots_.present[s]];
            const int64_t bytes = b.reach * 16 * (b.narrow ? 2 : 4);
            const char* at = (const char*)b.B + panel * bytes;
            for (int64_t line = 0; b.A && line < panels * bytes; line += 64) __builtin_prefetch(at + line, 0, 3);
            asm volatile("");  // GCC drops calls that do nothing but fetch
        }
    }
    // y, 16 outputs of a layer for row m, with the branch's part added.
    F16 add(int64_t m, int64_t layer, int64_t panel, F16 y) const {
        const int slot = slots_.of[m];
        if (slot < 0 || !tables_[layer]) return y;
        const SlotBranch& b = tables_[layer][slot];
        if (!b.A || b.from[panel] < 0) return y;
        const int64_t at = m * stride_ + starts_[layer] + b.from[panel];
        if (!b.narrow) {
            const float* B = (const float*)b.B + panel * b.reach * 16;
            for (int64_t j = 0; j < b.reach; j++) y += low_[at + j] * load16(B + j * 16);
            return y;
        }
        const uint16_t* B = (const uint16_t*)b.B + panel * b.reach * 16;
        for (int64_t j = 0; j < b.reach; j += 2) {
            uint32_t pair;
            std::memcpy(&pair, narrow_ + at + j, 4);
            y = add_pairs(y, Pairs{} + pair, load_pairs(B + j * 16));
        }
        return y;
    }

private:
    struct Piece { const Slots::Four* four; const char* A; int64_t start; bool narrow; };
    const Slots& slots_;
    const SlotBranch* tables_[3] = {};
    int64_t starts_[3] = {}, stride_ = 0, count_ = 0;
    const float* low_ = nullptr;
    const uint16_t* narrow_ = nullptr;  // the same in bf16
};
}  // namespace jlora::decode
