// What happens to each token by itself on a CPU, forward and backward: the RMS norm, the cross-entropy of a row of logits.
// Each is one pass over memory.
//
//   norm       y = x scale weight, scale = 1 / sqrt(mean x^2 + eps)
//   entropy    loss = log sum exp(logits) - logit of the target; the logits become their gradient, softmax - onehot
//
// - Each thread takes an even share of the rows. Gradients that all rows share are summed by each thread for itself, some
//   rows in their own precision, then in double, and the threads' sums in the threads' order.
// - Legend: N rows, D dim, V vocabulary size.

#include "entropy.h"
#include "norm.h"

// The same fields in the same order as rows.py's Call; who has no use for one leaves it.
struct Rows {
    int64_t threads, rows, dim;
    double eps;
    Blas blas;
    const void *x, *weight, *grad;  // (N, D), but for the weight (D,)
    void *out, *grad_x, *grad_weight;
    const int64_t *targets;  // (N,); negative: the row does not count
};

namespace {

// f(first row, rows, what to add the shared gradient of these rows to); their sum goes to grad_weight.
template <typename T, typename F> bool summed(const Rows &call, F f) {
    Parts<RowSum<T>> sums(call.threads);
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(call.threads)
    {
        unless_out_of_memory(failed, [&] {
            RowSum<T> &own = *(sums[omp_get_thread_num()] = std::make_unique<RowSum<T>>(call.dim));
            for_tiles(call.rows, SUMMED_ROWS, [&](int64_t i, int64_t n) {
                f(i, n, own.few.data());
                own.take();
            });
        });
#pragma omp barrier
        if (!failed) write_share<T>(call.grad_weight, sums, [](const RowSum<T> &sum) -> auto & { return sum.all; });
    }
    return !failed;
}

template <typename T> bool norm(const Rows &call) {
#pragma omp parallel num_threads(call.threads)
    for_tiles(call.rows, SUMMED_ROWS, [&](int64_t i, int64_t n) {
        const int64_t at = i * call.dim;
        norm_rows(n, call.dim, (const T *)call.x + at, (const T *)call.weight, T(call.eps), (T *)call.out + at);
    });
    return true;
}

template <typename T> bool norm_back(const Rows &call) {
    return summed<T>(call, [&](int64_t i, int64_t n, T *of_weight) {
        const int64_t at = i * call.dim;
        norm_rows_back(n, call.dim, (const T *)call.x + at, (const T *)call.weight, T(call.eps),
                       (const T *)call.grad + at, (T *)call.grad_x + at, of_weight);
    });
}

// x is (N, V) and becomes its gradient; out (N,) is the loss.
template <typename T> bool entropy(const Rows &call) {
#pragma omp parallel num_threads(call.threads)
    for_tiles(call.rows, SUMMED_ROWS, [&](int64_t first, int64_t n) {
        for (int64_t i = first; i < first + n; i++) {
            T *logits = (T *)call.grad_x + i * call.dim;
            ((T *)call.out)[i] = entropy_row(call.dim, call.targets[i], logits);
        }
    });
    return true;
}

}  // namespace

IN_BOTH_PRECISIONS(norm, norm, Rows)
IN_BOTH_PRECISIONS(norm_back, norm_back, Rows)
IN_BOTH_PRECISIONS(entropy, entropy, Rows)
