// Whether oneDNN's product can be used: it may throw where this processor or its settings have no kernel for it.

#include <vector>

#include "common.h"

// 1 when brgemm gives the product of two small matrices, else 0.
extern "C" int brgemm_works(const Blas *blas) {
    constexpr int64_t N = 24;
    std::vector<float> left(N * N), right(N * N), out(N * N);
    for (int64_t i = 0; i < N * N; i++) {
        left[i] = float(i % 7);
        right[i] = float(i % 5);
    }
    try {
        product<float>(*blas, N, N, N, left.data(), N, right.data(), N, false, out.data(), N);
    } catch (...) {
        return 0;
    }
    for (int64_t i = 0; i < N; i++)
        for (int64_t j = 0; j < N; j++) {
            float sum = 0;  // of small whole numbers: exact
            for (int64_t k = 0; k < N; k++) sum += left[i * N + k] * right[k * N + j];
            if (out[i * N + j] != sum) return 0;
        }
    return 1;
}
