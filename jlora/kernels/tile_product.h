// What product.h says, by the tiles of tiles.h; one packing of a weight serves both directions.
#pragma once
#include "bf16.h"
#include "int4.h"
#include "int8.h"
#include "tile_turns.h"
#include "tile_weights.h"

namespace jlora {
// w: (n, k) row by row, or (k, n) when transposed.
inline void pack(const float* w, const Weight& out, bool transposed) {
    const int64_t along_n = transposed ? 1 : out.k, along_k = transposed ? out.n : 1;
    if (out.scales) return int8::pack(w, out, along_n, along_k);
    if (out.kind == int4_kind) return int4::pack(w, out, along_n, along_k);
    const int64_t rows = transposed ? out.k : out.n, columns = transposed ? out.n : out.k;
    #pragma omp parallel for collapse(2) schedule(static)
    for (int64_t r = 0; r < up_to(rows, 32); r += 32)
        for (int64_t c = 0; c < up_to(columns, 32); c += 32) {
            alignas(64) uint16_t block[2][512];  // 32 rows of w, rounded
            for (int64_t i = 0; i < 32; i++) {
                F16 left{}, right{};
                if (r + i < rows) load_some(w + (r + i) * columns + c, left, right, std::min<int64_t>(32, columns - c));
                store32(block[i / 16] + i % 16 * 32, left, right);
            }
            if (transposed) {
                pair_tiles(block[0], block[1], out.tile(c / 16, r / 32), out.tile(c / 16 + 1, r / 32));
            } else {
                turn_tile(block[0], out.tile(r / 16, c / 32));
                turn_tile(block[1], out.tile(r / 16 + 1, c / 32));
            }
        }
}
inline void unpack(const Weight& w, float* out, bool transposed) {
    const int64_t along_n = transposed ? 1 : w.k, along_k = transposed ? w.n : 1;
    const auto number = [&](int64_t n, int64_t k) {
        if (w.kind == int4_kind) return int4::at(w, n, k);
        return w.scales ? int8::at(w, n, k) * w.scales[n] : float_of(w.at(n, k));
    };
    #pragma omp parallel for schedule(static)
    for (int64_t n = 0; n < w.n; n++)
        for (int64_t k = 0; k < w.k; k++) out[n * along_n + k * along_k] = number(n, k);
}

// Row n of a bf16 weight.
inline void unpack_row(const Weight& w, int64_t n, float* row) {
    for (int64_t k = 0; k < w.k; k++) row[k] = float_of(w.at(n, k));
}

// Two tiles of 32 outputs by 32 inputs become two for the way back: [n / 2][k][n % 2], inputs 0-15
// to `left` and 16-31 to `right`.
inline void turn_tiles(const uint16_t* upper, const uint16_t* lower, uint16_t* left, uint16_t* right) {
#if defined(JLORA_AVX512_FORMS)
    // [k / 2][n / 2] groups of 4 numbers (n, k), (n, k + 1), (n + 1, k), (n + 1, k + 1): the inner two
    // change places, and then the matrix of groups is transposed.
    const __m512i swap = _mm512_set4_epi32(0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100);
    const uint16_t* from[2] = {upper, lower};
    uint16_t* to[2] = {left, right};
    for (int t = 0; t < 2; t++)
        for (int half = 0; half < 2; half++) {
            __m512i x[8];
            for (int i = 0; i < 8; i++)
                x[i] = _mm512_shuffle_epi8(_mm512_load_si512(from[t] + (half * 8 + i) * 32), swap);
            transpose8(x);
            for (int i = 0; i < 8; i++) _mm512_store_si512(to[half] + (t * 8 + i) * 32, x[i]);
        }
#else
    alignas(64) uint16_t rows[2][512];
    turn_tile(upper, rows[0]), turn_tile(lower, rows[1]);
    pair_tiles(rows[0], rows[1], left, right);
#endif
}

// Fetches line `line` of 16, of int4 blocks from k_tile on, `count` a tile that is made of them, of two tiles.
inline void fetch_blocks(const Weight& w, int64_t n_tile, int64_t k_tile, int64_t count, int64_t line) {
    if (line * 64 >= count * int4::block_bytes) return;
    const char* at = int4::block(w, n_tile, k_tile) + line * 64;
    tiles::fetch_line(at);
    tiles::fetch_line(at + w.stride);
}

// also(n, part): fetches a part, one for each line of a tile of weights, of what else is wanted for outputs n to
// n + 31.
struct NothingElse {
    void operator()(int64_t, int64_t) const {}
};
template <typename Also>
struct ForwardPanels {
    const Weights& all;
    const Also& also;
#if defined(JLORA_COLUMNS)
    static constexpr bool by_columns = true;
    template <bool int8, int R>
    tiles::Column<int8, R> column(int64_t p, int64_t half, const char* a) const {
        const Weight& w = find(all, p);
        if constexpr (int8) if (w.kind == int4_kind) return int4::column<R>(w, 2 * p + half, a);
        tiles::Column<int8, R> column;
        column.add_tiles(a, (const char*)w.tile(2 * p + half, 0), w.steps());
        return column;
    }
#endif
    void panel(int64_t p, int64_t s, int64_t n, char* room, const char*& b0, const char*& b1) const {
        const Weight& w = find(all, p);
        if (w.kind != int4_kind) {
            b0 = (const char*)w.tile(2 * p, s), b1 = b0 + w.stride;
            return;
        }
        for (int64_t n_tile = 2 * p; n_tile < 2 * p + 2; n_tile++) {
            const F16 fine = int4::ToBytes::fine(int4::steps_of(w) + n_tile * 16);
            for (int64_t k_tile = 2 * s; k_tile < 2 * (s + n); k_tile++) {
                char* half = room + (n_tile % 2 * 2 * n + k_tile - 2 * s) * (tiles::tile_bytes / 2);
                if (k_tile * 32 < w.k) int4::to_bytes(int4::block(w, n_tile, k_tile), fine, half);
                else std::memset(half, 0, tiles::tile_bytes / 2);
            }
        }
        b0 = room, b1 = room + n * tiles::tile_bytes;
    }
    void fetch(int64_t p, int64_t s, int64_t line) const {
        const int64_t n = p * 32;
        const Weight& w = find(all, p);
        if (w.kind == int4_kind) {
            fetch_blocks(w, 2 * p, 2 * (s + line / 16), 2, line % 16);
        } else {
            const char* at = (const char*)w.tile(2 * p, s) + line * 64;
            tiles::fetch_line(at);
            tiles::fetch_line(at + w.stride);
        }
        also(n, s * 16 + line);
    }
};
// The way back contracts over the outputs of all of them.
struct BackwardPanels {
    const Weights& all;
    static constexpr bool by_columns = false;
    void panel(int64_t p, int64_t s, int64_t n, char* room, const char*& b0, const char*& b1) const {
        uint16_t *left = (uint16_t*)room, *right = left + n * 512;
        for (int64_t i = 0; i < n; i++) {
            int64_t step = s + i;
            const Weight& w = find(all, step);
            if (w.scales) {
                int8::widen_tiles(w, step, p, left + i * 512, right + i * 512);
                continue;
            }
            if (w.kind == int4_kind) {
                alignas(64) uint16_t wide[2][512];
                for (int64_t t = 0; t < 2; t++) int4::widen(int4::block(w, 2 * step + t, p), wide[t]);
                turn_tiles(wide[0], wide[1], left + i * 512, right + i * 512);
                continue;
            }
            turn_tiles(w.tile(2 * step, p), w.tile(2 * step + 1, p), left + i * 512, right + i * 512);
        }
        b0 = (const char*)left, b1 = (const char*)right;
    }
    void fetch(int64_t p, int64_t s, int64_t line) const {
        int64_t step = s + line / 16;
        const Weight& w = find(all, step);
        if (w.kind == int4_kind) return fetch_blocks(w, 2 * step, p, 1, line % 16);
        const char* at = w.scales ? int8::half_tile(w, 2 * step, p) + line % 8 * 64
                                  : (const char*)w.tile(2 * step, p) + line % 16 * 64;
        tiles::fetch_line(at);
        tiles::fetch_line(at + w.stride);
    }
};

// sink(m, n, left, right): outputs n to n + 31 of row m. steady: see tiles::product; bf16 alone.
template <typename Sink, typename Also = NothingElse>
void product(const Rows& x, const Weights& all, Sink sink, bool steady = false, const Also& also = {}) {
    if (!x.rows) return;
    const ForwardPanels<Also> weights{all, also};
    if (all.list[0]->kind != bf16_kind) return int8::product(x, all, panels(all), weights, sink);
    tiles::product<false>((const char*)x.data, x.rows, panels(all), x.steps(), weights, sink, steady);
}
template <typename Sink>
void product_back(const Rows& dy, const Weights& all, Sink sink) {
    if (!dy.rows) return;
    const Weight& first = *all.list[0];
    // In int8 a step takes 64 neighbours of dy, which must be outputs of one weight; in bf16 it takes 32.
    bool whole = true;
    for (int64_t i = 0; i + 1 < all.count; i++) whole &= all.list[i]->n % 64 == 0;
    if (first.kind == int8_both_kind && whole) return int8::product_back(dy, all, sink);
    tiles::product<false>((const char*)dy.data, dy.rows, up_to(first.k, 32) / 32, panels(all), BackwardPanels{all}, sink);
}
inline int64_t weight_bytes(int64_t n, int64_t k, int64_t kind) {
    if (!tiles::permitted()) return 0;
    if (kind == int4_kind) return int4::bytes(n, k);
    if (kind == bf16_kind) return up_to(n, 32) * up_to(k, 32) * 2;
    return int8::bytes(n, k);
}
inline Weight weight_in(char* memory, int64_t n, int64_t k, int64_t kind) {
    if (kind == int4_kind) return {memory, n, k, up_to(k, 32) / 32 * int4::block_bytes, nullptr, kind};
    if (kind == bf16_kind) return {memory, n, k, up_to(k, 32) * 32, nullptr, kind};
    const float* scales = (const float*)(memory + up_to(n, 64) * up_to(k, 64));
    return {memory, n, k, up_to(k, 64) * 16, scales, kind};
}
}  // namespace jlora
