// The RMS norm of some rows, forward and backward: x * scale * weight, scale = 1 / sqrt(mean x^2 + eps).

#pragma once

#include "tiles.h"

namespace {

template <typename T> inline T inverse_rms(const T *x, int64_t dim, T eps) {
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < dim; j++) squares += x[j] * x[j];
    return T(1) / std::sqrt(squares / dim + eps);
}

// to (n, D) = the norm of x (n, D).
template <typename T> inline void norm_rows(int64_t n, int64_t dim, const T *x, const T *weight, T eps, T *to) {
    for (int64_t i = 0; i < n; i++, x += dim, to += dim) {
        const T scale = inverse_rms(x, dim, eps);
#pragma omp simd
        for (int64_t j = 0; j < dim; j++) to[j] = x[j] * scale * weight[j];
    }
}

// grads (n, D), of the norm of x, become to, those of x; the weight's gradient is added to of_weight.
template <typename T>
inline void norm_rows_back(int64_t n, int64_t dim, const T *x, const T *weight, T eps, const T *grads, T *to, T *of_weight) {
    for (int64_t i = 0; i < n; i++, x += dim, grads += dim, to += dim) {
        const T scale = inverse_rms(x, dim, eps);
        T along = 0;
#pragma omp simd reduction(+ : along)
        for (int64_t j = 0; j < dim; j++) along += grads[j] * weight[j] * x[j];
        const T less = along * scale * scale / dim;
#pragma omp simd
        for (int64_t j = 0; j < dim; j++) {
            const T g = grads[j];
            of_weight[j] += g * x[j] * scale;
            to[j] = scale * (g * weight[j] - x[j] * less);
        }
    }
}

// The norm before a product, or none where it has no weight.
template <typename T> struct NormBefore {
    int64_t dim;
    const T *weight;
    T eps;

    // What the product reads of x (n, D): its norm, in `room`, or x itself.
    const T *input(int64_t n, const T *x, T *room) const {
        if (!weight) return x;
        norm_rows(n, dim, x, weight, eps, room);
        return room;
    }

    // The gradient of x from that of the norm, and the weight's, which is added to `sum`. Only of a norm that is there.
    void back(int64_t n, const T *x, const T *of_normed, T *to, RowSum<T> &sum) const {
        for (int64_t i = 0; i < n; i += SUMMED_ROWS) {
            const int64_t at = i * dim;
            norm_rows_back(std::min(SUMMED_ROWS, n - i), dim, x + at, weight, eps, of_normed + at, to + at, sum.few.data());
            sum.take();
        }
    }
};

}  // namespace
