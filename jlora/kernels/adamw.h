// AdamW's update of one parameter, number by number as the NumPy of jlora/training/adamw.py says
// and with its roundings: no sums put together, no division replaced.
#pragma once
#include <cmath>
#include <cstdint>

#pragma GCC push_options
#if !defined(__clang__)
#pragma GCC optimize("no-associative-math", "no-reciprocal-math", "fp-contract=off")
#endif
namespace jlora {
// See `AdamW._update_compiled`.
struct AdamWNumbers {
    float beta1, rest1, beta2, rest2, rate, root2, decay, eps, clip;
};
// m, v (n,) are updated, `to` gets the new values of `from`; loralib: its variant, else torch's.
inline void adamw(const float* from, const float* gradient, const AdamWNumbers& c, bool loralib, float* to, float* m,
        float* v, int64_t n) {
    #pragma omp parallel for simd schedule(static)
    for (int64_t i = 0; i < n; i++) {
        const float g = gradient[i] * c.clip;
        const float m1 = c.beta1 * m[i] + c.rest1 * g, v1 = c.beta2 * v[i] + c.rest2 * g * g;
        m[i] = m1, v[i] = v1;
        const float change = c.rate * (m1 / (std::sqrt(v1) / c.root2 + c.eps));
        to[i] = loralib ? (from[i] - change) * c.decay : from[i] * c.decay - change;
    }
}
}  // namespace jlora
#pragma GCC pop_options
