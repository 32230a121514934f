// Products, attention and vectors of jlora's kernels against plain loops, for a processor that this machine may
// only emulate: `make arm-check` compiles it for Arm and runs it. Prints what it has compared; ends with 1 where a
// result is off.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <vector>
#include "../jlora/kernels/block.h"
using namespace jlora;

static std::mt19937 generator(1);
static std::vector<float> normal(int64_t n, float scale = 1) {
    std::normal_distribution<float> numbers(0, scale);
    std::vector<float> v(n);
    for (float& x : v) x = numbers(generator);
    return v;
}
static int failures = 0;
static void compare(const char* what, const std::vector<float>& got, const std::vector<double>& wanted, double limit) {
    double error = 0, size = 1e-30;
    for (size_t i = 0; i < wanted.size(); i++) {
        error += (got[i] - wanted[i]) * (got[i] - wanted[i]), size += wanted[i] * wanted[i];
        if (std::isnan(got[i]) != std::isnan(wanted[i])) error = INFINITY;
    }
    const double relative = std::sqrt(error / size);
    const bool right = relative <= limit;
    failures += !right;
    std::printf("%s  %-34s %.1e of at most %.0e\n", right ? "right" : "WRONG", what, relative, limit);
}

static void vectors() {
    std::vector<float> x = normal(16, 20), y(16);
    std::vector<double> wanted(16);
    const auto check = [&](const char* what, F16 v, const std::function<double(float)>& f, double limit) {
        store16(y.data(), v);
        for (int i = 0; i < 16; i++) wanted[i] = f(x[i]);
        compare(what, y, wanted, limit);
    };
    const F16 v = load16(x.data());
    check("exp16", exp16(v * 0.1f), [](float a) { return std::exp(a * 0.1); }, 1e-6);
    check("exp16 of larger numbers", exp16(v * 1.5f), [](float a) { return std::exp((double)(a * 1.5f)); }, 2e-7);
    check("exp2_16", exp2_16(v), [](float a) { return std::exp2((double)a); }, 1e-6);
    check("exp2_16, far below", exp2_16(v * 0.0f - 1e30f), [](float) { return 0.0; }, 0);
    check("blend, larger", larger(v, -v), [](float a) { return std::fabs(a); }, 0);
    check("even16", even16(F16{} + 2.5f), [](float) { return 2.0; }, 0);
    uint16_t half[16];
    store16(half, v);
    check("rounding to bf16", load16(half), [](float a) { return float_of(bf16_of(a)); }, 0);
    store_float16(half, v);
    check("float16", load_float16(half), [](float a) { return (double)a; }, 5e-4);
    double sum = 0, most = -INFINITY;
    for (float a : x) sum += a, most = std::max<double>(most, a);
    compare("sum16, largest16", {sum16(v), largest16(v)}, {sum, most}, 1e-6);
    const int32_t back[16] = {15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0};
    std::vector<double> turned(x.rbegin(), x.rend());
    store16(y.data(), shuffle(v, back));
    compare("shuffle", y, turned, 0);
    failures += any16(v < -1e9f) || !any16(v > -1e9f);
}

struct Packed {
    std::vector<char> memory;
    Weight weight;
    std::vector<float> values;  // (n, k), as kept
    Packed(int64_t n, int64_t k, int64_t kind) : memory(weight_bytes(n, k, kind) + 64), values(n * k) {
        const std::vector<float> w = normal(n * k, 0.3f);
        weight = weight_in((char*)up_to((int64_t)(uintptr_t)memory.data(), 64), n, k, kind);
        pack(w.data(), weight, false);
        unpack(weight, values.data(), false);
        if (kind == int8_kind || kind == bf16_kind)
            compare(kind ? "int8 keeps a weight" : "bf16 keeps a weight", values, {w.begin(), w.end()}, kind ? 2e-2 : 3e-3);
        if (kind == int4_kind) compare("int4 keeps a weight", values, {w.begin(), w.end()}, 0.1);
    }
};
// Rows rounded to bf16, and what that made of them.
static Rows rounded(std::vector<float>& x, int64_t rows, int64_t width) {
    static Buffer<uint16_t> memory;
    const Rows to = rows_in(memory, rows, width);
    round_rows(x.data(), to);
    for (float& a : x) a = float_of(bf16_of(a));
    return to;
}
static void products(int64_t rows, int64_t n, int64_t k, int64_t kind) {
    static const char* names[] = {"bf16", "int8", "int8-both", "int4"};
    const Packed w(n, k, kind);
    char what[64];
    std::vector<float> x = normal(rows * k), y(rows * n), dy = normal(rows * n), dx(rows * k);
    std::vector<double> wanted(rows * n), wanted_back(rows * k);
    const Rows in = rounded(x, rows, k);
    product(in, {{&w.weight}, 1}, [&](int64_t m, int64_t o, F16 left, F16 right) {
        store_some(y.data() + m * n + o, left, right, std::min<int64_t>(32, n - o));
    });
    const Rows back = rounded(dy, rows, n);
    product_back(back, {{&w.weight}, 1}, [&](int64_t m, int64_t o, F16 left, F16 right) {
        store_some(dx.data() + m * k + o, left, right, std::min<int64_t>(32, k - o));
    });
    for (int64_t m = 0; m < rows; m++)
        for (int64_t o = 0; o < n; o++)
            for (int64_t i = 0; i < k; i++) {
                wanted[m * n + o] += (double)x[m * k + i] * w.values[o * k + i];
                wanted_back[m * k + i] += (double)dy[m * n + o] * w.values[o * k + i];
            }
    std::snprintf(what, sizeof what, "%s, %d x %d x %d", names[kind], (int)rows, (int)n, (int)k);
    compare(what, y, wanted, kind == bf16_kind ? 1e-5 : 2e-2);
    std::snprintf(what, sizeof what, "%s back", names[kind]);
    compare(what, dx, wanted_back, kind == int8_both_kind ? 2e-2 : kind == bf16_kind ? 1e-5 : 4e-3);
}
static void gradient(int64_t rows, int64_t n, int64_t k) {
    std::vector<float> x = normal(rows * k), dy = normal(rows * n), dw(n * k);
    std::vector<double> wanted(n * k);
    static Buffer<uint16_t> for_x, for_dy;
    const Rows in = rows_in(for_x, rows, k), back = rows_in(for_dy, rows, n);
    round_rows(x.data(), in), round_rows(dy.data(), back);
    weight_gradient(in, back, false, dw.data());
    for (int64_t m = 0; m < rows; m++)
        for (int64_t o = 0; o < n; o++)
            for (int64_t i = 0; i < k; i++) wanted[o * k + i] += (double)float_of(bf16_of(x[m * k + i])) * float_of(bf16_of(dy[m * n + o]));
    compare("gradient of a weight", dw, wanted, 1e-5);
}

// Attention of heads over sequences, forward and back.
static void attention(int64_t heads, int64_t key_heads, int64_t D, std::vector<int> starts, int64_t window) {
    const int64_t rows = starts.back(), sequences = starts.size() - 1, width = (heads + 2 * key_heads) * D, wide = heads * D;
    const float scale = 1 / std::sqrt((float)D);
    std::vector<float> x = normal(rows * width), given = normal(rows * wide), lse(heads * rows);
    std::vector<uint16_t> memory[4];
    const auto rows_of = [&](std::vector<uint16_t>& own, int64_t columns) {
        own.assign(Rows::numbers(rows, columns) + 32, 0);
        return Rows{(uint16_t*)up_to((int64_t)(uintptr_t)own.data(), 64), rows, columns};
    };
    const Rows qkv = rows_of(memory[0], width), out = rows_of(memory[1], wide), d = rows_of(memory[2], wide), dqkv = rows_of(memory[3], width);
    round_rows(x.data(), qkv), round_rows(given.data(), d);
    for (auto* v : {&x, &given}) for (float& a : *v) a = float_of(bf16_of(a));
    const Stream s{rows, sequences, starts.data(), heads, key_heads, D, nullptr, nullptr, {0, 0}, {scale, 0, window}, 0, qkv, out, lse.data()};
    stream_attention(s);
    stream_attention_back(s, d, dqkv);
    std::vector<double> y(rows * wide), back(rows * width);
    for (int64_t i = 0; i < sequences; i++)
        for (int64_t h = 0; h < heads; h++)
            for (int64_t m = starts[i]; m < starts[i + 1]; m++) {
                const int64_t g = h / (heads / key_heads), from = window ? std::max<int64_t>(starts[i], m + 1 - window) : starts[i];
                const auto at = [&](int64_t r, int64_t column) { return r * width + column; };
                std::vector<double> p, dp;
                double sum = 0, total = 0;
                for (int64_t j = from; j <= m; j++) {
                    double score = 0, slope = 0;
                    for (int64_t c = 0; c < D; c++) {
                        score += (double)x[at(m, h * D + c)] * x[at(j, (heads + g) * D + c)];
                        slope += (double)given[m * wide + h * D + c] * x[at(j, (heads + key_heads + g) * D + c)];
                    }
                    p.push_back(std::exp(score * scale)), dp.push_back(slope), sum += p.back();
                }
                for (size_t j = 0; j < p.size(); j++) p[j] /= sum, total += p[j] * dp[j];
                for (int64_t j = from; j <= m; j++)
                    for (int64_t c = 0; c < D; c++) {
                        const double own = p[j - from], slope = own * (dp[j - from] - total) * scale;
                        y[m * wide + h * D + c] += own * x[at(j, (heads + key_heads + g) * D + c)];
                        back[at(j, (heads + key_heads + g) * D + c)] += own * given[m * wide + h * D + c];
                        back[at(j, (heads + g) * D + c)] += slope * x[at(m, h * D + c)];
                        back[at(m, h * D + c)] += slope * x[at(j, (heads + g) * D + c)];
                    }
            }
    const auto read = [&](const Rows& from) {
        std::vector<float> all(rows * from.width);
        for (int64_t m = 0; m < rows; m++)
            for (int64_t k = 0; k < from.width; k += 32) to_float(from.at(m, k), all.data() + m * from.width + k, std::min<int64_t>(32, from.width - k));
        return all;
    };
    compare(window ? "attention with a window" : "attention", read(out), y, 5e-3);
    compare("attention back", read(dqkv), back, 1e-2);
}

int main() {
    std::printf("tiles of kind %d (native.h)\n", JLORA_TILES);
    vectors();
    for (const int64_t kind : {bf16_kind, int8_kind, int8_both_kind, int4_kind})
        for (const int64_t rows : {1, 3, 5, 35, 70}) products(rows, rows == 35 ? 1100 : 72, rows == 70 ? 1200 : 100, kind);
    gradient(45, 70, 40);
    attention(4, 2, 32, {0, 7, 40, 41, 140}, 0);
    attention(2, 2, 64, {0, 90}, 20);
    std::printf(failures ? "%d comparisons failed\n" : "all right\n", failures);
    return failures ? 1 : 0;
}
