// Sixteen numbers as several vectors, for processors whose registers hold fewer: GCC would compare, convert and
// spread a vector of its own type one number after the other there. What lanes.h has for it and for those.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace jlora {
#if defined(__AVX2__)
constexpr int part_bytes = 32;
#else
constexpr int part_bytes = 16;
#endif
constexpr int parts = 64 / part_bytes;

template <typename T>
struct Sixteen {
    typedef T Part __attribute__((vector_size(part_bytes)));
    typedef T Number __attribute__((may_alias));
    Part part[parts];

    constexpr Sixteen() : part{} {}
    // The same bits as other numbers.
    template <typename U>
    JLORA_INLINE explicit Sixteen(const Sixteen<U>& bits) { for (int i = 0; i < parts; i++) part[i] = (Part)bits.part[i]; }
    Number& operator[](int i) { return ((Number*)part)[i]; }
    T operator[](int i) const { return ((const Number*)part)[i]; }

    template <typename Work>
    JLORA_INLINE static Sixteen each(Work work) {
        Sixteen y;
        for (int i = 0; i < parts; i++) y.part[i] = work(i);
        return y;
    }
#define JLORA_BINARY(op) \
    JLORA_INLINE friend Sixteen operator op(const Sixteen& a, const Sixteen& b) { return each([&](int i) { return a.part[i] op b.part[i]; }); } \
    JLORA_INLINE friend Sixteen operator op(const Sixteen& a, T b) { return each([&](int i) { return a.part[i] op b; }); } \
    JLORA_INLINE friend Sixteen operator op(T a, const Sixteen& b) { return each([&](int i) { return a op b.part[i]; }); } \
    JLORA_INLINE Sixteen& operator op##=(const Sixteen& b) { return *this = *this op b; } \
    JLORA_INLINE Sixteen& operator op##=(T b) { return *this = *this op b; }
    JLORA_BINARY(+) JLORA_BINARY(-) JLORA_BINARY(*) JLORA_BINARY(/) JLORA_BINARY(&) JLORA_BINARY(|) JLORA_BINARY(^)
#undef JLORA_BINARY
#define JLORA_COMPARISON(op) \
    JLORA_INLINE friend Sixteen<int32_t> operator op(const Sixteen& a, const Sixteen& b) { return Sixteen<int32_t>::each([&](int i) { return a.part[i] op b.part[i]; }); } \
    JLORA_INLINE friend Sixteen<int32_t> operator op(const Sixteen& a, T b) { return Sixteen<int32_t>::each([&](int i) { return a.part[i] op b; }); }
    JLORA_COMPARISON(<) JLORA_COMPARISON(>) JLORA_COMPARISON(<=) JLORA_COMPARISON(>=)
#undef JLORA_COMPARISON
    JLORA_INLINE friend Sixteen operator<<(const Sixteen& a, int n) { return each([&](int i) { return a.part[i] << n; }); }
    JLORA_INLINE friend Sixteen operator>>(const Sixteen& a, int n) { return each([&](int i) { return a.part[i] >> n; }); }
    JLORA_INLINE Sixteen operator-() const { return each([&](int i) { return -part[i]; }); }
    JLORA_INLINE Sixteen operator~() const { return each([&](int i) { return ~part[i]; }); }
};
typedef Sixteen<float> F16;
typedef Sixteen<int32_t> I16;
typedef Sixteen<uint32_t> U16;

JLORA_INLINE F16 load16(const float* p) {
    return F16::each([&](int i) { F16::Part v; std::memcpy(&v, p + i * 16 / parts, part_bytes); return v; });
}
JLORA_INLINE void store16(float* p, const F16& v) {
    for (int i = 0; i < parts; i++) std::memcpy(p + i * 16 / parts, &v.part[i], part_bytes);
}
typedef uint16_t HalfPart __attribute__((vector_size(part_bytes / 2)));
JLORA_INLINE F16 load16(const uint16_t* p) {
    return F16::each([&](int i) {
        HalfPart half;
        std::memcpy(&half, p + i * 16 / parts, part_bytes / 2);
        return (F16::Part)(__builtin_convertvector(half, U16::Part) << 16);
    });
}
JLORA_INLINE F16 load16(const int8_t* p) {
    typedef int8_t BytePart __attribute__((vector_size(part_bytes / 4)));
    return F16::each([&](int i) {
        BytePart bytes;
        std::memcpy(&bytes, p + i * 16 / parts, part_bytes / 4);
        return __builtin_convertvector(__builtin_convertvector(bytes, I16::Part), F16::Part);
    });
}
// The lower halves of the numbers.
JLORA_INLINE void store_halves(uint16_t* p, const U16& v) {
    for (int i = 0; i < parts; i++) {
        const HalfPart half = __builtin_convertvector(v.part[i], HalfPart);
        std::memcpy(p + i * 16 / parts, &half, part_bytes / 2);
    }
}
JLORA_INLINE void store_pairs(uint16_t* p, const U16& v) { std::memcpy(p, v.part, 64); }
// The lowest bytes of the numbers.
JLORA_INLINE void store_bytes(char* p, const I16& v) {
    typedef int8_t BytePart __attribute__((vector_size(part_bytes / 4)));
    for (int i = 0; i < parts; i++) {
        const BytePart bytes = __builtin_convertvector(v.part[i], BytePart);
        std::memcpy(p + i * 16 / parts, &bytes, part_bytes / 4);
    }
}
JLORA_INLINE F16 kept(F16 v) {
#if defined(__aarch64__)
    for (int i = 0; i < parts; i++) asm("" : "+w"(v.part[i]));
#else
    for (int i = 0; i < parts; i++) asm("" : "+x"(v.part[i]));
#endif
    return v;
}
JLORA_INLINE F16 blend(const I16& mask, const F16& yes, const F16& no) { return F16::each([&](int i) { return mask.part[i] ? yes.part[i] : no.part[i]; }); }
JLORA_INLINE U16 blend(const I16& mask, const U16& yes, const U16& no) { return U16::each([&](int i) { return mask.part[i] ? yes.part[i] : no.part[i]; }); }
JLORA_INLINE F16 floats(const I16& v) { return F16::each([&](int i) { return __builtin_convertvector(v.part[i], F16::Part); }); }
JLORA_INLINE I16 integers(const F16& v) { return I16::each([&](int i) { return __builtin_convertvector(v.part[i], I16::Part); }); }
JLORA_INLINE I16 load_integers(const int32_t* p) {
    return I16::each([&](int i) { I16::Part v; std::memcpy(&v, p + i * 16 / parts, part_bytes); return v; });
}
alignas(64) constexpr int32_t numbers_of_lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
static const I16 lane_numbers = load_integers(numbers_of_lanes);
typedef float F4 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
// join(a, b) of all lanes: first of those eight apart, then four, two, one.
template <typename Join>
JLORA_INLINE float fold16(const F16& v, Join join) {
    F4 quarters[4], half[2];
    std::memcpy(quarters, v.part, 64);
    for (int i = 0; i < 2; i++) half[i] = join(quarters[i], quarters[i + 2]);
    F4 all = join(half[0], half[1]);
    all = join(all, __builtin_shuffle(all, I4{2, 3, 0, 1}));
    return join(all, __builtin_shuffle(all, I4{1, 0, 3, 2}))[0];
}
JLORA_INLINE float sum16(const F16& v) { return fold16(v, [](F4 a, F4 b) { return a + b; }); }
JLORA_INLINE float largest16(const F16& v) { return fold16(v, [](F4 a, F4 b) { return b > a ? b : a; }); }
JLORA_INLINE bool any16(const I16& mask) {
    I4 quarters[4];
    std::memcpy(quarters, mask.part, 64);
    const I4 all = (quarters[0] | quarters[1]) | (quarters[2] | quarters[3]);
    return (all[0] | all[1] | all[2] | all[3]) != 0;
}
#if defined(__AVX2__)
JLORA_INLINE F16 even16(const F16& v) { return F16::each([&](int i) { return (F16::Part)_mm256_round_ps((__m256)v.part[i], 8); }); }
JLORA_INLINE F16 fma16(const F16& a, const F16& b, const F16& c) {
    return F16::each([&](int i) { return (F16::Part)_mm256_fmadd_ps((__m256)a.part[i], (__m256)b.part[i], (__m256)c.part[i]); });
}
JLORA_INLINE F16 quotient16(const F16& a, const F16& b) { return F16::each([&](int i) { return (F16::Part)_mm256_div_ps((__m256)a.part[i], (__m256)b.part[i]); }); }
JLORA_INLINE F16 load_float16(const uint16_t* p) {
    return F16::each([&](int i) { return (F16::Part)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + i * 8))); });
}
JLORA_INLINE void store_float16(uint16_t* p, const F16& v) {
    for (int i = 0; i < parts; i++) _mm_storeu_si128((__m128i*)(p + i * 8), _mm256_cvtps_ph((__m256)v.part[i], 0));
}
#elif defined(__aarch64__)
JLORA_INLINE F16 even16(const F16& v) { return F16::each([&](int i) { return (F16::Part)vrndnq_f32((float32x4_t)v.part[i]); }); }
JLORA_INLINE F16 fma16(const F16& a, const F16& b, const F16& c) {
    return F16::each([&](int i) { return (F16::Part)vfmaq_f32((float32x4_t)c.part[i], (float32x4_t)a.part[i], (float32x4_t)b.part[i]); });
}
JLORA_INLINE F16 quotient16(const F16& a, const F16& b) { return F16::each([&](int i) { return (F16::Part)vdivq_f32((float32x4_t)a.part[i], (float32x4_t)b.part[i]); }); }
JLORA_INLINE F16 load_float16(const uint16_t* p) {
    return F16::each([&](int i) { return (F16::Part)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + i * 4))); });
}
JLORA_INLINE void store_float16(uint16_t* p, const F16& v) {
    for (int i = 0; i < parts; i++) vst1_u16(p + i * 4, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v.part[i])));
}
#else
JLORA_INLINE F16 fma16(const F16& a, const F16& b, const F16& c) { return a * b + c; }
#endif
JLORA_INLINE F16 shuffle(const F16& v, const int32_t* from) {
    F16 y;
    for (int i = 0; i < 16; i++) y[i] = v[from[i]];
    return y;
}
}  // namespace jlora
