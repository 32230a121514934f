// Attention of one new token a row, over its prompt's keys, which all rows of the prompt share, and
// over the tokens generated since, each step's in an array of its own. Beams that change places
// change only a table of ancestors; no key is ever copied.
#pragma once
#include "attention.h"

namespace jlora {
struct DecodeShape {
    int64_t R, H, G, D, T, steps;  // rows, heads, key heads, head size, prompt tokens, steps so far
    float scale;
    int64_t width() const { return padded(T); }
};

// k (P, T, G, D) -> (P, G, D, width), what the scores of a prompt are multiplied with
inline void turn_keys(const float* k, float* out, int64_t P, int64_t T, int64_t G, int64_t D) {
    const int64_t width = padded(T);
    #pragma omp parallel for collapse(2)
    for (int64_t p = 0; p < P; p++)
        for (int64_t g = 0; g < G; g++)
            transpose_rows(k + (p * T * G + g) * D, G * D, T, D, width, out + (p * G + g) * D * width);
}

// q, out (R, H, D); k, v (R, G, D) of the new tokens; turned (P, G, D, width) and values (P, T, G, D)
// of the prompts; owner (R,) ascending; first (P,); ancestors (R, >= steps): the row of each earlier
// token in its step's arrays, whose addresses are keys_of[step] and values_of[step].
inline void decode_attention(const DecodeShape& s, const float* q, const float* k, const float* v,
        const float* turned, const float* values, const int* owner, const int* first,
        const int* ancestors, int64_t ancestors_row, const int64_t* keys_of, const int64_t* values_of, float* out) {
    const int64_t per = s.H / s.G, end = s.T + s.steps + 1, row_size = padded(std::max(s.width(), end));
    std::vector<int64_t> starts;  // first row of each prompt that has rows
    for (int64_t r = 0; r < s.R; r++)
        if (!r || owner[r] != owner[r - 1]) starts.push_back(r);
    starts.push_back(s.R);
    #pragma omp parallel
    {
        std::vector<float> scores, queries, sums;
        #pragma omp for collapse(2) schedule(dynamic)
        for (int64_t i = 0; i < (int64_t)starts.size() - 1; i++)
            for (int64_t g = 0; g < s.G; g++) {
                const int64_t r0 = starts[i], rows = starts[i + 1] - r0, M = rows * per;
                const int64_t p = owner[r0], from = first[p];
                scores.resize(M * row_size);
                queries.resize(M * s.D);
                sums.resize(M * s.D);
                for (int64_t r = 0; r < rows; r++)
                    std::copy_n(q + ((r0 + r) * s.H + g * per) * s.D, per * s.D, queries.data() + r * per * s.D);
                small_product(M, s.width(), s.D, queries.data(), s.D, 1,
                    turned + (p * s.G + g) * s.D * s.width(), s.width(), scores.data(), row_size, false);
                for (int64_t r = 0; r < rows; r++) {
                    const int* own = ancestors + (r0 + r) * ancestors_row;
                    for (int64_t t = 0; t <= s.steps; t++) {
                        const float* key = t < s.steps ? (const float*)keys_of[t] + (own[t] * s.G + g) * s.D
                                                       : k + ((r0 + r) * s.G + g) * s.D;
                        for (int64_t h = 0; h < per; h++)
                            scores[(r * per + h) * row_size + s.T + t] =
                                dot(queries.data() + (r * per + h) * s.D, key, s.D);
                    }
                }
                for (int64_t m = 0; m < M; m++)
                    softmax_row(scores.data() + m * row_size + from, end - from, end - from, s.scale);
                small_product(M, s.D, s.T - from, scores.data() + from, row_size, 1,
                    values + ((p * s.T + from) * s.G + g) * s.D, s.G * s.D, sums.data(), s.D, false);
                for (int64_t r = 0; r < rows; r++) {
                    const int* own = ancestors + (r0 + r) * ancestors_row;
                    for (int64_t t = 0; t <= s.steps; t++) {
                        const float* value = t < s.steps ? (const float*)values_of[t] + (own[t] * s.G + g) * s.D
                                                         : v + ((r0 + r) * s.G + g) * s.D;
                        for (int64_t h = 0; h < per; h++) {
                            const float weight = scores[(r * per + h) * row_size + s.T + t];
                            float* sum = sums.data() + (r * per + h) * s.D;
                            add_scaled(sum, weight, value, s.D);
                        }
                    }
                    std::copy_n(sums.data() + r * per * s.D, per * s.D, out + ((r0 + r) * s.H + g * per) * s.D);
                }
            }
    }
}
}  // namespace jlora
