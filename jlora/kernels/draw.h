// A word drawn from a row of logits by its probability, without sorting the row.
#pragma once
#include <algorithm>
#include <cfloat>
#include <utility>
#include <vector>

#include "buffer.h"
#include "vector_math.h"

namespace jlora {
// How a row's word is drawn; a line of the operators' input (rows, 5) float64. See Draw in topk.py.
struct Draw {
    double temperature, u, top_k, top_p, min_p;
};

// The words of a row in falling order of their logits, equal ones in the order of their ids. Words of about the same
// logit share a bin, of which the whole weight is known; only the bin where something ends is sorted.
class FallingWords {
public:
    // What a thread keeps from row to row: new memory costs more than what is done with it.
    struct Memory {
        Buffer<uint16_t> bins;
        std::vector<std::pair<float, int>> sorted;
    };
    // logits: -FLT_MAX or minus infinity for words that may not come, none NaN; peak: the largest.
    FallingWords(const float* logits, int64_t size, float peak, double temperature, Memory& memory)
        : logits_(logits), size_(size), peak_(peak), factor_((float)std::min(1 / temperature, 1e30)),
          bin_of_(memory.bins.of(size)), sorted_(memory.sorted) {
        float least = peak;
        #pragma omp simd reduction(min:least)
        for (int64_t i = 0; i < size; i++) {
            const float x = logits[i] > forbidden ? logits[i] : peak;
            least = x < least ? x : least;
        }
        const float range = std::min(peak - least, 40 / factor_);  // e^-40 and less share the last bin
        const float scale = range > 0 ? (bins - 1) / range : 0;
        for (int64_t at = 0; at < size; at += block) {
            const int64_t n = std::min(block, size - at);
            float weights[block];
            int32_t found[block];
            #pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                const float x = logits[at + i], place = (peak - x) * scale;
                weights[i] = weight(x);
                found[i] = x > forbidden ? (int32_t)(place < bins - 1 ? place : bins - 1) : bins;
            }
            for (int64_t i = 0; i < n; i++) {
                weight_of_[found[i]] += weights[i];
                count_of_[found[i]]++;
                bin_of_[at + i] = (uint16_t)found[i];
            }
        }
        for (int64_t b = 0; b < bins; b++) {
            if (count_of_[b]) last_ = b;
            all_.weight += weight_of_[b], all_.count += count_of_[b];
        }
    }
    struct End {
        int id = 0;         // of the last word
        double weight = 0;  // of all words up to it, itself included
        int64_t count = 0;
    };
    End all() const { return all_; }
    // The first `most` words, or fewer: up to the first one where they weigh `least`; with `above` more than that.
    End find(double least, bool above, int64_t most) {
        const auto reached = [&](double weight) { return above ? weight > least : weight >= least; };
        End end;
        for (int64_t b = 0; b <= last_; b++) {
            if (b < last_ && !reached(end.weight + weight_of_[b]) && end.count + count_of_[b] < most) {
                end.weight += weight_of_[b], end.count += count_of_[b];
                continue;
            }
            sort(b);
            for (const auto& [x, id] : sorted_) {
                end = {id, end.weight + weight(x), end.count + 1};
                if (reached(end.weight) || end.count == most) return end;
            }
        }
        return end;
    }
    // How many words weigh at least so much; the likeliest weighs 1.
    int64_t count_above(double least) const {
        int64_t count = 0;
        #pragma omp simd reduction(+:count)
        for (int64_t i = 0; i < size_; i++) count += (logits_[i] > forbidden) & (weight(logits_[i]) >= (float)least);
        return count;
    }

private:
    static constexpr int64_t bins = 1024, block = 128;
    static constexpr float forbidden = -3e38f;  // and less; infinities are compared as numbers
    __attribute__((always_inline)) float weight(float x) const { return fast_exp((x - peak_) * factor_); }
    void sort(int64_t bin) {
        sorted_.clear();
        for (int64_t i = 0; i < size_; i++)
            if (bin_of_[i] == bin) sorted_.push_back({logits_[i], (int)i});
        std::sort(sorted_.begin(), sorted_.end(), [](const auto& a, const auto& b) {
            return a.first > b.first || (a.first == b.first && a.second < b.second);
        });
    }
    const float* logits_;
    const int64_t size_;
    const float peak_, factor_;
    uint16_t* const bin_of_;  // `bins` of a word that may not come
    double weight_of_[bins + 1] = {};
    int32_t count_of_[bins + 1] = {};
    int64_t last_ = 0;
    End all_;
    std::vector<std::pair<float, int>>& sorted_;
};

// The word that draw.u falls on. If none may come, word 0.
inline int drawn_word(const float* logits, int64_t size, float peak, const Draw& draw) {
    if (peak == -FLT_MAX) return 0;
    thread_local FallingWords::Memory memory;
    FallingWords words(logits, size, peak, draw.temperature, memory);
    FallingWords::End kept = words.all();
    if (draw.top_k > 0 && draw.top_k < kept.count) kept = words.find(DBL_MAX, false, (int64_t)draw.top_k);
    int64_t most = kept.count;
    if (draw.min_p > 0) most = std::max<int64_t>(1, std::min(most, words.count_above(draw.min_p)));
    // The word that carries the weight over top_p still counts, so one is always left.
    if (draw.top_p < 1 || most < kept.count) kept = words.find(draw.top_p < 1 ? draw.top_p * kept.weight : DBL_MAX, false, most);
    return words.find(draw.u * kept.weight, true, kept.count).id;
}
}  // namespace jlora
