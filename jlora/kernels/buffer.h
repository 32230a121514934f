// Scratch memory that operators keep from call to call.
#pragma once
#include <cstdint>
#include <vector>

namespace jlora {
// AMX and AVX-512 read lines of 64 bytes: from memory that begins between two lines products are half
// as fast, and Jittor's memory begins at multiples of 32.
constexpr int64_t line = 64;

// Memory that grows and begins on a line. One for each use: operators run one after another.
template <typename T>
struct Buffer {
    std::vector<char> bytes;
    T* of(int64_t count) {
        const size_t wanted = count * sizeof(T) + line;
        if (bytes.size() < wanted) bytes.resize(wanted);
        return (T*)(((uintptr_t)bytes.data() + line - 1) / line * line);
    }
};
}  // namespace jlora
