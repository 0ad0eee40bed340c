// The cross-entropy over a vocabulary whose head is small, on a CPU, with its gradients.
//
//   loss_i = log sum_j exp(z_i . w_j) - z_i . w_target(i)
//
// - A tile's logits stay in the thread's cache from the product to the two products of the gradients.
// - Rows of V numbers lie a little further apart: steps of a power of two would share a few places of the cache.
// - Legend: N tokens, n rows of a tile, R width, V vocabulary size.

#include "entropy.h"
#include "tiles.h"

// The same fields in the same order as head.py's Call.
struct Head {
    int64_t threads, rows, dim, vocabulary, tile;
    Blas blas;
    const void *z, *weight;               // (N, R), (V, R)
    void *losses, *grad_z, *grad_weight;  // (N,), (N, R) and (V, R) or null where they are not wanted
    const int64_t *targets;               // (N,); negative: the token does not count
};

namespace {

constexpr int64_t GAP = 16;

// `turned` is W^T (R, V).
template <typename T> void share_of(const Head &call, const T *turned, MatrixSum<T> *of_weight) {
    const int64_t dim = call.dim, vocabulary = call.vocabulary, step = vocabulary + GAP;
    const int64_t most = std::min(call.tile, call.rows);
    Scratch<T> logits(most * step);
    for_tiles(call.rows, most, [&](int64_t start, int64_t n) {
        const T *z = (const T *)call.z + start * dim;
        product<T>(call.blas, n, vocabulary, dim, z, dim, turned, step, false, logits.data(), step);
        for (int64_t i = 0; i < n; i++)
            ((T *)call.losses)[start + i] = entropy_row(vocabulary, call.targets[start + i], logits.data() + i * step);
        if (call.grad_z)
            product<T>(call.blas, n, dim, vocabulary, logits.data(), step, (const T *)call.weight, dim, false,
                       (T *)call.grad_z + start * dim, dim);
        if (of_weight) of_weight->add(call.blas, n, z, logits.data(), step);
    });
}

template <typename T> bool head(const Head &call) {
    const int64_t dim = call.dim, vocabulary = call.vocabulary, step = vocabulary + GAP;
    Parts<MatrixSum<T>> sums(call.threads);
    Scratch<T> turned(dim * step);
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(call.threads)
    {
        const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t begin = vocabulary * me / threads, end = vocabulary * (me + 1) / threads;
        transpose(end - begin, dim, (const T *)call.weight + begin * dim, dim, turned.data() + begin, step);
#pragma omp barrier
        unless_out_of_memory(failed, [&] {
            const OneThreadEach products(call.blas);
            auto &own = sums[me];
            if (call.grad_weight) own = std::make_unique<MatrixSum<T>>(dim, vocabulary, std::min(call.tile, call.rows));
            share_of<T>(call, turned.data(), own.get());
        });
#pragma omp barrier
        if (!failed && call.grad_weight)
            write_matrix<T>(call.grad_weight, sums, [](MatrixSum<T> &sum) -> auto & { return sum; });
    }
    return !failed;
}

}  // namespace

IN_BOTH_PRECISIONS(head, head, Head)
