// Matrix products by tiles of 16 rows of 64 bytes, by AMX, AVX-512, AVX2 or NEON. At the few hundred rows of a
// training step oneDNN 3.2 reaches 1,500 to 1,900 GFLOP/s of the 4,700 that the AMX units of two cores do.
// This reaches 2,200 to 3,000: operands are whole tiles (no strided reads), the next weights are fetched
// ahead, and one block of results is handed over while the next is multiplied.
#pragma once
#include <omp.h>
#include <algorithm>
#include <cstdint>
#include "buffer.h"
#include "lanes.h"
#include "native.h"
#include "profile.h"
#if JLORA_TILES == 1
#include "avx512.h"
#elif JLORA_TILES == 2
#include "amx.h"
#elif JLORA_TILES == 3
#include "avx2.h"
#else
#include "neon.h"
#endif

namespace jlora::tiles {
constexpr int64_t tile_bytes = 1024;     // 32 bf16 or 64 int8 numbers in each of 16 rows
constexpr int64_t block_floats = 1024;   // a block of results: 2 x 2 tiles of 16 x 16
#if JLORA_TILES != 3  // a panel is multiplied as it is; avx2.h makes another of it, once for all rows
constexpr int64_t wide_step = 0, chunk_steps = 10;
template <bool int8>
inline void widen(const char*, const char*, int64_t, char*) {}
template <bool int8, typename Between>
inline void wide_steps(const char* a0, const char* a1, const char* b0, const char* b1, const char*, int64_t count,
        bool first, float* c, Between between, int64_t rows) {
    steps<int8>(a0, a1, b0, b1, count, first, c, between, rows);
}
#endif

// Into L2. GCC takes a function of __builtin_prefetch alone for one without effect, and drops the calls.
#if defined(__aarch64__)
inline void fetch_line(const void* p) { asm volatile("prfm pldl2keep, %0" : : "Q"(*(const char*)p)); }
#else
inline void fetch_line(const void* p) { asm volatile("prefetcht1 %0" : : "m"(*(const char*)p)); }
#endif

// Products of at most `few` rows take the time of reading the weights: a thread reads its own from the first to the
// last, as memory likes it best. With AMX and NEON all are products of `product`, below.
#if JLORA_TILES == 1 || JLORA_TILES == 3
#define JLORA_COLUMNS
constexpr int64_t few = 4;
constexpr int64_t line_bytes = sizeof(Line), lines = 64 / line_bytes;
// The sums of R rows of `a` by the columns of a tile, while the weights come.
template <bool int8, int R>
struct Column {
    static constexpr int64_t ahead = 4096;  // bytes that are fetched ahead
    Line sums[R][lines] = {}, zero[lines] = {};
    // w: a line of weights, from its place `at` on (of `lines`), and four bytes of each row, 64 apart.
    void add(const char* x, int64_t at, Line w) {
        for (int i = 0; i < R; i++) {
            const Line own = spread(x + i * 64);
            sums[i][at] = int8 ? dot(sums[i][at], own, w) : dot_bf16(sums[i][at], own, w);
        }
        if (int8 && from_zero) zero[at] = dot(zero[at], Line{}, w);
    }
    void add_tiles(const char* a, const char* b, int64_t count) {
        for (int64_t k = 0; k < count; k++)
            for (int64_t row = 0; row < 16; row++) {
                const char* from = b + k * tile_bytes + row * 64;
                _mm_prefetch(from + ahead, _MM_HINT_T0);
                for (int64_t at = 0; at < lines; at++) add(a + k * tile_bytes + row * 4, at, *(const Line*)(from + at * line_bytes));
            }
    }
    void store(float* c) const {  // (R, 16)
        for (int i = 0; i < R; i++)
            for (int64_t at = 0; at < lines; at++) {
                typedef int Ints __attribute__((vector_size(line_bytes)));
                const Line all = int8 && from_zero ? (Line)((Ints)sums[i][at] - (Ints)zero[at]) : sums[i][at];
                std::memcpy(c + i * 16 + at * line_bytes / 4, &all, line_bytes);
            }
    }
};
// weights.column<int8, R>(p, half, a): the Column of a half of panel p.
template <bool int8, int R, typename Weights, typename Sink>
void product_of_few(const char* x, int64_t panels, const Weights& weights, Sink sink) {
    #pragma omp parallel for schedule(static)
    for (int64_t p = 0; p < panels; p++) {
        alignas(64) float c[2][R * 16];
        for (int half = 0; half < 2; half++) weights.template column<int8, R>(p, half, x).store(c[half]);
        for (int64_t m = 0; m < R; m++) sink(m, p * 32, load16(c[0] + m * 16), load16(c[1] + m * 16));
    }
}
#else
constexpr int64_t few = 0;
#endif

// Products of `rows` rows with `panels` panels of 32 columns, contracted over `count` tiles.
//
// x: (row tiles, an even number of them; count) tiles. weights.panel(p, s, n, room, b0, b1) sets b0 and
// b1 to the n tiles from s on of panel p's left and right columns, made in `room` if need be;
// weights.fetch(p, s, i) fetches the i-th line of each of the two ahead of time.
// sink(row, column, left, right) gets the results, 32 columns of a row at a time; for int8 the bits of
// 32-bit integers. `steady`: a panel goes to the same thread every time, for sinks that sum by thread and
// shall give the same bits in equal runs; else to whichever is free.
template <bool int8, typename Weights, typename Sink>
void product(const char* x, int64_t rows, int64_t panels, int64_t count, const Weights& weights, Sink sink,
        bool steady = false) {
    JLORA_PART(std::to_string(rows) + " x " + std::to_string(panels * 32) + " x " + std::to_string(count * (int8 ? 64 : 32))
        + (int8 ? " int8" : " bf16"), 2.0 * rows * panels * 32 * count * (int8 ? 64 : 32));
#if defined(JLORA_COLUMNS)
    if constexpr (Weights::by_columns) {
        if (rows == 1) return product_of_few<int8, 1>(x, panels, weights, sink);
        if (rows == 2) return product_of_few<int8, 2>(x, panels, weights, sink);
        if (rows == 3) return product_of_few<int8, 3>(x, panels, weights, sink);
        if (rows == 4) return product_of_few<int8, 4>(x, panels, weights, sink);
    }
#endif
    constexpr int64_t group = 32;       // steps whose activations, of most_rows rows, stay in L2
    constexpr int64_t most_rows = 640;
    const int64_t blocks = (rows + 31) / 32, threads = omp_get_max_threads();
    const int64_t wanted = panels < 3 * threads && blocks > 1 ? 2 : 1;
    const int64_t parts = std::max((rows + most_rows - 1) / most_rows, wanted);
    const int64_t per_part = (blocks + parts - 1) / parts;
    const bool spill = count > group;   // results then wait in memory for the next group of steps
    static Buffer<float> spilled;
    omp_set_schedule(steady ? omp_sched_static : omp_sched_dynamic, steady ? 0 : 1);  // 0: neighbours
    float* waiting = spill ? spilled.of(panels * blocks * block_floats) : nullptr;
    #pragma omp parallel
    {
        const TileScope scope;
        thread_local Buffer<float> for_results;
        thread_local Buffer<char> for_panel, for_wide;
        float* results = for_results.of(per_part * block_floats);
        char *room = for_panel.of(2 * chunk_steps * tile_bytes), *wide = for_wide.of(chunk_steps * wide_step);
        for (int64_t g = 0; g < count; g += group) {
            // Chunks of steps whose weights stay in L1.
            const int64_t end = std::min(count, g + group), chunks = (end - g + chunk_steps - 1) / chunk_steps;
            const int64_t size = (end - g + chunks - 1) / chunks;
            for (int64_t part = 0; part < parts; part++) {  // of each a thread gets the same panels, where `steady`
                const int64_t from = part * per_part, to = std::min(blocks, from + per_part);
                #pragma omp for schedule(runtime) nowait
                for (int64_t p = 0; p < panels; p++) {
                    if (from >= to) continue;
                    float* c = spill ? waiting + (p * blocks + from) * block_floats : results;
                    for (int64_t s = g; s < end; s += size) {
                        const int64_t n = std::min(size, end - s);
                        const char *b0, *b1;
                        weights.panel(p, s, n, room, b0, b1);
                        widen<int8>(b0, b1, n, wide);
                        const bool more = s + n < end, last = s + n == count;
                        const int64_t next_p = std::min(more ? p : p + (steady ? 1 : threads), panels - 1), next_s = more ? s + n : g;
                        const int64_t lines = std::min(size, count - next_s) * (tile_bytes / 64);
                        const auto own_rows = [&](int64_t b) { return std::min<int64_t>(32, rows - b * 32); };
                        int64_t turns = 0;
                        for (int64_t b = from; b < to; b++) turns += passes<int8>(own_rows(b));
                        const int64_t lines_per_turn = lines / (n * turns) + 1;
                        const float* done = nullptr;  // a finished block
                        int64_t done_row = 0, line = 0;
                        auto hand_over = [&](int64_t i_from, int64_t i_to) {
                            for (int64_t i = i_from; i < i_to && done_row + i < rows; i++) {
                                const float* r = done + i / 16 * 512 + i % 16 * 16;
                                sink(done_row + i, p * 32, load16(r), load16(r + 256));
                            }
                        };
                        for (int64_t b = from; b < to; b++) {
                            const char* a = x + (b * 2 * count + s) * tile_bytes;
                            float* own = c + (b - from) * block_floats;
                            // rows handed over a turn
                            const int64_t few = 32 / (n * passes<int8>(own_rows(b))) + 1;
                            int64_t handed = 0;
                            wide_steps<int8>(a, a + count * tile_bytes, b0, b1, wide, n, s == 0, own, [&] {
                                for (const int64_t until = std::min(lines, line + lines_per_turn); line < until; line++)
                                    weights.fetch(next_p, next_s, line);
                                if (!done) return;
                                const int64_t until = std::min<int64_t>(32, handed + few);
                                hand_over(handed, until), handed = until;
                            }, own_rows(b));
                            if (last) done = own, done_row = b * 32;
                        }
                        if (done) hand_over(0, 32);
                    }
                }
            }
            if (end < count) {
                #pragma omp barrier
            }
        }
    }
}
}  // namespace jlora::tiles
