// Several weights that read the same rows.
#pragma once
#include <cstdint>

namespace jlora {
inline int64_t up_to(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Weight;
// Their outputs stand side by side; all but the last have a multiple of 32 outputs. All are of one kind.
struct Weights {
    const Weight* list[3];
    int64_t count;
};
}  // namespace jlora
