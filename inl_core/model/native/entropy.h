// The cross-entropy of one row of logits, and its gradient.

#pragma once

#include "common.h"

namespace {

constexpr int64_t SUMMED_COLUMNS = 1024;  // at most these are summed in their own precision, the sums in double

// log sum exp(logits) - logits[target], and logits (V,) become softmax - onehot; both 0 for a negative target.
template <typename T> inline T entropy_row(int64_t vocabulary, int64_t target, T *logits) {
    if (target < 0) {
        std::fill(logits, logits + vocabulary, T(0));
        return 0;
    }
    T largest = logits[0];
#pragma omp simd reduction(max : largest)
    for (int64_t j = 0; j < vocabulary; j++) largest = logits[j] > largest ? logits[j] : largest;
    const T of_target = logits[target];
    double sum = 0;
    for (int64_t j = 0; j < vocabulary; j += SUMMED_COLUMNS) {
        T part = 0;
        const int64_t end = std::min(j + SUMMED_COLUMNS, vocabulary);
#pragma omp simd reduction(+ : part)
        for (int64_t k = j; k < end; k++) part += logits[k] = exponential(logits[k] - largest);
        sum += part;
    }
    const T share = T(1 / sum);
#pragma omp simd
    for (int64_t j = 0; j < vocabulary; j++) logits[j] *= share;
    logits[target] -= T(1);
    return T(largest + std::log(sum) - of_target);
}

}  // namespace
