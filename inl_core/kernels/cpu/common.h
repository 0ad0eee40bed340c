// What the operations in C++ share: matrix products, polynomials for exp and log, scratch memory.
//
// - exp and log1p are polynomials so that the compiler makes vectors of them, within 2 units of the last place; NaN
//   stays NaN. In double precision, which tests use, they are the library's.
// - Matrices are row-major.

#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <omp.h>
#include <type_traits>

// The libraries' functions, by address: MKL's product, how many threads this thread's products of MKL take, and
// oneDNN's product in single precision, which may be missing.
struct Blas {
    void *gemm, *set_threads, *brgemm;
};

namespace {

inline float exponential(float z) {
    z = z < -87.0f ? -87.0f : z;  // comparisons that are false for NaN, which passes
    z = z > 88.0f ? 88.0f : z;
    const float n = __builtin_rintf(z * 1.44269504088896341f);
    float r = z - n * 0.693359375f;  // ln 2 in two parts
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power_of_two;
    std::memcpy(&power_of_two, &bits, sizeof bits);
    return p * power_of_two;
}

inline double exponential(double z) { return std::exp(z); }

// log(1 + e) for e in [0, 1]: 2 artanh(s), s = e / (2 + e) <= 1/3, by its series.
inline float log1p_by_quotient(float, float s) {
    const float q = s * s;
    float p = 1.0f / 15;
    p = p * q + 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    p = p * q + 1.0f;
    return 2.0f * s * p;
}

inline double log1p_by_quotient(double e, double) { return std::log1p(e); }

constexpr int64_t WHOLE_BYTES = 256 * 1024, COLUMNS = 64;

// out (m, n) = left (m, k) right (k, n), added to what is there or not; a matrix's rows lie `step` apart. oneDNN's
// kernel is made for one set of sizes and steps, so there should be few. Which product is called is chosen by
// measuring.
template <typename T>
inline void product(const Blas &blas, int64_t m, int64_t n, int64_t k, const T *left, int64_t left_step, const T *right,
                    int64_t right_step, bool add, T *out, int64_t out_step) {
    if constexpr (std::is_same_v<T, float>) {
        using Brgemm = void (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const float *,
                                const float *, float *, bool);
        if (blas.brgemm) {
            const int64_t columns = k * n * int64_t(sizeof(T)) <= WHOLE_BYTES ? n : COLUMNS;  // of `right` at a time
            for (int64_t j = 0; j < n; j += columns)
                reinterpret_cast<Brgemm>(blas.brgemm)(m, std::min(columns, n - j), k, left_step, right_step, out_step,
                                                      add, left, right + j, out + j, false);
            return;
        }
    }
    using Gemm = void (*)(const char *, const char *, const int *, const int *, const int *, const T *, const T *,
                          const int *, const T *, const int *, const T *, T *, const int *);
    const int rows = int(n), columns = int(m), depth = int(k);  // column-major: of the transposes
    const int first = int(right_step), second = int(left_step), third = int(out_step);
    const T one = 1, beta = add ? 1 : 0;
    reinterpret_cast<Gemm>(blas.gemm)("N", "N", &rows, &columns, &depth, &one, right, &first, left, &second, &beta, out,
                                      &third);
}

// to (n, m) = from (m, n) transposed, in blocks that stay in the first cache.
template <typename T>
inline void transpose(int64_t m, int64_t n, const T *from, int64_t from_step, T *to, int64_t to_step) {
    constexpr int64_t SIDE = 16;
    for (int64_t i = 0; i < m; i += SIDE)
        for (int64_t j = 0; j < n; j += SIDE)
            for (int64_t b = j; b < std::min(j + SIDE, n); b++)
                for (int64_t a = i; a < std::min(i + SIDE, m); a++) to[b * to_step + a] = from[a * from_step + b];
}

// The BLAS library's products in one thread, those of this parallel region.
class OneThreadEach {
    using Set = int (*)(int);
    Set set;
    int before = 0;

  public:
    explicit OneThreadEach(const Blas &blas) : set(reinterpret_cast<Set>(blas.set_threads)) { before = set(1); }
    ~OneThreadEach() { set(before); }
};

// Memory that nobody has cleared: every element is written before it is read.
template <typename T> struct Scratch {
    std::unique_ptr<T[]> place;
    explicit Scratch(int64_t size) : place(new T[size]) {}
    T *data() { return place.get(); }
};

// f(), which no exception may leave: it runs in a thread of its own. Memory may be missing, also for a kernel of
// oneDNN's.
template <typename F> void unless_out_of_memory(std::atomic<bool> &failed, F f) {
    try {
        f();
    } catch (...) {
        failed = true;
    }
}

// pass(call): 1, or 0 when there was not the memory.
template <typename Call, bool pass(const Call &)> int completed(const Call *call) {
    try {
        return pass(*call);
    } catch (...) {
        return 0;
    }
}

}  // namespace

// pass<T>(call) for the Python side, in both precisions: 1, or 0 when there was not the memory.
#define IN_BOTH_PRECISIONS(name, pass, Call)                                                                           \
    extern "C" int name##_float32(const Call *call) { return completed<Call, pass<float>>(call); }                     \
    extern "C" int name##_float64(const Call *call) { return completed<Call, pass<double>>(call); }
