#pragma once
#include "cuda_runtime.h"
struct __nv_bfloat16 {
    uint16_t bits;
    __nv_bfloat16() = default;
    explicit __nv_bfloat16(float x) {
        uint32_t all;
        std::memcpy(&all, &x, 4);
        if (x != x) all |= 0x400000;
        else all += 0x7FFF + (all >> 16 & 1);  // to nearest, ties to even
        bits = all >> 16;
    }
    explicit operator float() const {
        const uint32_t all = (uint32_t)bits << 16;
        float x;
        std::memcpy(&x, &all, 4);
        return x;
    }
};
