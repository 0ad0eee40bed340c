// Tokens in tiles, and the sums over all tokens of the gradients of weights.
//
// - Each thread takes an even share of the tokens, a tile at a time, and sums the gradients for itself; the threads' sums
//   are added in the threads' order: with the same number of threads, the same bits.

#pragma once

#include <vector>

#include "common.h"

namespace {

constexpr int64_t SUMMED_ROWS = 64;  // at most these are summed in the rows' own precision, the sums in double

// f(first row, rows) for tiles of `most` of this thread's share of the rows, and one of the rest: few sizes, for a kernel is
// made for each.
template <typename F> void for_tiles(int64_t rows, int64_t most, F f) {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t begin = rows * me / threads, end = rows * (me + 1) / threads;
    for (int64_t start = begin; start < end; start += most) f(start, std::min(most, end - start));
}

// The sum over tokens of input_i output_i^T, the gradient (O, K) of a matrix, kept transposed.
template <typename T> struct MatrixSum {
    int64_t inputs, outputs, most;
    std::vector<T> sum;  // (K, O)
    Scratch<T> turned;   // (K, most), of which n columns are used

    MatrixSum(int64_t k, int64_t o, int64_t rows) : inputs(k), outputs(o), most(rows), sum(k * o), turned(k * most) {}

    // Add n tokens; `input` (n, K) lies without gaps.
    void add(const Blas &blas, int64_t n, const T *input, const T *output, int64_t output_step) {
        transpose(n, inputs, input, inputs, turned.data(), most);
        product<T>(blas, inputs, outputs, n, turned.data(), most, output, output_step, true, sum.data(), outputs);
    }
};

// The sum over rows of some numbers each.
template <typename T> struct RowSum {
    std::vector<T> few;
    std::vector<double> all;

    explicit RowSum(int64_t size) : few(size), all(size) {}

    void take() {
        for (size_t i = 0; i < few.size(); i++) all[i] += few[i];
        std::fill(few.begin(), few.end(), T(0));
    }

    // Add n rows of this many numbers, which lie without gaps.
    void add(int64_t n, const T *rows) {
        const int64_t size = few.size();
        for (int64_t i = 0; i < n; i++) {
            for (int64_t j = 0; j < size; j++) few[j] += rows[i * size + j];
            if (i + 1 == n || (i + 1) % SUMMED_ROWS == 0) take();
        }
    }
};

// What the threads of a parallel region have each summed. A thread makes its own sums, and so touches them first.
template <typename Own> using Parts = std::vector<std::unique_ptr<Own>>;

// This thread's share of the elements of one gradient: the sum of all threads' parts, in their order.
template <typename T, typename Own, typename Part> void write_share(void *to, const Parts<Own> &parts, Part part) {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num(), size = part(*parts[0]).size();
    T *sum = (T *)to;
    for (int64_t i = size * me / threads; i < size * (me + 1) / threads; i++) {
        auto total = part(*parts[0])[i];
        for (int64_t k = 1; k < threads; k++) total += part(*parts[k])[i];
        sum[i] = T(total);
    }
}

// The same of a matrix (O, K), by all threads together.
template <typename T, typename Own, typename Part> void write_matrix(void *to, const Parts<Own> &parts, Part part) {
    MatrixSum<T> &first = part(*parts[0]);
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num(), rows = first.inputs, columns = first.outputs;
    const int64_t begin = rows * me / threads, end = rows * (me + 1) / threads;
    for (int64_t k = 1; k < threads; k++) {
        const T *other = part(*parts[k]).sum.data();
        for (int64_t i = begin * columns; i < end * columns; i++) first.sum[i] += other[i];
    }
    transpose(end - begin, columns, first.sum.data() + begin * columns, columns, (T *)to + begin, rows);
}

}  // namespace
