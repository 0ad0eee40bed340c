// Tokens in tiles, and the sums over all tokens of the gradients of weights.
//
// - Each thread takes an even share of the tokens, a tile at a time, and sums the gradients for itself; the threads'
//   sums are added in the threads' order: with the same number of threads, the same bits.

#pragma once

#include <vector>

#include "common.h"

namespace {

constexpr int64_t SUMMED_ROWS = 64;  // at most these are summed in the rows' own precision, the sums in double

// f(first row, rows) for tiles of `most` of this thread's share of the rows, and one of the rest: few sizes, for a
// kernel is made for each.
template <typename F> void for_tiles(int64_t rows, int64_t most, F f) {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t begin = rows * me / threads, end = rows * (me + 1) / threads;
    for (int64_t start = begin; start < end; start += most) f(start, std::min(most, end - start));
}

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

}  // namespace
