#pragma once
#include <algorithm>
#include <cfloat>

#include "buffer.h"
#include "draw.h"
#include "vector_math.h"

namespace jlora {

// Inside, "forbidden" is -FLT_MAX, and infinities and NaN are told by their bits: so it stays right
// under -ffinite-math-only, where the compiler may assume that there are none.
constexpr uint32_t kNan = 0x7fc00000u, kInfinity = 0x7f800000u, kMinusInfinity = 0xff800000u;
constexpr int64_t kChunk = 128;

inline float float_of_bits(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }

// Copies a row, -inf becoming -FLT_MAX. False if it holds NaN or +inf.
inline bool copy_row(const float* from, float* to, int64_t size) {
    const uint32_t* bits = (const uint32_t*)from;
    uint32_t bad = 0;
    #pragma omp simd reduction(|:bad)
    for (int64_t i = 0; i < size; i++) {
        uint32_t b = bits[i];
        bad |= (uint32_t)((b & 0x7fffffffu) >= kInfinity) & (uint32_t)(b != kMinusInfinity);
        to[i] = b == kMinusInfinity ? -FLT_MAX : from[i];
    }
    return !bad;
}

inline float largest(const float* x, int64_t size) {
    float best = -FLT_MAX;
    #pragma omp simd reduction(max:best)
    for (int64_t i = 0; i < size; i++) best = x[i] > best ? x[i] : best;
    return best;
}

inline float sum_exp(const float* x, int64_t size, float shift) {
    float sum = 0;
    #pragma omp simd reduction(+:sum)
    for (int64_t i = 0; i < size; i++) sum += fast_exp(x[i] - shift);
    return sum;
}

// What becomes of the logits of each row, in this order; ids outside the vocabulary are skipped.
struct Edits {
    const int* penalised; int64_t penalised_size; const float* penalties;  // (rows, size), (rows,)
    const int* biased; int64_t biased_size; const float* biases;           // (rows, size) each
    const uint32_t* allowed; int64_t allowed_size;  // (rows, size) a bit for each word; null: all words are allowed
    const int* banned; int64_t banned_size;
    Edits row(int64_t m) const {
        return {penalised + m * penalised_size, penalised_size, penalties + m, biased + m * biased_size, biased_size,
            biases + m * biased_size, allowed ? allowed + m * allowed_size : nullptr, allowed_size, banned + m * banned_size, banned_size};
    }
    // The bits of 32 words, n of which is the first.
    uint32_t allows(int64_t n) const { return !allowed ? ~0u : n / 32 < allowed_size ? allowed[n / 32] : 0u; }
    // row: `count` logits of words n on, -FLT_MAX for minus infinity.
    void apply(int64_t n, int64_t count, const float* logits, float* row) const {
        // Each new value is computed from the logits, so an id given twice is penalised once.
        for (int64_t i = 0; i < penalised_size; i++) {
            const int64_t at = penalised[i] - n;
            if (at < 0 || at >= count || row[at] == -FLT_MAX) continue;
            row[at] = logits[at] < 0 ? logits[at] * *penalties : logits[at] / *penalties;
        }
        for (int64_t i = 0; i < biased_size; i++) {
            const int64_t at = biased[i] - n;
            if (at >= 0 && at < count && row[at] != -FLT_MAX) row[at] += biases[i];
        }
        for (int64_t i = 0; allowed && i < count; i += 32) {
            const uint32_t bits = allows(n + i);
            for (int64_t j = i; bits != ~0u && j < std::min(i + 32, count); j++)
                if (!(bits >> (j - i) & 1)) row[j] = -FLT_MAX;
        }
        for (int64_t i = 0; i < banned_size; i++)
            if (banned[i] >= n && banned[i] < n + count) row[banned[i] - n] = -FLT_MAX;
    }
};

// What rows have got: their k likeliest words, and where `draws` (rows,) is not null one each, which is drawn, or
// with temperature 0 the likeliest.
struct Chosen {
    int64_t k;
    float* values; int* ids;                                    // (rows, k)
    const Draw* draws; float* drawn_values; int* drawn_ids;     // (rows,) each
    Chosen row(int64_t m) const {
        if (!draws) return {k, values + m * k, ids + m * k, nullptr, nullptr, nullptr};
        return {k, values + m * k, ids + m * k, draws + m, drawn_values + m, drawn_ids + m};
    }
    bool is_drawn() const { return draws && draws->temperature > 0; }
    void fail() const {
        for (int64_t i = 0; i < k; i++) values[i] = float_of_bits(kNan), ids[i] = (int)i;
        if (draws) *drawn_values = float_of_bits(kNan), *drawn_ids = 0;
    }
    // Of a row that is not drawn `logits` may be null; values are logits until now.
    void finish(const float* logits, int64_t size, float peak, double log_sum) const {
        // The cast keeps the two subtractions apart: log_sum is lost beside a large logit.
        const auto logprob = [&](float x) {
            return x == -FLT_MAX ? float_of_bits(kMinusInfinity) : (float)((double)(x - peak) - log_sum);
        };
        for (int64_t i = 0; i < k; i++) values[i] = logprob(values[i]);
        if (!draws) return;
        *drawn_values = values[0], *drawn_ids = ids[0];
        if (!is_drawn() || peak == -FLT_MAX) return;
        *drawn_ids = drawn_word(logits, size, peak, *draws);
        *drawn_values = logprob(logits[*drawn_ids]);
    }
};

inline void row_topk(const float* logits, int64_t size, const Edits& edits, const Chosen& chosen, float* row, float* chunk_best) {
    const int64_t k = chosen.k;
    float* values = chosen.values;
    int* ids = chosen.ids;
    if (!copy_row(logits, row, size)) return chosen.fail();
    edits.apply(0, size, logits, row);
    float best = -FLT_MAX;
    for (int64_t at = 0, c = 0; at < size; at += kChunk, c++) {
        chunk_best[c] = largest(row + at, std::min(kChunk, size - at));
        best = std::max(best, chunk_best[c]);
    }
    double sum = 0;  // float sums of one chunk each: no rounding builds up over the row
    int64_t held = 0;
    for (int64_t at = 0, c = 0; at < size; at += kChunk, c++) {
        int64_t end = std::min(at + kChunk, size);
        sum += sum_exp(row + at, end - at, best);
        if (held == k && !(chunk_best[c] > values[k - 1])) continue;
        for (int64_t i = at; i < end; i++) {
            float x = row[i];
            if (held == k && !(x > values[k - 1])) continue;
            int64_t place = held < k ? held++ : k - 1;
            for (; place > 0 && values[place - 1] < x; place--) {  // equal ones stay in front
                values[place] = values[place - 1];
                ids[place] = ids[place - 1];
            }
            values[place] = x;
            ids[place] = (int)i;
        }
    }
    chosen.finish(row, size, best, std::log(sum));
}

inline void topk(const float* logits, int64_t rows, int64_t size, const Edits& edits, const Chosen& chosen) {
    #pragma omp parallel
    {
        thread_local Buffer<float> for_row, for_best;
        float *row = for_row.of(size), *chunk_best = for_best.of((size + kChunk - 1) / kChunk);
        #pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            row_topk(logits + r * size, size, edits.row(r), chosen.row(r), row, chunk_best);
        }
    }
}

}  // namespace jlora
