// Low-rank branches of many adapters: each row is changed by that of its slot, y += B (A x). An adapter's are laid
// out once, when it is added, in the order in which a step reads them; sums are float32 and those of a row do
// not depend on the other rows, bit for bit.
#pragma once
#include <algorithm>
#include <vector>
#include "buffer.h"
#include "lanes.h"
#include "weights.h"

namespace jlora::decode {
// SLOT_BRANCH of decoder.py: the branch that one slot has on one layer.
struct SlotBranch {
    const void *A, *B;       // (rank, inputs up to a multiple of 32), (panels of 16 outputs, reach, 16); A null: none
    const int* from;         // (panels,) the first of the `reach` rows of A that a panel reads; -1: it has no branch
    int64_t rank, reach, narrow;  // narrow: A and B are bf16, else float32
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
    v += __builtin_shuffle(v, I16{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7});
    v += __builtin_shuffle(v, I16{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11});
    v += __builtin_shuffle(v, I16{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13});
    v += __builtin_shuffle(v, I16{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14});
    return v[0];
}
// low[n][j] = row j of A . x[n], for N rows and J rows of A.
template <int N, int J, typename T>
inline void low_dots(const T* A, int64_t in, const float* const* x, float* const* low) {
    F16 sums[N][J] = {};
    for (int64_t k = 0; k < in; k += 16)
        for (int j = 0; j < J; j++) {
            const F16 a = load16(A + j * in + k);
            for (int n = 0; n < N; n++) sums[n][j] += a * load16(x[n] + k);
        }
    for (int n = 0; n < N; n++)
        for (int j = 0; j < J; j++) low[n][j] = sum_lanes(sums[n][j]);
}
// Rows `from` to `to` of A.
template <int N, typename T>
inline void low_rows(const T* A, int64_t in, int64_t from, int64_t to, const float* const* x, float* const* low) {
    int64_t j = from;
    const auto some = [&](auto count) {
        float* own[N];
        for (int n = 0; n < N; n++) own[n] = low[n] + j;
        low_dots<N, decltype(count)::value>(A + j * in, in, x, own);
        j += count;
    };
    while (j + 4 <= to) some(std::integral_constant<int, 4>());
    while (j < to) some(std::integral_constant<int, 1>());
}
template <typename T>
inline void low_rows(int count, const void* A, int64_t in, int64_t from, int64_t to, const float* const* x, float* const* low) {
    const T* a = (const T*)A;
    if (count == 1) low_rows<1>(a, in, from, to, x, low);
    else if (count == 2) low_rows<2>(a, in, from, to, x, low);
    else if (count == 3) low_rows<3>(a, in, from, to, x, low);
    else low_rows<4>(a, in, from, to, x, low);
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

    // x (rows, in) with in a multiple of 32, `to_floats(row, x)` writes one row; keeps A x in static memory.
    template <typename ToFloats>
    void forward(int64_t in, const ToFloats& to_floats) {
        if (!any()) return;
        constexpr int64_t few = 8;  // rows of A in a piece of work
        struct Piece { const Slots::Four* four; int64_t layer, from, to; };
        std::vector<Piece> pieces;
        for (const Slots::Four& four : slots_.fours)
            for (int64_t i = 0; i < count_; i++) {
                const int64_t rank = tables_[i] && tables_[i][four.slot].A ? tables_[i][four.slot].rank : 0;
                for (int64_t j = 0; j < rank; j += few) pieces.push_back({&four, i, j, std::min(rank, j + few)});
            }
        const int64_t rows = slots_.of.size();
        static Buffer<float> for_x, for_low;
        float *x = for_x.of(rows * in), *low = for_low.of(rows * stride_);
        low_ = low;
        #pragma omp parallel
        {
            #pragma omp for schedule(static)
            for (int64_t m = 0; m < rows; m++)
                if (slots_.of[m] >= 0) to_floats(m, x + m * in);
            #pragma omp for schedule(dynamic, 2)
            for (size_t p = 0; p < pieces.size(); p++) {
                const auto& [four, layer, from, to] = pieces[p];
                const SlotBranch& b = tables_[layer][four->slot];
                const float* own[4];
                float* out[4];
                for (int n = 0; n < four->count; n++)
                    own[n] = x + four->rows[n] * in, out[n] = low + four->rows[n] * stride_ + starts_[layer];
                if (b.narrow) low_rows<uint16_t>(four->count, b.A, in, from, to, own, out);
                else low_rows<float>(four->count, b.A, in, from, to, own, out);
            }
        }
    }
    // Fetches part i of n of what `add` will read for a layer's panels `panel` and the one after it, or alone.
    void fetch(int64_t layer, int64_t panel, int64_t panels, int64_t i, int64_t n) const {
        if (!any() || !tables_[layer]) return;
        const int64_t slots = slots_.present.size();
        for (int64_t s = i * slots / n; s < (i + 1) * slots / n; s++) {
            const SlotBranch& b = tables_[layer][slots_.present[s]];
            const int64_t bytes = b.reach * 16 * (b.narrow ? 2 : 4);
            const char* at = (const char*)b.B + panel * bytes;
            for (int64_t line = 0; b.A && line < panels * bytes; line += 64) __builtin_prefetch(at + line, 0, 2);
        }
    }
    // y, 16 outputs of a layer for row m, with the branch's part added.
    F16 add(int64_t m, int64_t layer, int64_t panel, F16 y) const {
        const int slot = slots_.of[m];
        if (slot < 0 || !tables_[layer]) return y;
        const SlotBranch& b = tables_[layer][slot];
        if (!b.A || b.from[panel] < 0) return y;
        const float* low = low_ + m * stride_ + starts_[layer] + b.from[panel];
        if (b.narrow) return expand((const uint16_t*)b.B + panel * b.reach * 16, low, b.reach, y);
        return expand((const float*)b.B + panel * b.reach * 16, low, b.reach, y);
    }

private:
    template <typename T>
    static F16 expand(const T* B, const float* low, int64_t reach, F16 y) {
        for (int64_t j = 0; j < reach; j++) y += low[j] * load16(B + j * 16);
        return y;
    }
    const Slots& slots_;
    const SlotBranch* tables_[3] = {};
    int64_t starts_[3] = {}, stride_ = 0, count_ = 0;
    const float* low_ = nullptr;
};
}  // namespace jlora::decode
