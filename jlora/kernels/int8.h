// int8 weights: one scale for each output, activations rounded to int8 row by row on the way.
//
// To activations `bias` is added; what that adds to each result, its `offset`, is known when the weight is packed.
#pragma once
#include <algorithm>
#include <cmath>
#include "int4.h"
#include "tile_turns.h"
#include "tile_weights.h"

namespace jlora::int8 {
// Behind a weight's scales: `bias` times the sums of its outputs' numbers, and of its inputs'.
inline int* output_offsets(const Weight& w) { return (int*)(w.scales + up_to(w.n, 64)); }
inline int* input_offsets(const Weight& w) { return output_offsets(w) + up_to(w.n, 64); }
inline int64_t bytes(int64_t n, int64_t k) { return up_to(n, 64) * (up_to(k, 64) + 8) + up_to(k, 64) * 4; }
inline int8_t& at(const Weight& w, int64_t n, int64_t k) {
    return ((int8_t*)w.tile(n / 16, k / 64))[k % 64 / 4 * 64 + n % 16 * 4 + k % 4];
}
inline void pack(const float* from, const Weight& w, int64_t along_n, int64_t along_k) {
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < up_to(w.n, 64); n++) {
        float most = 0;
        bool finite = true;
        for (int64_t k = 0; k < w.k && n < w.n; k++) {
            const float size = std::fabs(from[n * along_n + k * along_k]);
            most = std::max(most, size), finite &= std::isfinite(size);
        }
        const float scale = !finite ? NAN : most > 0 ? most / 127 : 1.0f;  // int8 cannot say so
        const_cast<float*>(w.scales)[n] = scale;
        int sum = 0;
        for (int64_t k = 0; k < up_to(w.k, 64); k++)
            sum += at(w, n, k) = n < w.n && k < w.k ? (int8_t)std::lrint(from[n * along_n + k * along_k] / scale) : 0;
        output_offsets(w)[n] = bias * sum;
    }
    #pragma omp parallel for schedule(static)
    for (int64_t k = 0; k < up_to(w.k, 64); k += 64) {
        int sums[64] = {};
        for (int64_t n = 0; n < up_to(w.n, 64); n += 16)
            for (int64_t i = 0; i < 1024; i++) sums[i / 64 * 4 + i % 4] += ((const int8_t*)w.tile(n / 16, k / 64))[i];
        for (int64_t i = 0; i < 64; i++) input_offsets(w)[k + i] = bias * sums[i];
    }
}

// A few numbers of a row that are far larger than the others, as language models have them: in int8 they
// would leave nothing of the rest, so they are multiplied apart, in float.
struct Outliers {
    static constexpr int most = 8;
    static constexpr float limit = 12;  // times the mean size of the row's numbers
    int count = 0;
    int column[most];
    float value[most];
};
inline F16 size(F16 v) { return blend(v < 0.0f, -v, v); }
// The numbers above the limit, as many as there is room for; gives the largest of the others, by lane.
template <typename Run>
inline F16 take_outliers(const Run& run, int64_t width, float limit, Outliers& apart) {
    F16 peaks{};
    for (int64_t k = 0; k < width; k += 16) {
        const F16 v = run(k), sizes = size(v);
        if (!any16(sizes > limit)) {
            peaks = larger(sizes, peaks);
            continue;
        }
        for (int i = 0; i < 16; i++) {
            if (sizes[i] <= limit || apart.count == Outliers::most) {
                peaks[i] = std::max(peaks[i], sizes[i]);
                continue;
            }
            apart.column[apart.count] = k + i;
            apart.value[apart.count++] = v[i];
        }
    }
    return peaks;
}
// Rows of int8 numbers as tiles of 16 rows x 64 columns, and what each row is to be multiplied with.
struct QuantisedRows { char* data; float* scales; Outliers* outliers; };
// columns: factors of the columns, filled up to whole tiles; null: none.
inline QuantisedRows quantise(const Rows& x, const float* columns) {
    JLORA_PART("rounding");
    static Buffer<char> memory;
    static Buffer<float> for_scales;
    static Buffer<Outliers> for_outliers;
    // Weights are zeros from `width` to the end of a tile, where rows are left as they are.
    const int64_t steps = up_to(x.width, 64) / 64, width = up_to(x.width, 32);
    const QuantisedRows out{memory.of(up_to(x.rows, 32) * steps * 64), for_scales.of(x.rows), for_outliers.of(x.rows)};
    #pragma omp parallel for schedule(static) if (x.rows > 1)
    for (int64_t m = 0; m < x.rows; m++) {
        const uint16_t* row = x.at(m, 0);
        const auto run = [&](int64_t k) {
            const F16 v = load16(row + k / 32 * 512 + k % 32);
            return columns ? v * load16(columns + k) : v;
        };
        F16 sums{}, peaks{};
        for (int64_t k = 0; k < width; k += 16) {
            const F16 sizes = size(run(k));
            sums += sizes, peaks = larger(sizes, peaks);
        }
        const float sum = sum16(sums), limit = Outliers::limit * sum / x.width;
        Outliers& apart = out.outliers[m];
        apart.count = 0;
        if (!std::isfinite(sum)) {  // int8 cannot say so, the scale can
            out.scales[m] = NAN;
            continue;
        }
        if (any16(peaks > limit)) peaks = take_outliers(run, width, limit, apart);
        const float most = largest16(peaks);
        out.scales[m] = most / 127;
        const float inverse = most > 0 ? 127 / most : 0.0f;
        const auto place = [&](int64_t k) { return out.data + (m / 16 * steps + k / 64) * tiles::tile_bytes + m % 16 * 64 + k % 64; };
        for (int64_t k = 0; k < width; k += 16) store_bytes(place(k), nearest16(run(k) * inverse) + bias);
        for (int j = 0; j < apart.count; j++) *place(apart.column[j]) = (char)bias;
    }
    return out;
}

// Of all outputs side by side what stands for each of them, `of` a weight.
template <typename T, typename Of>
inline const T* all_of(const Weights& all, Of of) {
    if (all.count == 1) return of(*all.list[0]);
    static Buffer<T> memory;
    int64_t width = 0;
    for (int64_t i = 0; i < all.count; i++) width += up_to(all.list[i]->n, 64);
    T* out = memory.of(width);
    for (int64_t i = 0, first = 0; i < all.count; first += all.list[i++]->n)
        std::copy_n(of(*all.list[i]), up_to(all.list[i]->n, 64), out + first);
    return out;
}
inline const float* steps_of(const Weight& w) { return w.kind == int4_kind ? int4::steps_of(w) : w.scales; }
inline const int* offsets_of(const Weight& w) { return w.kind == int4_kind ? int4::offsets_of(w) : output_offsets(w); }
inline const float* all_scales(const Weights& all) { return all_of<float>(all, steps_of); }
inline F16 without(F16 sums, const int* offset) { return floats((I16)sums - load_integers(offset)); }

// The numbers of 16 outputs that input k is multiplied with.
inline F16 outputs(const Weight& w, int64_t n_tile, int64_t k) {
    if (w.kind == int4_kind) return int4::outputs(w, n_tile, k);
    const I16 quads = load_integers((const int32_t*)((const char*)w.tile(n_tile, k / 64) + k % 64 / 4 * 64));
    return floats((quads << (int)(24 - k % 4 * 8)) >> 24);
}
// The numbers of 16 inputs from k on that output n is multiplied with.
inline F16 inputs(const Weight& w, int64_t n, int64_t k) {
    F16 v;
    for (int i = 0; i < 16; i++) v[i] = at(w, n, k + i);
    return v;
}

template <typename Panels, typename Sink>
void product(const Rows& x, const Weights& all, int64_t count, const Panels& weights, Sink sink) {
    const QuantisedRows q = quantise(x, nullptr);
    const float* scales = all_scales(all);
    const int* offsets = all_of<int>(all, offsets_of);
    tiles::product<true>(q.data, x.rows, count, all.list[0]->steps(), weights, [&](int64_t m, int64_t n, F16 left, F16 right) {
        left = without(left, offsets + n) * q.scales[m];
        right = without(right, offsets + n + 16) * q.scales[m];
        const Outliers& apart = q.outliers[m];
        for (int j = 0; j < apart.count; j++) {
            int64_t panel = n / 32;
            const Weight& w = find(all, panel);
            left += apart.value[j] * outputs(w, 2 * panel, apart.column[j]);
            right += apart.value[j] * outputs(w, 2 * panel + 1, apart.column[j]);
        }
        sink(m, n, left * load16(scales + n), right * load16(scales + n + 16));
    });
}

// The 32 inputs of panel p are one half of a tile of 64: 8 rows of 64 bytes.
inline const char* half_tile(const Weight& w, int64_t n_tile, int64_t p) {
    return (const char*)w.tile(n_tile, p / 2) + p % 2 * 512;
}
#if defined(JLORA_AVX512_FORMS)
// Four of its rows, 16 inputs of 16 outputs: byte k of lane l of z[j] becomes input k of output 4 l + j.
inline void by_outputs(const char* rows, __m512i* z) {
    const __m512i r0 = _mm512_load_si512(rows), r1 = _mm512_load_si512(rows + 64);
    const __m512i r2 = _mm512_load_si512(rows + 128), r3 = _mm512_load_si512(rows + 192);
    const __m512i a = _mm512_unpacklo_epi32(r0, r1), b = _mm512_unpackhi_epi32(r0, r1);
    const __m512i c = _mm512_unpacklo_epi32(r2, r3), d = _mm512_unpackhi_epi32(r2, r3);
    z[0] = _mm512_unpacklo_epi64(a, c), z[1] = _mm512_unpackhi_epi64(a, c);
    z[2] = _mm512_unpacklo_epi64(b, d), z[3] = _mm512_unpackhi_epi64(b, d);
}

// 32 outputs by the 32 inputs of panel p as two bf16 tiles for the way back, as turn_tiles makes them.
template <int lane>
inline void widen_lane(const __m512i* z, const float* scales, uint16_t* rows) {
    const __m512i mix = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
        21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (int j = 0; j < 4; j += 2) {
        const auto wide = [&](int i) {
            const __m512i numbers = _mm512_cvtepi8_epi32(_mm512_extracti32x4_epi32(z[i], lane));
            return _mm512_mul_ps(_mm512_cvtepi32_ps(numbers), _mm512_set1_ps(scales[4 * lane + i]));
        };
        const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(wide(j + 1), wide(j));
        _mm512_store_si512(rows + (2 * lane + j / 2) * 32, _mm512_permutexvar_epi16(mix, both));
    }
}
inline void widen_tiles(const Weight& w, int64_t step, int64_t p, uint16_t* left, uint16_t* right) {
    for (int t = 0; t < 2; t++)
        for (int half = 0; half < 2; half++) {
            __m512i z[4];
            by_outputs(half_tile(w, 2 * step + t, p) + half * 256, z);
            uint16_t* rows = (half ? right : left) + t * 256;
            const float* scales = w.scales + step * 32 + t * 16;
            widen_lane<0>(z, scales, rows), widen_lane<1>(z, scales, rows);
            widen_lane<2>(z, scales, rows), widen_lane<3>(z, scales, rows);
        }
}

// The way back in int8: tiles [n / 4][k][n % 4] of 64 outputs by 16 inputs.
inline void turn_bytes(const char* rows, char* out) {
    __m512i z[4];
    by_outputs(rows, z);
    const __m512i a = _mm512_unpacklo_epi8(z[0], z[1]), b = _mm512_unpackhi_epi8(z[0], z[1]);
    const __m512i c = _mm512_unpacklo_epi8(z[2], z[3]), d = _mm512_unpackhi_epi8(z[2], z[3]);
    const __m512i u0 = _mm512_unpacklo_epi16(a, c), u1 = _mm512_unpackhi_epi16(a, c);
    const __m512i u2 = _mm512_unpacklo_epi16(b, d), u3 = _mm512_unpackhi_epi16(b, d);
    const __m512i v0 = _mm512_shuffle_i32x4(u0, u1, 0x44), v1 = _mm512_shuffle_i32x4(u0, u1, 0xee);
    const __m512i v2 = _mm512_shuffle_i32x4(u2, u3, 0x44), v3 = _mm512_shuffle_i32x4(u2, u3, 0xee);
    _mm512_store_si512(out, _mm512_shuffle_i32x4(v0, v2, 0x88));
    _mm512_store_si512(out + 64, _mm512_shuffle_i32x4(v0, v2, 0xdd));
    _mm512_store_si512(out + 128, _mm512_shuffle_i32x4(v1, v3, 0x88));
    _mm512_store_si512(out + 192, _mm512_shuffle_i32x4(v1, v3, 0xdd));
}
#else
inline void widen_tiles(const Weight& w, int64_t step, int64_t p, uint16_t* left, uint16_t* right) {
    alignas(64) uint16_t rows[2][512];
    for (int t = 0; t < 2; t++) widen_half(half_tile(w, 2 * step + t, p), w.scales + step * 32 + t * 16, rows[t]);
    pair_tiles(rows[0], rows[1], left, right);
}
#endif
struct BackwardPanels {
    const Weights& all;
    const Weight& find(int64_t& step) const {
        int64_t i = 0;
        while (step >= up_to(all.list[i]->n, 64) / 64) step -= up_to(all.list[i++]->n, 64) / 64;
        return *all.list[i];
    }
    static constexpr bool by_columns = false;
    void panel(int64_t p, int64_t s, int64_t n, char* room, const char*& b0, const char*& b1) const {
        char *left = room, *right = room + n * tiles::tile_bytes;
        for (int64_t i = 0; i < n; i++) {
            int64_t step = s + i;
            const Weight& w = find(step);
            for (int t = 0; t < 4; t++) {
                const char* rows = half_tile(w, 4 * step + t, p);
                turn_bytes(rows, left + i * tiles::tile_bytes + t * 256);
                turn_bytes(rows + 256, right + i * tiles::tile_bytes + t * 256);
            }
        }
        b0 = left, b1 = right;
    }
    void fetch(int64_t p, int64_t s, int64_t line) const {
        int64_t step = s + line / 16;
        const Weight& w = find(step);
        tiles::fetch_line(half_tile(w, 4 * step + line % 4, p) + line / 4 % 4 * 128);
        tiles::fetch_line(half_tile(w, 4 * step + line % 4, p) + line / 4 % 4 * 128 + 64);
    }
};
template <typename Sink>
void product_back(const Rows& dy, const Weights& all, Sink sink) {
    const QuantisedRows q = quantise(dy, all_scales(all));  // the weights' scales belong to dy's columns
    const int64_t width = up_to(all.list[0]->k, 32);
    static Buffer<int> memory;
    int* offsets = memory.of(width);
    std::fill_n(offsets, width, 0);
    int64_t steps = 0;
    for (int64_t i = 0; i < all.count; i++) {
        steps += up_to(all.list[i]->n, 64) / 64;
        for (int64_t k = 0; k < width; k++) offsets[k] += input_offsets(*all.list[i])[k];
    }
    tiles::product<true>(q.data, dy.rows, width / 32, steps, BackwardPanels{all},
        [&](int64_t m, int64_t n, F16 left, F16 right) {
            left = without(left, offsets + n) * q.scales[m];
            right = without(right, offsets + n + 16) * q.scales[m];
            const Outliers& apart = q.outliers[m];
            for (int j = 0; j < apart.count; j++) {
                int64_t i = 0, output = apart.column[j];
                while (output >= all.list[i]->n) output -= all.list[i++]->n;
                left += apart.value[j] * inputs(*all.list[i], output, n);
                right += apart.value[j] * inputs(*all.list[i], output, n + 16);
            }
            sink(m, n, left, right);
        });
}
}  // namespace jlora::int8
