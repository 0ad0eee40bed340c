// Causal attention inside documents on a CPU, rotary positions and grouped queries included, forward and backward.
//
//   score_ij = scale (R_i q_i) . (R_j k_j)     out_i = sum_j softmax_j(score_ij) v_j     first_i <= j <= i
//
// - Queries, keys and values are read where the projection wrote them, side by side in `packed`, and their gradients
//   are written so. What a query does not see is not computed, but for what lies in its block of rows.
// - A block of queries meets a chunk of keys at a time: the softmax is online, and no (S, S) matrix exists.
// - Kept for the backward pass: the output, and one number a query and head. It computes the scores again.
// - One task is a row of the batch and a head (forward) or a key-value head (backward, whose queries' heads share the
//   gradients of keys and values): the same bits by any number of threads.
// - Legend: B batch, S sequence, H query heads, K key-value heads, F head size; M queries of a block,
//   W keys of a chunk.

#include <limits>

#include "common.h"

// The same fields in the same order as in kernels/attention.py; their sizes are compared at the first call.
struct Attention {
    int64_t threads, batch, length, heads, key_heads, size;
    int64_t tables;  // rows of the batch that have tables of their own: 1 or B
    double scale;
    Blas blas;
    const void *packed;           // (B, S, (H + 2 K) F)
    const void *cosines, *sines;  // (tables, S, F / 2), null without rotation
    const int64_t *first;         // (B, S) the first key a query sees, rising with it; null: key 0
    void *out;                    // (B, S, H F)
    void *log_sums;               // (B, H, S) log sum_j exp(score_ij)
    const void *grad_out;
    void *grad_packed;
};

namespace {

constexpr int64_t BLOCK = 64, CHUNK = 512, LANES = 16;
// The step of rows of scores: steps of a power of two would share a few places of the cache.
constexpr int64_t STEP = CHUNK + LANES;

inline int64_t down(int64_t i) { return i / LANES * LANES; }
inline int64_t up(int64_t i) { return (i + LANES - 1) / LANES * LANES; }

template <typename T> struct Heads {
    const Attention &call;
    int64_t length, size, width, half;
    T scale;

    explicit Heads(const Attention &c)
        : call(c), length(c.length), size(c.size), width((c.heads + 2 * c.key_heads) * c.size), half(c.size / 2),
          scale(T(c.scale)) {}

    const T *query(int64_t b, int64_t h) const { return (const T *)call.packed + b * length * width + h * size; }
    const T *key(int64_t b, int64_t k) const { return query(b, call.heads + k); }
    const T *value(int64_t b, int64_t k) const { return query(b, call.heads + call.key_heads + k); }
    T *grad_query(int64_t b, int64_t h) const { return (T *)call.grad_packed + b * length * width + h * size; }
    int64_t first(int64_t b, int64_t i) const {  // never out of bounds, whatever it was told
        return call.first ? std::clamp<int64_t>(call.first[b * length + i], 0, i) : 0;
    }
    T *log_sums(int64_t b, int64_t h) const { return (T *)call.log_sums + (b * call.heads + h) * length; }
    int64_t out_width() const { return call.heads * size; }

    // to (n, F) = factor R x, for positions `start` on; x's rows lie `step` apart.
    void rotate(int64_t b, int64_t start, int64_t n, const T *x, int64_t step, T factor, T *to) const {
        for (int64_t i = 0; i < n; i++, x += step, to += size) {
            if (!call.cosines) {
                for (int64_t j = 0; j < size; j++) to[j] = factor * x[j];
                continue;
            }
            const int64_t at = ((call.tables == 1 ? 0 : b) * length + start + i) * half;
            const T *c = (const T *)call.cosines + at, *s = (const T *)call.sines + at;
#pragma omp simd
            for (int64_t j = 0; j < half; j++) {
                to[j] = factor * (x[j] * c[j] - x[half + j] * s[j]);
                to[half + j] = factor * (x[half + j] * c[j] + x[j] * s[j]);
            }
        }
    }

    // The same backward: to = factor R^T g, whose rows lie `step` apart.
    void rotate_back(int64_t b, int64_t start, int64_t n, const T *g, T factor, T *to, int64_t step) const {
        for (int64_t i = 0; i < n; i++, g += size, to += step) {
            if (!call.cosines) {
                for (int64_t j = 0; j < size; j++) to[j] = factor * g[j];
                continue;
            }
            const int64_t at = ((call.tables == 1 ? 0 : b) * length + start + i) * half;
            const T *c = (const T *)call.cosines + at, *s = (const T *)call.sines + at;
#pragma omp simd
            for (int64_t j = 0; j < half; j++) {
                to[j] = factor * (g[j] * c[j] + g[half + j] * s[j]);
                to[half + j] = factor * (g[half + j] * c[j] - g[j] * s[j]);
            }
        }
    }

    // Blocks and chunks are of whole LANES, the rest of them zeros, and steps of few sizes: a kernel is made for each.
    int64_t padded() const { return up(length); }
    int64_t across() const { return (length + 255) / 256 * 256 + LANES; }  // of what is kept transposed, (F, S)

    // The first key that the block of queries from `start` on meets.
    int64_t meets(int64_t b, int64_t start) const { return down(first(b, start)); }

    // to (up(n), F) = x (n, F), whose rows lie `step` apart, and zeros.
    void copy(int64_t n, const T *x, int64_t step, T *to) const {
        for (int64_t i = 0; i < n; i++) std::copy(x + i * step, x + i * step + size, to + i * size);
        clear(n, to);
    }

    // Zeros behind n rows, up to whole LANES of them.
    void clear(int64_t n, T *rows) const { std::fill(rows + n * size, rows + up(n) * size, T(0)); }

    // The products of vectors (m, F) with those that are kept transposed, (F, n).
    void scores(int64_t m, int64_t n, const T *left, int64_t left_step, const T *right, T *out) const {
        product<T>(call.blas, m, n, size, left, left_step, right, across(), false, out, STEP);
    }
};

// The keys of a chunk [start, start + width) that query i sees, counted from the chunk's start; may be none.
struct Seen {
    int64_t begin, end;
    Seen(int64_t first, int64_t i, int64_t start, int64_t width)
        : begin(std::max<int64_t>(first - start, 0)), end(std::min(i + 1 - start, width)) {
        if (begin > end) begin = end = 0;
    }
    bool none() const { return begin == end; }
};

// Whole vectors of LANES numbers, which a row has room for: a loop over fewer is slower than one over all of them.
template <typename F> inline void for_vectors(int64_t begin, int64_t end, F f) {
    for (int64_t at = down(begin); at < end; at += LANES)
#pragma omp simd
        for (int64_t j = at; j < at + LANES; j++) f(j);
}

// Zeros outside of what is seen, up to the chunk's width.
template <typename T> inline void clear_unseen(T *s, const Seen &seen, int64_t width) {
    const int64_t before = down(seen.begin), after = up(seen.end);
    for_vectors(0, before, [&](int64_t j) { s[j] = 0; });
    for (int64_t j = before; j < seen.begin; j++) s[j] = 0;
    for (int64_t j = seen.end; j < after; j++) s[j] = 0;
    for_vectors(after, width, [&](int64_t j) { s[j] = 0; });
}

template <typename T> struct Forward {
    const Heads<T> &heads;
    Scratch<T> turned_keys, values, queries, scores, mixed;
    T largest[BLOCK], sums[BLOCK];

    explicit Forward(const Heads<T> &h)
        : heads(h), turned_keys(h.size * h.across()), values(h.padded() * h.size), queries(BLOCK * h.size),
          scores(BLOCK * STEP), mixed(BLOCK * h.size) {}

    void head(int64_t b, int64_t h) {
        const int64_t size = heads.size, k = h / (heads.call.heads / heads.call.key_heads);
        take_keys(b, k);
        for (int64_t start = 0; start < heads.length; start += BLOCK) {
            const int64_t n = std::min(BLOCK, heads.length - start), end = start + n;
            heads.rotate(b, start, n, heads.query(b, h) + start * heads.width, heads.width, heads.scale,
                         queries.data());
            heads.clear(n, queries.data());
            std::fill(largest, largest + n, -std::numeric_limits<T>::infinity());
            std::fill(sums, sums + n, T(0));
            std::fill(mixed.data(), mixed.data() + up(n) * size, T(0));
            for (int64_t from = heads.meets(b, start); from < end; from += CHUNK)
                chunk(b, start, n, from, std::min(CHUNK, up(end) - from));
            T *out = (T *)heads.call.out + (b * heads.length + start) * heads.out_width() + h * size;
            for (int64_t i = 0; i < n; i++) {
                const T share = T(1) / sums[i];
                for (int64_t j = 0; j < size; j++) out[i * heads.out_width() + j] = mixed.data()[i * size + j] * share;
                heads.log_sums(b, h)[start + i] = largest[i] + std::log(sums[i]);
            }
        }
    }

  private:
    int64_t taken = -1;  // the key-value head whose keys are here: heads that share it follow one another

    void take_keys(int64_t b, int64_t k) {
        if (taken == b * heads.call.key_heads + k) return;
        taken = b * heads.call.key_heads + k;
        for (int64_t start = 0; start < heads.length; start += BLOCK) {  // in the queries' room, until they come
            const int64_t n = std::min(BLOCK, heads.length - start);
            heads.rotate(b, start, n, heads.key(b, k) + start * heads.width, heads.width, T(1), queries.data());
            heads.clear(n, queries.data());
            transpose(up(n), heads.size, queries.data(), heads.size, turned_keys.data() + start, heads.across());
        }
        heads.copy(heads.length, heads.value(b, k), heads.width, values.data());
    }

    // n queries from `start` on meet the keys [from, from + width).
    void chunk(int64_t b, int64_t start, int64_t n, int64_t from, int64_t width) {
        const int64_t size = heads.size;
        heads.scores(up(n), width, queries.data(), size, turned_keys.data() + from, scores.data());
        for (int64_t i = 0; i < n; i++) {
            T *s = scores.data() + i * STEP;
            const Seen seen(heads.first(b, start + i), start + i, from, width);
            if (seen.none()) {
                clear_unseen(s, seen, width);
                continue;
            }
            T most = largest[i];
#pragma omp simd reduction(max : most)
            for (int64_t j = seen.begin; j < seen.end; j++) most = s[j] > most ? s[j] : most;
            const T fade = sums[i] == 0 ? T(0) : std::exp(largest[i] - most);
            for_vectors(seen.begin, seen.end, [&](int64_t j) { s[j] = exponential(s[j] - most); });
            clear_unseen(s, seen, width);
            T sum = 0;
            const int64_t to = up(seen.end);
#pragma omp simd reduction(+ : sum)
            for (int64_t j = down(seen.begin); j < to; j++) sum += s[j];
            sums[i] = sums[i] * fade + sum;
            if (fade != 1)
                for (int64_t j = 0; j < size; j++) mixed.data()[i * size + j] *= fade;
            largest[i] = most;
        }
        product<T>(heads.call.blas, up(n), size, width, scores.data(), STEP, values.data() + from * size, size, true,
                   mixed.data(), size);
    }
};

template <typename T> struct Backward {
    const Heads<T> &heads;
    // (S, F) and, transposed, (F, S) of a key-value head; (n, F) and (F, n) of a block of queries; (n, W) of a chunk
    Scratch<T> keys, turned_keys, turned_values, grad_keys, grad_values;
    Scratch<T> queries, turned_queries, out_grads, turned_grads, grad_queries;
    Scratch<T> weights, grads;
    T inner[BLOCK];  // of an output and its gradient

    explicit Backward(const Heads<T> &h)
        : heads(h), keys(h.padded() * h.size), turned_keys(h.size * h.across()), turned_values(h.size * h.across()),
          grad_keys(h.size * h.across()), grad_values(h.size * h.across()), queries(BLOCK * h.size),
          turned_queries(BLOCK * h.size), out_grads(BLOCK * h.size), turned_grads(BLOCK * h.size),
          grad_queries(BLOCK * h.size), weights(BLOCK * STEP), grads(BLOCK * STEP) {}

    void key_head(int64_t b, int64_t k) {
        const int64_t length = heads.length, size = heads.size, across = heads.across();
        const int64_t group = heads.call.heads / heads.call.key_heads;
        heads.copy(length, heads.value(b, k), heads.width, keys.data());  // the values, until the keys come
        transpose(heads.padded(), size, keys.data(), size, turned_values.data(), across);
        heads.rotate(b, 0, length, heads.key(b, k), heads.width, T(1), keys.data());
        transpose(heads.padded(), size, keys.data(), size, turned_keys.data(), across);
        std::fill(grad_keys.data(), grad_keys.data() + size * across, T(0));
        std::fill(grad_values.data(), grad_values.data() + size * across, T(0));
        for (int64_t h = k * group; h < (k + 1) * group; h++)
            for (int64_t start = 0; start < length; start += BLOCK) block(b, h, start, std::min(BLOCK, length - start));
        transpose(size, length, grad_keys.data(), across, keys.data(), size);
        heads.rotate_back(b, 0, length, keys.data(), T(1), heads.grad_query(b, heads.call.heads + k), heads.width);
        T *of_values = heads.grad_query(b, heads.call.heads + heads.call.key_heads + k);
        transpose(size, length, grad_values.data(), across, of_values, heads.width);
    }

  private:
    void block(int64_t b, int64_t h, int64_t start, int64_t n) {
        const int64_t size = heads.size, wide = heads.out_width(), at = (b * heads.length + start) * wide + h * size;
        const T *out = (const T *)heads.call.out + at, *grad_out = (const T *)heads.call.grad_out + at;
        for (int64_t i = 0; i < n; i++) {
            T sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < size; j++) sum += out[i * wide + j] * grad_out[i * wide + j];
            inner[i] = sum;
        }
        heads.rotate(b, start, n, heads.query(b, h) + start * heads.width, heads.width, heads.scale, queries.data());
        heads.clear(n, queries.data());
        heads.copy(n, grad_out, wide, out_grads.data());
        transpose(up(n), size, queries.data(), size, turned_queries.data(), BLOCK);
        transpose(up(n), size, out_grads.data(), size, turned_grads.data(), BLOCK);
        std::fill(grad_queries.data(), grad_queries.data() + up(n) * size, T(0));
        for (int64_t from = heads.meets(b, start); from < start + n; from += CHUNK)
            chunk(b, h, start, n, from, std::min(CHUNK, up(start + n) - from));
        heads.rotate_back(b, start, n, grad_queries.data(), heads.scale, heads.grad_query(b, h) + start * heads.width,
                          heads.width);
    }

    void chunk(int64_t b, int64_t h, int64_t start, int64_t n, int64_t from, int64_t width) {
        const int64_t size = heads.size, across = heads.across(), m = up(n);
        const Blas &blas = heads.call.blas;
        T *p = weights.data(), *g = grads.data();
        heads.scores(m, width, queries.data(), size, turned_keys.data() + from, p);
        heads.scores(m, width, out_grads.data(), size, turned_values.data() + from, g);
        for (int64_t i = 0; i < n; i++) {
            T *pi = p + i * STEP, *gi = g + i * STEP;
            const Seen seen(heads.first(b, start + i), start + i, from, width);
            const T less = inner[i], shift = heads.log_sums(b, h)[start + i];
            for_vectors(seen.begin, seen.end, [&](int64_t j) {
                pi[j] = exponential(pi[j] - shift);
                gi[j] = pi[j] * (gi[j] - less);
            });
            clear_unseen(pi, seen, width);
            clear_unseen(gi, seen, width);
        }
        product<T>(blas, size, width, m, turned_grads.data(), BLOCK, p, STEP, true, grad_values.data() + from, across);
        product<T>(blas, size, width, m, turned_queries.data(), BLOCK, g, STEP, true, grad_keys.data() + from, across);
        product<T>(blas, m, size, width, g, STEP, keys.data() + from * size, size, true, grad_queries.data(), size);
    }
};

// task(worker, b, head) for every row of the batch and each of `heads` heads, divided among the threads.
template <typename T, typename Worker, typename Task> bool for_heads(const Attention &call, int64_t count, Task task) {
    const Heads<T> heads(call);
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(call.threads)
    unless_out_of_memory(failed, [&] {
        const OneThreadEach products(call.blas);
        Worker worker(heads);
        const int64_t tasks = call.batch * count, threads = omp_get_num_threads(), me = omp_get_thread_num();
        for (int64_t i = tasks * me / threads; i < tasks * (me + 1) / threads; i++) task(worker, i / count, i % count);
    });
    return !failed;
}

template <typename T> bool attend(const Attention &call) {
    return for_heads<T, Forward<T>>(call, call.heads, [](Forward<T> &w, int64_t b, int64_t h) { w.head(b, h); });
}

template <typename T> bool attend_back(const Attention &call) {
    return for_heads<T, Backward<T>>(call, call.key_heads,
                                     [](Backward<T> &w, int64_t b, int64_t k) { w.key_head(b, k); });
}

}  // namespace

extern "C" int64_t size_of_attention() { return sizeof(Attention); }

IN_BOTH_PRECISIONS(attend, attend, Attention)
IN_BOTH_PRECISIONS(attend_back, attend_back, Attention)
