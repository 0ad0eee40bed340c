// The gated feed-forward on a CPU, and the RMS norm before it where there is one, forward and backward.
//
//   [gate | up] = norm(x) W_up^T     out = (silu(gate) * up) W_down^T
//
// - Tiles of tokens go from one product to the other in each thread's cache.
// - Kept for the backward pass: x and [gate | up]. It computes the norm and the product of gate and up again.
// - Legend: N tokens, n rows of a tile, D dim, H hidden width.

#include "norm.h"

// The same fields in the same order as feed_forward.py's Call.
struct FeedForward {
    int64_t threads, rows, dim, hidden, tile;
    double eps;
    Blas blas;
    const void *x, *norm, *up, *down;  // (N, D), (D,) or null, (2 H, D), (D, H)
    void *gate_up, *normed, *out;      // (N, 2 H) or null where nothing is kept, norm(x) (N, D) or null, (N, D)
    const void *grad_out, *grad_normed;  // the latter null for none
    void *grad_x, *grad_norm, *grad_up, *grad_down;
};

namespace {

inline int64_t tile_rows(const FeedForward &call) { return std::min(call.tile, call.rows); }

template <typename T> NormBefore<T> norm_of(const FeedForward &call) {
    return {call.dim, (const T *)call.norm, T(call.eps)};
}

template <typename T> bool forward(const FeedForward &call) {
    const int64_t dim = call.dim, hidden = call.hidden, most = tile_rows(call);
    const NormBefore<T> norm = norm_of<T>(call);
    Scratch<T> up(dim * 2 * hidden), down(hidden * dim);  // transposed
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(call.threads)
    {
        transpose_share(2 * hidden, dim, (const T *)call.up, up.data());
        transpose_share(dim, hidden, (const T *)call.down, down.data());
#pragma omp barrier
        unless_out_of_memory(failed, [&] {
            const OneThreadEach products(call.blas);
            Scratch<T> normed(call.norm ? most * dim : 0), mixed(most * hidden), own(call.gate_up ? 0 : most * 2 * hidden);
            for_tiles(call.rows, most, [&](int64_t start, int64_t n) {
                T *both = call.gate_up ? (T *)call.gate_up + start * 2 * hidden : own.data();
                T *room = call.normed ? (T *)call.normed + start * dim : normed.data();
                const T *x = norm.input(n, (const T *)call.x + start * dim, room);
                product<T>(call.blas, n, 2 * hidden, dim, x, dim, up.data(), 2 * hidden, false, both, 2 * hidden);
                for (int64_t i = 0; i < n; i++) {
                    const T *gate = both + i * 2 * hidden, *of_up = gate + hidden;
                    T *to = mixed.data() + i * hidden;
#pragma omp simd
                    for (int64_t j = 0; j < hidden; j++) to[j] = gate[j] * sigmoid(gate[j]) * of_up[j];
                }
                product<T>(call.blas, n, dim, hidden, mixed.data(), hidden, down.data(), dim, false,
                           (T *)call.out + start * dim, dim);
            });
        });
    }
    return !failed;
}

// One thread's sums of the weights' gradients.
template <typename T> struct Weights {
    MatrixSum<T> up;
    std::vector<T> down;
    RowSum<T> norm;
    explicit Weights(const FeedForward &c)
        : up(c.dim, 2 * c.hidden, tile_rows(c)), down(c.dim * c.hidden), norm(c.norm ? c.dim : 0) {}
};

template <typename T> void backward_of_share(const FeedForward &call, Weights<T> &sums) {
    const int64_t dim = call.dim, hidden = call.hidden, most = tile_rows(call);
    const T *up = (const T *)call.up, *down = (const T *)call.down;
    const NormBefore<T> norm = norm_of<T>(call);
    Scratch<T> normed(call.norm ? most * dim : 0), of_normed(call.norm ? most * dim : 0), mixed(most * hidden),
        of_mixed(most * hidden), of_both(most * 2 * hidden), turned(most * dim);
    for_tiles(call.rows, most, [&](int64_t start, int64_t n) {
        const T *x = (const T *)call.x + start * dim, *grad = (const T *)call.grad_out + start * dim;
        T *grad_x = (T *)call.grad_x + start * dim;
        product<T>(call.blas, n, hidden, dim, grad, dim, down, hidden, false, of_mixed.data(), hidden);
        for (int64_t i = 0; i < n; i++) {
            const T *gate = (const T *)call.gate_up + (start + i) * 2 * hidden, *of_up = gate + hidden;
            const T *g = of_mixed.data() + i * hidden;
            T *to = mixed.data() + i * hidden, *to_gate = of_both.data() + i * 2 * hidden, *to_up = to_gate + hidden;
#pragma omp simd
            for (int64_t j = 0; j < hidden; j++) {
                const T s = sigmoid(gate[j]), silu = gate[j] * s;
                to[j] = silu * of_up[j];
                to_up[j] = g[j] * silu;
                to_gate[j] = g[j] * of_up[j] * (s + silu * (T(1) - s));
            }
        }
        transpose(n, dim, grad, dim, turned.data(), most);
        product<T>(call.blas, dim, hidden, n, turned.data(), most, mixed.data(), hidden, true, sums.down.data(), hidden);
        sums.up.add(call.blas, n, norm.input(n, x, normed.data()), of_both.data(), 2 * hidden);
        T *of_input = call.norm ? of_normed.data() : grad_x;
        product<T>(call.blas, n, dim, 2 * hidden, of_both.data(), 2 * hidden, up, dim, false, of_input, dim);
        if (!call.norm) return;
        if (call.grad_normed) {
            const T *given = (const T *)call.grad_normed + start * dim;
            for (int64_t i = 0; i < n * dim; i++) of_input[i] += given[i];
        }
        norm.back(n, x, of_input, grad_x, sums.norm);
    });
}

template <typename T> bool backward(const FeedForward &call) {
    Parts<Weights<T>> sums(call.threads);
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(call.threads)
    {
        unless_out_of_memory(failed, [&] {
            const OneThreadEach products(call.blas);
            backward_of_share(call, *(sums[omp_get_thread_num()] = std::make_unique<Weights<T>>(call)));
        });
#pragma omp barrier
        if (!failed) {
            write_matrix<T>(call.grad_up, sums, [](Weights<T> &w) -> auto & { return w.up; });
            write_share<T>(call.grad_down, sums, [](const Weights<T> &w) -> auto & { return w.down; });
            if (call.norm) write_share<T>(call.grad_norm, sums, [](const Weights<T> &w) -> auto & { return w.norm.all; });
        }
    }
    return !failed;
}

}  // namespace

IN_BOTH_PRECISIONS(feed_forward, forward, FeedForward)
IN_BOTH_PRECISIONS(feed_back, backward, FeedForward)
