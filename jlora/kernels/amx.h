// Contraction steps by Intel's AMX tiles; see tiles.h.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <cstdint>

namespace jlora::tiles {
// The kernel gives the tile registers to a process that asks for them.
inline bool permitted() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18) == 0;
    return granted;
}
struct TileScope {  // every thread configures its own registers
    TileScope() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, unused[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } all;
        for (int i = 0; i < 8; i++) all.bytes[i] = 64, all.rows[i] = 16;
        _tile_loadconfig(&all);
    }
    ~TileScope() { _tile_release(); }
};

constexpr bool unsigned_rows = true;  // of int8, see int8.h
template <bool int8>
inline int64_t passes(int64_t) { return 1; }
// `count` contraction steps of a block of 32 x 32 results c; a0, a1: tiles of its upper and lower
// rows, b0, b1: of its left and right columns, one tile a step. between() runs beside each step of each
// pass. Only the first `rows` of the 32 are wanted.
template <bool int8, typename Between>
inline void steps(const char* a0, const char* a1, const char* b0, const char* b1, int64_t count, bool first,
        float* c, Between between, int64_t rows = 32) {
    const bool lower = rows > 16;
    // GCC's tile loads do not say that they read memory.
    asm volatile("" ::: "memory");
    if (first) {
        _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
    } else {
        _tile_loadd(0, c, 64); _tile_loadd(1, c + 256, 64);
        _tile_loadd(2, c + 512, 64); _tile_loadd(3, c + 768, 64);
    }
    for (int64_t k = 0; k < count; k++) {
        const int64_t at = k * 1024;  // bytes of a tile
        _tile_stream_loadd(4, a0 + at, 64);
        _tile_loadd(6, b0 + at, 64);
        if constexpr (int8) { _tile_dpbusd(0, 4, 6); } else { _tile_dpbf16ps(0, 4, 6); }
        _tile_loadd(7, b1 + at, 64);
        if constexpr (int8) { _tile_dpbusd(1, 4, 7); } else { _tile_dpbf16ps(1, 4, 7); }
        if (lower) {
            _tile_stream_loadd(5, a1 + at, 64);
            if constexpr (int8) { _tile_dpbusd(2, 5, 6); _tile_dpbusd(3, 5, 7); }
            else { _tile_dpbf16ps(2, 5, 6); _tile_dpbf16ps(3, 5, 7); }
        }
        between();
    }
    _tile_stored(0, c, 64); _tile_stored(1, c + 256, 64);
    if (lower) { _tile_stored(2, c + 512, 64); _tile_stored(3, c + 768, 64); }
}
}  // namespace jlora::tiles
