// A matrix product over all tokens on a CPU, with the norm before and the bias after it, forward and backward.
//
//   out = norm(x) W^T + bias
//
// - Kept for the backward pass: x. It computes the norm again.
// - Legend: N tokens, n rows of a tile, K inputs, O outputs.

#include "norm.h"

// The same fields in the same order as projection.py's Call.
struct Projection {
    int64_t threads, rows, inputs, outputs, tile;
    double eps;
    Blas blas;
    const void *x, *norm, *weight, *bias;  // (N, K), (K,) or null, (O, K), (O,) or null
    void *out;                             // (N, O)
    const void *grad_out;
    void *grad_x, *grad_norm, *grad_weight, *grad_bias;
};

namespace {

inline int64_t tile_rows(const Projection &call) { return std::min(call.tile, call.rows); }

template <typename T> NormBefore<T> norm_of(const Projection &call) {
    return {call.inputs, (const T *)call.norm, T(call.eps)};
}

template <typename T> bool project(const Projection &call) {
    const int64_t inputs = call.inputs, outputs = call.outputs, most = tile_rows(call);
    const NormBefore<T> norm = norm_of<T>(call);
    Scratch<T> weight(inputs * outputs);  // transposed
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(call.threads)
    {
        transpose_share(outputs, inputs, (const T *)call.weight, weight.data());
#pragma omp barrier
        unless_out_of_memory(failed, [&] {
            const OneThreadEach products(call.blas);
            Scratch<T> normed(call.norm ? most * inputs : 0);
            for_tiles(call.rows, most, [&](int64_t start, int64_t n) {
                const T *x = norm.input(n, (const T *)call.x + start * inputs, normed.data());
                const T *bias = (const T *)call.bias;
                T *out = (T *)call.out + start * outputs;
                for (int64_t i = 0; bias && i < n; i++) std::copy(bias, bias + outputs, out + i * outputs);
                product<T>(call.blas, n, outputs, inputs, x, inputs, weight.data(), outputs, bias, out, outputs);
            });
        });
    }
    return !failed;
}

// One thread's sums of the gradients that all tokens share.
template <typename T> struct Weights {
    MatrixSum<T> weight;
    RowSum<T> norm, bias;
    explicit Weights(const Projection &c)
        : weight(c.inputs, c.outputs, tile_rows(c)), norm(c.norm ? c.inputs : 0), bias(c.bias ? c.outputs : 0) {}
};

template <typename T> void project_back_share(const Projection &call, Weights<T> &sums) {
    const int64_t inputs = call.inputs, outputs = call.outputs, most = tile_rows(call);
    const NormBefore<T> norm = norm_of<T>(call);
    Scratch<T> normed(call.norm ? most * inputs : 0), of_normed(call.norm ? most * inputs : 0);
    for_tiles(call.rows, most, [&](int64_t start, int64_t n) {
        const T *x = (const T *)call.x + start * inputs, *grad = (const T *)call.grad_out + start * outputs;
        T *grad_x = (T *)call.grad_x + start * inputs, *of_input = call.norm ? of_normed.data() : grad_x;
        sums.weight.add(call.blas, n, norm.input(n, x, normed.data()), grad, outputs);
        product<T>(call.blas, n, inputs, outputs, grad, outputs, (const T *)call.weight, inputs, false, of_input, inputs);
        if (call.bias) sums.bias.add(n, grad);
        if (call.norm) norm.back(n, x, of_input, grad_x, sums.norm);
    });
}

template <typename T> bool project_back(const Projection &call) {
    Parts<Weights<T>> sums(call.threads);
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(call.threads)
    {
        unless_out_of_memory(failed, [&] {
            const OneThreadEach products(call.blas);
            project_back_share(call, *(sums[omp_get_thread_num()] = std::make_unique<Weights<T>>(call)));
        });
#pragma omp barrier
        if (!failed) {
            write_matrix<T>(call.grad_weight, sums, [](Weights<T> &w) -> auto & { return w.weight; });
            if (call.norm) write_share<T>(call.grad_norm, sums, [](const Weights<T> &w) -> auto & { return w.norm.all; });
            if (call.bias) write_share<T>(call.grad_bias, sums, [](const Weights<T> &w) -> auto & { return w.bias.all; });
        }
    }
    return !failed;
}

}  // namespace

IN_BOTH_PRECISIONS(project, project, Projection)
IN_BOTH_PRECISIONS(project_back, project_back, Projection)
