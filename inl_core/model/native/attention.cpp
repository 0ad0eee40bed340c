// Causal attention inside documents on a CPU, rotary positions and grouped queries included, forward and backward.
//
//   score_ij = scale (R_i q_i) . (R_j k_j)     out_i = sum_j softmax_j(score_ij) v_j     first_i <= j <= i
//
// - Queries, keys and values are read where the projection wrote them, side by side in `packed`, and their gradients are
//   written so. What a query does not see is not computed, but for what lies in its block of rows.
// - A block of queries meets a chunk of keys at a time: the softmax is online, and no (S, S) matrix exists.
// - Kept for the backward pass: the output, and one number a query and head. It computes the scores again.
// - One task is a row of the batch and a head (forward) or a key-value head (backward, whose queries' heads share the
//   gradients of keys and values): the same bits by any number of threads.
// - Legend: B batch, S sequence, H query heads, K key-value heads, F head size; M queries of a block, W keys of a chunk.

#include <limits>

#include "common.h"

// The same fields in the same order as attention.py's Call.
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

    // left (m, F) right (n, F)^T
    void scores(int64_t m, int64_t n, const T *left, int64_t left_step, const T *right, int64_t right_step, T *out) const {
        product<T>(call.blas, false, true, m, n, size, left, left_step, right, right_step, 0, out, CHUNK);
    }
};

inline int64_t down(int64_t i) { return i / LANES * LANES; }
inline int64_t up(int64_t i) { return (i + LANES - 1) / LANES * LANES; }

// s[j] = exp(s[j] - shift) for begin <= j < end and 0 elsewhere in [0, width); the sum comes back.
template <typename T> inline T exponentials(T *s, int64_t begin, int64_t end, int64_t width, T shift) {
    const int64_t from = down(begin), to = up(end);  // whole vectors; a row has room for them
#pragma omp simd
    for (int64_t j = from; j < to; j++) s[j] = exponential(s[j] - shift);
    std::fill(s, s + begin, T(0));
    std::fill(s + end, s + std::max(to, width), T(0));
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = from; j < to; j++) sum += s[j];
    return sum;
}

// The keys of a chunk [start, start + width) that query i sees, counted from the chunk's start; may be none.
struct Seen {
    int64_t begin, end;
    Seen(int64_t first, int64_t i, int64_t start, int64_t width)
        : begin(std::max<int64_t>(first - start, 0)), end(std::min(i + 1 - start, width)) {}
    bool none() const { return begin >= end; }
};

template <typename T> struct Forward {
    const Heads<T> &heads;
    Scratch<T> keys, queries, scores, mixed;
    T largest[BLOCK], sums[BLOCK];

    explicit Forward(const Heads<T> &h)
        : heads(h), keys(h.length * h.size), queries(BLOCK * h.size), scores(BLOCK * CHUNK), mixed(BLOCK * h.size) {}

    void head(int64_t b, int64_t h) {
        const int64_t size = heads.size, k = h / (heads.call.heads / heads.call.key_heads);
        heads.rotate(b, 0, heads.length, heads.key(b, k), heads.width, T(1), keys.data());
        for (int64_t start = 0; start < heads.length; start += BLOCK) {
            const int64_t n = std::min(BLOCK, heads.length - start), end = start + n;
            heads.rotate(b, start, n, heads.query(b, h) + start * heads.width, heads.width, heads.scale, queries.data());
            std::fill(largest, largest + n, -std::numeric_limits<T>::infinity());
            std::fill(sums, sums + n, T(0));
            std::fill(mixed.data(), mixed.data() + n * size, T(0));
            for (int64_t from = heads.first(b, start); from < end; from += CHUNK)
                chunk(b, k, start, n, from, std::min(CHUNK, end - from));
            T *out = (T *)heads.call.out + (b * heads.length + start) * heads.out_width() + h * size;
            for (int64_t i = 0; i < n; i++) {
                const T share = T(1) / sums[i];
                for (int64_t j = 0; j < size; j++) out[i * heads.out_width() + j] = mixed.data()[i * size + j] * share;
                heads.log_sums(b, h)[start + i] = largest[i] + std::log(sums[i]);
            }
        }
    }

  private:
    // n queries from `start` on meet the keys [from, from + width).
    void chunk(int64_t b, int64_t k, int64_t start, int64_t n, int64_t from, int64_t width) {
        const int64_t size = heads.size;
        heads.scores(n, width, queries.data(), size, keys.data() + from * size, size, scores.data());
        for (int64_t i = 0; i < n; i++) {
            T *s = scores.data() + i * CHUNK;
            const Seen seen(heads.first(b, start + i), start + i, from, width);
            if (seen.none()) {
                std::fill(s, s + width, T(0));
                continue;
            }
            T most = largest[i];
#pragma omp simd reduction(max : most)
            for (int64_t j = seen.begin; j < seen.end; j++) most = s[j] > most ? s[j] : most;
            const T fade = sums[i] == 0 ? T(0) : std::exp(largest[i] - most);
            sums[i] = sums[i] * fade + exponentials(s, seen.begin, seen.end, width, most);
            if (fade != 1)
                for (int64_t j = 0; j < size; j++) mixed.data()[i * size + j] *= fade;
            largest[i] = most;
        }
        product<T>(heads.call.blas, false, false, n, size, width, scores.data(), CHUNK,
                   heads.value(b, k) + from * heads.width, heads.width, 1, mixed.data(), size);
    }
};

template <typename T> struct Backward {
    const Heads<T> &heads;
    Scratch<T> keys, grad_keys, grad_values, queries, grad_queries, weights, grads;
    T inner[BLOCK];  // of an output and its gradient

    explicit Backward(const Heads<T> &h)
        : heads(h), keys(h.length * h.size), grad_keys(h.length * h.size), grad_values(h.length * h.size),
          queries(BLOCK * h.size), grad_queries(BLOCK * h.size), weights(BLOCK * CHUNK), grads(BLOCK * CHUNK) {}

    void key_head(int64_t b, int64_t k) {
        const int64_t size = heads.size, whole = heads.length * size, group = heads.call.heads / heads.call.key_heads;
        heads.rotate(b, 0, heads.length, heads.key(b, k), heads.width, T(1), keys.data());
        std::fill(grad_keys.data(), grad_keys.data() + whole, T(0));
        std::fill(grad_values.data(), grad_values.data() + whole, T(0));
        for (int64_t h = k * group; h < (k + 1) * group; h++)
            for (int64_t start = 0; start < heads.length; start += BLOCK)
                block(b, h, k, start, std::min(BLOCK, heads.length - start));
        heads.rotate_back(b, 0, heads.length, grad_keys.data(), T(1), heads.grad_query(b, heads.call.heads + k), heads.width);
        T *of_values = heads.grad_query(b, heads.call.heads + heads.call.key_heads + k);
        for (int64_t i = 0; i < heads.length; i++)
            std::copy(grad_values.data() + i * size, grad_values.data() + (i + 1) * size, of_values + i * heads.width);
    }

  private:
    void block(int64_t b, int64_t h, int64_t k, int64_t start, int64_t n) {
        const int64_t size = heads.size, wide = heads.out_width(), at = (b * heads.length + start) * wide + h * size;
        const T *out = (const T *)heads.call.out + at, *grad_out = (const T *)heads.call.grad_out + at;
        for (int64_t i = 0; i < n; i++) {
            T sum = 0;
            for (int64_t j = 0; j < size; j++) sum += out[i * wide + j] * grad_out[i * wide + j];
            inner[i] = sum;
        }
        heads.rotate(b, start, n, heads.query(b, h) + start * heads.width, heads.width, heads.scale, queries.data());
        std::fill(grad_queries.data(), grad_queries.data() + n * size, T(0));
        for (int64_t from = heads.first(b, start); from < start + n; from += CHUNK)
            chunk(b, h, k, start, n, from, std::min(CHUNK, start + n - from), grad_out);
        heads.rotate_back(b, start, n, grad_queries.data(), heads.scale,
                          heads.grad_query(b, h) + start * heads.width, heads.width);
    }

    void chunk(int64_t b, int64_t h, int64_t k, int64_t start, int64_t n, int64_t from, int64_t width, const T *grad_out) {
        const int64_t size = heads.size, wide = heads.out_width();
        const Blas &blas = heads.call.blas;
        T *p = weights.data(), *g = grads.data();
        heads.scores(n, width, queries.data(), size, keys.data() + from * size, size, p);
        heads.scores(n, width, grad_out, wide, heads.value(b, k) + from * heads.width, heads.width, g);
        for (int64_t i = 0; i < n; i++) {
            T *pi = p + i * CHUNK, *gi = g + i * CHUNK;
            const Seen seen(heads.first(b, start + i), start + i, from, width);
            if (seen.none()) {
                std::fill(pi, pi + width, T(0));
                std::fill(gi, gi + width, T(0));
                continue;
            }
            exponentials(pi, seen.begin, seen.end, width, heads.log_sums(b, h)[start + i]);
            const T less = inner[i];
#pragma omp simd
            for (int64_t j = seen.begin; j < seen.end; j++) gi[j] = pi[j] * (gi[j] - less);
            std::fill(gi, gi + seen.begin, T(0));
            std::fill(gi + seen.end, gi + width, T(0));
        }
        product<T>(blas, true, false, width, size, n, p, CHUNK, grad_out, wide, 1, grad_values.data() + from * size, size);
        product<T>(blas, true, false, width, size, n, g, CHUNK, queries.data(), size, 1, grad_keys.data() + from * size, size);
        product<T>(blas, false, false, n, size, width, g, CHUNK, keys.data() + from * size, size, 1, grad_queries.data(), size);
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
    return for_heads<T, Backward<T>>(call, call.key_heads, [](Backward<T> &w, int64_t b, int64_t k) { w.key_head(b, k); });
}

}  // namespace

extern "C" int attend_float32(const Attention *call) { return completed<Attention, attend<float>>(call); }
extern "C" int attend_float64(const Attention *call) { return completed<Attention, attend<double>>(call); }
extern "C" int attend_back_float32(const Attention *call) { return completed<Attention, attend_back<float>>(call); }
extern "C" int attend_back_float64(const Attention *call) { return completed<Attention, attend_back<double>>(call); }
