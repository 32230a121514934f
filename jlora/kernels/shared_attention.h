// Attention of rows that share earlier tokens: the beams of a prompt read its keys together, and each generated
// token is read once for all the beams that descend from it; likewise the tokens of a prompt that is run. What
// a row gets does not depend on the other rows, bit for bit: its sums run over its own tokens in their order,
// and what others see adds zeros.
#pragma once
#include <vector>
#include "attention.h"
#include "bf16.h"
#include "lanes.h"
#include "small_product.h"
#include "vector_math.h"

namespace jlora::decode {
// Where the key and the value of a token stand in a block of tokens (layers, 2, size, G * D), in float32 or bf16.
struct Place {
    char* block;
    int64_t size, index;
    // bytes: of a token's keys.
    char* at(int64_t layer, int64_t value, int64_t bytes) const {
        return block + ((layer * 2 + value) * size + index) * bytes;
    }
};

// Rows of one prompt: of its newest tokens, or some of its own. Scores stand as (tokens, columns), a column for
// each row and query head of a key head, so that everything done with them is done by vectors of columns.
struct Group {
    int64_t first, rows;
    Place prompt;               // its first token
    int64_t seen, shown;        // tokens of the prompt that some row sees, and that all see
    std::vector<Place> tokens;  // generated ones, each once
    std::vector<float> hidden;  // (tokens not shown to all, columns): 0, or far below any score where a row lacks it
    std::vector<int> places;    // of each generated token in its text
    std::vector<int> newest;    // of each row's newest token
};
constexpr float unseen = -1e30f;
inline int64_t columns_of(int64_t rows, int64_t per) { return (rows * per + 15) / 16 * 16; }

// A prompt's `length` tokens behind the `before` that were run earlier; the first of them is row `first`.
inline void group_prompt(std::vector<Group>& groups, int64_t first, Place prompt, int64_t before, int64_t length, int64_t per) {
    const int64_t some = std::max<int64_t>(1, 64 / per);  // rows a group
    for (int64_t t = 0; t < length; t += some) {
        const int64_t rows = std::min(some, length - t), columns = columns_of(rows, per), shown = before + t + 1;
        Group g{first + t, rows, prompt, shown + rows - 1, shown, {}, {}, {}, {}};
        g.hidden.assign((rows - 1) * columns, 0.0f);
        for (int64_t i = 0; i < rows; i++) {
            g.newest.push_back((int)(before + t + i));
            for (int64_t later = i; later < rows - 1; later++) std::fill_n(g.hidden.data() + later * columns + i * per, per, unseen);
        }
        groups.push_back(std::move(g));
    }
}

// A group for the rows of each prompt that stand together; the first of the R rows is row `at` of all tokens.
// prompts, prompt_tokens (R,): where each row's prompt has its keys and values, and how long it is. table
// (R, most): the places of the tokens that a row has generated, lengths[r] of them; place p is token
// p % slab_size of slab p / slab_size.
inline void group_rows(std::vector<Group>& groups, int64_t at, int64_t R, int64_t per, char* const* prompts, const int* prompt_tokens,
        const int* table, int64_t most, const int* lengths, char* const* slabs, int64_t slab_size, int64_t slab_count) {
    std::vector<int> seen(slab_count * slab_size, -1);  // the last group to read a token
    std::vector<int> numbers(slab_count * slab_size);   // and its number there
    for (int64_t first = 0, end; first < R; first = end) {
        for (end = first + 1; end < R && prompts[end] == prompts[first]; end++) {}
        const int64_t size = prompt_tokens[first];
        Group g{at + first, end - first, {prompts[first], size, 0}, size, size, {}, {}, {}, {}};
        const int64_t columns = columns_of(g.rows, per);
        for (int64_t r = first; r < end; r++) {
            g.newest.push_back(prompt_tokens[first] + lengths[r] - 1);
            for (int64_t t = 0; t < lengths[r]; t++) {
                const int place = table[r * most + t];
                if (seen[place] != (int)groups.size()) {
                    seen[place] = (int)groups.size();
                    numbers[place] = (int)g.tokens.size();
                    g.tokens.push_back({slabs[place / slab_size], slab_size, place % slab_size});
                    g.places.push_back(prompt_tokens[first] + (int)t);
                    g.hidden.resize(g.tokens.size() * columns, unseen);
                }
                std::fill_n(g.hidden.data() + numbers[place] * columns + (r - first) * per, per, 0.0f);
            }
        }
        groups.push_back(std::move(g));
    }
}

// scores (tokens, columns) -> exp(scale * (score - the column's largest)), by 16 columns; those of the
// tokens from `shown` on are hidden where `hidden` says so, and with a window those whose place in the text,
// place(token), is below the column's in `first`. totals (columns): their sums.
template <typename At>
inline void exponentials(float* scores, int64_t shown, int64_t tokens, const float* hidden, int64_t columns,
        const Scores& how, const At& place, const float* first, float* totals) {
    for (int64_t c = 0; c < columns; c += 16) {
        float* own = scores + c;
        const float* mask = hidden + c - shown * columns;
        F16 peak = F16{} + unseen, total{};
        for (int64_t t = 0; t < tokens; t++) {
            F16 s = load16(own + t * columns);
            if (how.cap) s = soft_cap16(s * how.scale, how.cap) / how.scale;
            if (t >= shown) s += load16(mask + t * columns);
            if (how.window) s = blend(F16{} + (float)place(t) >= load16(first + c), s, unseen);
            if (how.cap || t >= shown || how.window) store16(own + t * columns, s);
            peak = larger(s, peak);
        }
        for (int64_t t = 0; t < tokens; t++) {
            const F16 s = load16(own + t * columns), e = exp16((s - peak) * how.scale);
            const F16 p = blend(s < unseen / 2, F16{}, e);
            store16(own + t * columns, p);
            total += p;
        }
        store16(totals + c, total);
    }
}
inline void copy_numbers(const float* from, int64_t n, float* to) {
    int64_t i = 0;
    for (; i + 16 <= n; i += 16) store16(to + i, load16(from + i));
    for (; i < n; i++) to[i] = from[i];
}

// `tokens` rows of n numbers, `bytes` apart, as floats side by side.
inline void read_rows(const char* from, int64_t bytes, bool narrow, int64_t tokens, int64_t n, float* to) {
    for (int64_t t = 0; t < tokens; t++)
        if (narrow) to_float((const uint16_t*)(from + t * bytes), to + t * n, n);
        else copy_numbers((const float*)(from + t * bytes), n, to + t * n);
}

// q, out (R, H, D), for one layer. narrow: whether keys and values are in bf16.
inline void shared_attention(const std::vector<Group>& groups, int64_t layer, int64_t H, int64_t G, int64_t D,
        const Scores& how, bool narrow, const float* q, float* out) {
    const int64_t per = H / G, number = narrow ? sizeof(uint16_t) : sizeof(float), bytes = G * D * number;
    #pragma omp parallel
    {
        std::vector<float> queries, scores, keys, values, prompt, sums, totals, first;
        #pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < (int64_t)groups.size(); i++)
            for (int64_t g = 0; g < G; g++) {
                const Group& group = groups[i];
                const int64_t columns = columns_of(group.rows, per), U = group.tokens.size();
                // The prompt's tokens from `begin` on, which some row sees.
                first.assign(columns, 0.0f);
                int64_t begin = group.seen;
                for (int64_t m = 0; m < group.rows * per; m++) {
                    const int64_t seen = how.first(group.newest[m / per]);
                    first[m] = (float)seen, begin = std::min(begin, seen);
                }
                const int64_t T = group.seen - begin;
                queries.assign(D * columns, 0.0f);
                scores.resize((T + U) * columns);
                keys.resize(U * D);
                values.resize(U * D);
                sums.resize(columns * D);
                totals.resize(columns);
                for (int64_t m = 0; m < group.rows * per; m++) {
                    const float* query = q + ((group.first + m / per) * H + g * per + m % per) * D;
                    for (int64_t d = 0; d < D; d++) queries[d * columns + m] = query[d];
                }
                for (int64_t u = 0; u < U; u++) {
                    read_rows(group.tokens[u].at(layer, 0, bytes) + g * D * number, bytes, narrow, 1, D, keys.data() + u * D);
                    read_rows(group.tokens[u].at(layer, 1, bytes) + g * D * number, bytes, narrow, 1, D, values.data() + u * D);
                }
                const auto of_prompt = [&](int64_t value) -> const float* {
                    const char* at = group.prompt.at(layer, value, bytes) + begin * bytes + g * D * number;
                    if (!narrow) return (const float*)at;
                    prompt.resize(T * D);
                    read_rows(at, bytes, narrow, T, D, prompt.data());
                    return prompt.data();
                };
                const int64_t stride = narrow ? D : G * D;
                float* generated = scores.data() + T * columns;
                small_product(T, columns, D, of_prompt(0), stride, 1, queries.data(), columns, scores.data(), columns, false);
                small_product(U, columns, D, keys.data(), D, 1, queries.data(), columns, generated, columns, false);
                exponentials(scores.data(), group.shown - begin, T + U, group.hidden.data(), columns, how,
                    [&](int64_t t) { return t < T ? begin + t : group.places[t - T]; }, first.data(), totals.data());
                const int64_t M = group.rows * per;
                small_product(M, D, T, scores.data(), 1, columns, of_prompt(1), stride, sums.data(), D, false);
                small_product(M, D, U, generated, 1, columns, values.data(), D, sums.data(), D, true);
                for (int64_t m = 0; m < M; m++) {
                    float* result = out + ((group.first + m / per) * H + g * per + m % per) * D;
                    const float inverse = 1.0f / totals[m];
                    for (int64_t d = 0; d < D; d++) result[d] = sums[m * D + d] * inverse;
                }
            }
    }
}
}  // namespace jlora::decode
