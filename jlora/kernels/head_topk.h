// The likeliest words of each row straight from the head's product: of its logits, which are as many
// as the vocabulary has words, only what may still be among the best is kept; of rows whose word is drawn also all
// of them. Says what topk.h says.
#pragma once
#include "activation.h"
#include "linear.h"
#include "target_loss.h"
#include "topk.h"

namespace jlora {
// What one thread has seen of a row.
struct Best {
    // Of exp(logit - peak): by lane of the last words, and of all before these, see RowSums.
    alignas(64) float sums[16] = {};
    double total = 0;
    float peak = -FLT_MAX;
    int taken = 0;
    bool bad = false;                 // NaN or +inf
    int64_t held = 0;

    // The list stands elsewhere: values falling, equal ones in the order of their ids.
    void insert(float x, int id, int64_t k, float* values, int* ids) {
        if (held == k && !(x > values[k - 1] || (x == values[k - 1] && id < ids[k - 1]))) return;
        int64_t place = held < k ? held++ : k - 1;
        for (; place > 0 && (values[place - 1] < x || (values[place - 1] == x && ids[place - 1] > id)); place--) {
            values[place] = values[place - 1];
            ids[place] = ids[place - 1];
        }
        values[place] = x;
        ids[place] = id;
    }
    // 32 logits from word n on, `count` of them words.
    void take(F16 left, F16 right, int64_t n, int64_t count, int64_t k, float* values, int* ids) {
        const float least = held == k ? values[k - 1] : -FLT_MAX;
        // Rare once the list is good; NaN comes here too.
        if (any16(~(left < least) | ~(right < least)) || count < 32) {
            alignas(64) float v[32];
            store16(v, left), store16(v + 16, right);
            alignas(64) float clean[32];
            bad |= !copy_row(v, clean, count);
            std::fill(clean + count, clean + 32, -FLT_MAX);
            const float most = largest(clean, 32);
            if (most > peak) {
                const float factor = fast_exp(peak - most);
                store16(sums, load16(sums) * factor);
                total *= factor, peak = most;
            }
            for (int64_t i = 0; i < count; i++) insert(clean[i], (int)(n + i), k, values, ids);
            left = load16(clean), right = load16(clean + 16);
        }
        store16(sums, add_in_order(add_in_order(load16(sums), exp16(left - peak)), exp16(right - peak)));
        if (++taken % 32 == 0) put_away();
    }
    void put_away() {
        total += double_sum16(load16(sums));
        store16(sums, F16{});
    }
};

// Which panels of 32 words have a word that a row's edits change.
class EditedPanels {
public:
    EditedPanels(const Edits& edits, int64_t rows, int64_t V) : edits_(edits), V_(V), words_((V + 2047) / 2048) {
        bits_.assign(rows * words_, 0);
        for (int64_t m = 0; m < rows; m++) {
            const Edits own = edits.row(m);
            mark(m, own.penalised, own.penalised_size);
            mark(m, own.biased, own.biased_size);
            mark(m, own.banned, own.banned_size);
        }
    }
    // Changes the logits of words n to n + 31 of row m.
    void apply(int64_t m, int64_t n, F16& left, F16& right) const {
        const Edits own = edits_.row(m);
        if (!(bits_[m * words_ + n / 2048] >> (n / 32 % 64) & 1) && own.allows(n) == ~0u) return;
        alignas(64) float v[32], edited[32];
        store16(v, left), store16(v + 16, right);
        std::copy_n(v, 32, edited);
        own.apply(n, 32, v, edited);
        left = load16(edited), right = load16(edited + 16);
    }

private:
    void mark(int64_t m, const int* ids, int64_t count) {
        for (int64_t i = 0; i < count; i++)
            if (ids[i] >= 0 && ids[i] < V_) bits_[m * words_ + ids[i] / 2048] |= 1ull << (ids[i] / 32 % 64);
    }
    const Edits& edits_;
    const int64_t V_, words_;
    std::vector<uint64_t> bits_;
};

// The logits of hidden (rows, C) by a head (V, C), 32 of a row at a time; a thread gets the same of them in every
// call. cap: of the logits, 0: none.
template <typename Sink>
inline void head_product(const float* hidden, int64_t rows, const decode::Linear& head, float cap, Sink sink) {
    static decode::InputMemory memory;
    const decode::Input x = memory.of(rows, head.k, &head, 1);
    #pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < rows; m++)
        x.put_row(m, [&](int64_t k, int64_t n, F16& left, F16& right) { load_some(hidden + m * head.k + k, left, right, n); });
    const auto capped = [&](int64_t m, int64_t n, F16 left, F16 right) {
        if (cap) left = soft_cap16(left, cap), right = soft_cap16(right, cap);
        sink(m, n, left, right);
    };
    if (head.kind == decode::Linear::packed) product(x.rounded, {{(const Weight*)head.weight}, 1}, capped, true);
    else decode::product_of_floats(x, head, capped, true);
}

// hidden (rows, C), head (V, C) -> logits (rows, V)
inline void head_logits(const float* hidden, int64_t rows, const decode::Linear& head, float* logits, float cap) {
    head_product(hidden, rows, head, cap, [&](int64_t m, int64_t n, F16 left, F16 right) {
        store_some(logits + m * head.n + n, left, right, std::min<int64_t>(32, head.n - n));
    });
}

// hidden (rows, C), head (V, C) -> chosen
inline void head_topk_together(const float* hidden, int64_t rows, const decode::Linear& head, const Edits& edits,
        const Chosen& chosen, float cap) {
    static Buffer<float> memory;
    const EditedPanels edited(edits, rows, head.n);
    const int64_t threads = omp_get_max_threads(), k = chosen.k, width = (head.n + 31) / 32 * 32;
    std::vector<float*> logits(rows);  // (V,) of each row whose word is drawn
    int64_t drawn = 0;
    for (int64_t m = 0; m < rows; m++) drawn += chosen.row(m).is_drawn();
    float* free = memory.of(drawn * width);
    for (int64_t m = 0; m < rows; m++)
        if (chosen.row(m).is_drawn()) logits[m] = free, free += width;
    std::vector<Best> parts(threads * rows);
    std::vector<float> part_values(threads * rows * k);
    std::vector<int> part_ids(threads * rows * k);
    head_product(hidden, rows, head, cap, [&](int64_t m, int64_t n, F16 left, F16 right) {
        const int64_t count = std::min<int64_t>(32, head.n - n), own = omp_get_thread_num() * rows + m;
        edited.apply(m, n, left, right);
        if (logits[m]) store16(logits[m] + n, left), store16(logits[m] + n + 16, right);
        parts[own].take(left, right, n, count, k, part_values.data() + own * k, part_ids.data() + own * k);
    });
    #pragma omp parallel for schedule(static)
    for (int64_t m = 0; m < rows; m++) {
        float peak = -FLT_MAX;
        bool bad = false;
        for (int64_t t = 0; t < threads; t++) {
            const Best& part = parts[t * rows + m];
            peak = std::max(peak, part.peak);
            bad |= part.bad;
        }
        const Chosen own = chosen.row(m);
        if (bad) {
            own.fail();
            continue;
        }
        Best all;
        double total = 0;
        for (int64_t t = 0; t < threads; t++) {
            Best& part = parts[t * rows + m];
            part.put_away();
            total += part.total * fast_exp(part.peak - peak);
            const int64_t at = (t * rows + m) * k;
            for (int64_t i = 0; i < part.held; i++) all.insert(part_values[at + i], part_ids[at + i], k, own.values, own.ids);
        }
        own.finish(logits[m], head.n, peak, std::log(total));
    }
}

// As above; of so many rows whose words are drawn that their logits would take much memory, some at a time.
inline void head_topk(const float* hidden, int64_t rows, const decode::Linear& head, const Edits& edits, const Chosen& chosen,
        float cap) {
    const int64_t most = chosen.draws ? 64 : rows;
    for (int64_t first = 0; first < rows; first += most)
        head_topk_together(hidden + first * head.k, std::min(most, rows - first), head, edits.row(first), chosen.row(first), cap);
}

// targets (rows,) -> the log-probability of each, (rows,)
inline void head_logprobs(const float* hidden, int64_t rows, const decode::Linear& head, const int* targets, float* values,
        float cap) {
    constexpr int64_t most = 512;  // rows at a time
    for (int64_t first = 0; first < rows; first += most) {
        const int64_t count = std::min(most, rows - first), threads = omp_get_max_threads();
        std::vector<RowSums> parts(threads * count);
        head_product(hidden + first * head.k, count, head, cap, [&](int64_t m, int64_t n, F16 left, F16 right) {
            parts[omp_get_thread_num() * count + m].take(left, right, n, std::min<int64_t>(32, head.n - n), targets[first + m]);
        });
        for (int64_t m = 0; m < count; m++) values[first + m] = -RowSum(&parts[m], threads, count).loss(head.n, 0);
    }
}
}  // namespace jlora
