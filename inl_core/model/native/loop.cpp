// The T iterations of one layer on a CPU, forward and backward: whole tiles of tokens through all iterations.
//
//   u = act(hoisted + x W_x + v W_v)                           (a, b, g and, where G = 4, c) = u W_out + bias
//   v_new = alpha (v - c) + c + beta (mu - x) + forcing        alpha = sigmoid(a) (1 - exp(-kappa rms(x - mu)))
//   x_new = x + stride gate v_new                              beta = min(softplus(b), beta_max), gate = sigmoid(g)
//
// - Each thread takes an even share of the tokens, a tile at a time, so that what lies between two operations stays in its
//   own cache. The matrix products are the BLAS library's, called for one tile in one thread; the rest is one pass.
// - The backward pass computes the iterations again, as fused.py does; u of the first `kept` iterations is kept.
// - Every thread sums the weights' gradients for itself, and the sums are added in the threads' order: with the same
//   number of threads, the same bits. Sums over tokens are of some rows first, then in double precision.
// - A missing v or c is a row of zeros: the same arithmetic, one instance for all.
// - Legend: N tokens, n rows of a tile, D dim, C width, G groups, T iterations; matrices are row-major.

#include <vector>

#include "common.h"

// The same fields in the same order as native.py's Call.
struct Call {
    int64_t threads, rows, dim, width, groups, iterations, kept, activation, tile;
    double stride;
    double kappa;     // < 0: no dynamic alpha
    double beta_max;  // may be infinite
    double power;     // p of the energy terms; 0: no loss terms
    const double *speed_weights;  // (T,)
    Blas blas;
    // inputs
    const void *x, *v, *hoisted, *candidate, *inner, *outer, *bias, *mu, *forcing, *fraction;
    void *hidden;  // (kept, N, C): u before its activation
    // results
    void *x_out, *v_out, *speed, *energy;
    // gradients of the results, null for none
    const void *grad_x_out, *grad_v_out, *grad_speed, *grad_energy;
    // gradients of the inputs; those of the weights are added to
    void *grad_x, *grad_v, *grad_hoisted, *grad_candidate, *grad_inner, *grad_outer, *grad_bias, *grad_mu, *grad_forcing,
        *grad_fraction;
};

namespace {

// alpha_base, beta, its derivative by b, gate: the gains of one element.
template <typename T> struct Gains {
    T base, beta, slope, gate;
};

template <typename T> inline Gains<T> gains(T a, T b, T g, T beta_max) {
    const T e = exponential(-std::fabs(b));
    const T beta = (b > 0 ? b : T(0)) + log1p_of_unit(e);
    const T slope = (b > 0 ? T(1) : e) / (T(1) + e);
    return {sigmoid(a), beta > beta_max ? beta_max : beta, beta < beta_max ? slope : T(0), sigmoid(g)};
}

template <typename T> inline T rms(const T *x, const T *mu, int64_t dim) {
    T squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < dim; j++) {
        const T error = x[j] - mu[j];
        squares += error * error;
    }
    return std::sqrt(squares / dim);
}

enum Activation { RELU, GELU, SILU, TANH };

template <typename T> inline T activate(int64_t kind, T u) {
    switch (kind) {
    case RELU: return u < 0 ? T(0) : u;
    case GELU: return u * T(0.5) * (T(1) + std::erf(u * T(M_SQRT1_2)));
    case SILU: return u / (T(1) + std::exp(-u));
    default: return std::tanh(u);
    }
}

template <typename T> inline T derivative(int64_t kind, T u) {
    switch (kind) {
    case RELU: return u <= 0 ? T(0) : T(1);
    case GELU: {
        const T density = std::exp(-u * u * T(0.5)) * T(M_2_SQRTPI * M_SQRT1_2 * 0.5);
        return T(0.5) * (T(1) + std::erf(u * T(M_SQRT1_2))) + u * density;
    }
    case SILU: {
        const T s = T(1) / (T(1) + std::exp(-u));
        return s * (T(1) + u * (T(1) - s));
    }
    default: {
        const T t = std::tanh(u);
        return T(1) - t * t;
    }
    }
}

// What one call needs everywhere, typed.
template <typename T> struct Layer {
    const Call &call;
    int64_t dim, width, groups, iterations;
    T stride, kappa, beta_max, power;
    const T *inner, *outer, *bias, *mu;
    std::vector<T> zeros;

    explicit Layer(const Call &c)
        : call(c), dim(c.dim), width(c.width), groups(c.groups), iterations(c.iterations), stride(T(c.stride)),
          kappa(T(c.kappa)), beta_max(T(c.beta_max)), power(T(c.power)), inner((const T *)c.inner),
          outer((const T *)c.outer), bias((const T *)c.bias), mu((const T *)c.mu), zeros(c.dim, T(0)) {}

    // out (m, n) = beta out + op(left) (m, k) op(right) (k, n)
    void product(bool left_t, bool right_t, int64_t m, int64_t n, int64_t k, const T *left, int64_t left_step,
                 const T *right, int64_t right_step, T beta, T *out, int64_t out_step) const {
        ::product<T>(call.blas, left_t, right_t, m, n, k, left, left_step, right, right_step, beta, out, out_step);
    }

    const T *forcing(int64_t t) const { return (const T *)call.forcing + t * dim; }
    T fraction() const { return *(const T *)call.fraction; }
    bool is_partial(int64_t t) const { return call.fraction && t + 1 == iterations; }

    // u (n, C) before its activation.
    void hidden(int64_t n, const T *hoisted, const T *x, const T *v, T *u) const {
        std::copy(hoisted, hoisted + n * width, u);
        product(false, true, n, width, dim, x, dim, inner, 2 * dim, 1, u, width);
        if (v) product(false, true, n, width, dim, v, dim, inner + dim, 2 * dim, 1, u, width);
    }

    // The controller's output (n, GD) of u; `activated` (n, C) is left for the backward pass.
    void outputs(int64_t n, const T *u, T *activated, T *o) const {
        for (int64_t i = 0; i < n * width; i++) activated[i] = activate(call.activation, u[i]);
        for (int64_t i = 0; i < n; i++) std::copy(bias, bias + groups * dim, o + i * groups * dim);
        product(false, true, n, groups * dim, width, activated, width, outer, width, 1, o, groups * dim);
    }

    // x_new and v_new of n rows; they may be x and v themselves.
    void step(int64_t n, const T *o, const T *xs, const T *vs, const T *candidates, const T *f, T *x_new, T *v_new) const {
        for (int64_t i = 0; i < n; i++) {
            const T *x = xs + i * dim, *v = vs ? vs + i * dim : zeros.data();
            const T *c = groups == 4 ? o + 3 * dim : candidates ? candidates + i * dim : zeros.data();
            T *to_x = x_new + i * dim, *to_v = v_new + i * dim;
            const T m = kappa < 0 ? T(1) : -std::expm1(-kappa * rms(x, mu, dim));
#pragma omp simd
            for (int64_t j = 0; j < dim; j++) {
                const Gains<T> s = gains(o[j], o[dim + j], o[2 * dim + j], beta_max);
                const T xj = x[j], w = s.base * m * (v[j] - c[j]) + c[j] + f[j] + s.beta * (mu[j] - xj);
                to_v[j] = w;
                to_x[j] = xj + stride * s.gate * w;
            }
            o += groups * dim;
        }
    }

    // Gradients of n rows of one step: `o` becomes that of the controller's output, gv that of v; gx gains that of x past
    // the controller; gcs (or null) and the sums over rows are added to.
    void step_back(int64_t n, T *o, const T *xs, const T *vs, const T *candidates, const T *f, T *gxs, T *gvs, T *gcs,
                   T *of_bias, T *of_mu, T *of_forcing, T *of_x, T *of_candidate) const {
        for (int64_t i = 0; i < n; i++) {
            const T *x = xs + i * dim, *v = vs ? vs + i * dim : zeros.data();
            const T *c = groups == 4 ? o + 3 * dim : candidates ? candidates + i * dim : zeros.data();
            T *gx = gxs + i * dim, *gv = gvs + i * dim, *gc = groups == 4 ? o + 3 * dim : of_candidate;
            const T size = rms(x, mu, dim), m = kappa < 0 ? T(1) : -std::expm1(-kappa * size);
            T total = 0;  // what reaches m, times m's own factor
#pragma omp simd reduction(+ : total)
            for (int64_t j = 0; j < dim; j++) {
                const Gains<T> s = gains(o[j], o[dim + j], o[2 * dim + j], beta_max);
                const T away = mu[j] - x[j], lead = v[j] - c[j];
                const T w = s.base * m * lead + c[j] + f[j] + s.beta * away;
                const T gw = gv[j] + stride * s.gate * gx[j];  // the gradient of v_new, all told
                const T of_alpha = gw * lead * s.base, carried = gw * s.base * m;
                const T of_a = of_alpha * m * (T(1) - s.base), of_b = gw * away * s.slope;
                const T of_g = stride * gx[j] * w * s.gate * (T(1) - s.gate);
                total += of_alpha;
                o[j] = of_a;
                o[dim + j] = of_b;
                o[2 * dim + j] = of_g;
                gv[j] = carried;
                gc[j] = gw - carried;
                of_x[j] = -gw * s.beta;
                of_bias[j] += of_a;
                of_bias[dim + j] += of_b;
                of_bias[2 * dim + j] += of_g;
                of_forcing[j] += gw;
            }
            // The gradient of rms at zero is zero. A size that is NaN is not zero and must be seen.
            const T pull = kappa < 0 || size == 0 ? T(0) : total * (T(1) - m) * kappa / (dim * size);
#pragma omp simd
            for (int64_t j = 0; j < dim; j++) {
                const T p = of_x[j] - (mu[j] - x[j]) * pull;
                gx[j] += p;
                of_mu[j] -= p;
            }
            T *add_to = groups == 4 ? of_bias + 3 * dim : gcs ? gcs + i * dim : nullptr;
            if (add_to)
#pragma omp simd
                for (int64_t j = 0; j < dim; j++) add_to[j] += gc[j];
            o += groups * dim;
        }
    }

    // Add the terms of the speed and energy losses of n rows at the end of step t.
    void add_losses(int64_t n, int64_t t, const T *xs, const T *vs, T *speed, T *energy) const {
        for (int64_t i = 0; i < n; i++) {
            T away = 0, work = 0;
            for (int64_t j = 0; j < dim; j++) {
                const T v = vs[i * dim + j];
                away += std::fabs(xs[i * dim + j] - mu[j]);
                work += power == 2 ? v * v : std::pow(std::fabs(v), power);
            }
            speed[i] += T(call.speed_weights[t]) * away / dim;
            energy[i] += work / (dim * iterations);
        }
    }

    // Their gradients, from the first row `start` on.
    void losses_back(int64_t start, int64_t n, int64_t t, const T *xs, const T *vs, T *gxs, T *gvs, T *of_mu) const {
        const T *of_speed = (const T *)call.grad_speed, *of_energy = (const T *)call.grad_energy;
        for (int64_t i = 0; i < n; i++) {
            const T pull = of_speed ? of_speed[start + i] * T(call.speed_weights[t]) / dim : T(0);
            const T push = of_energy ? of_energy[start + i] * power / (dim * iterations) : T(0);
            for (int64_t j = 0; j < dim; j++) {
                const T error = xs[i * dim + j] - mu[j], v = vs[i * dim + j];
                const T p = error > 0 ? pull : error < 0 ? -pull : T(0);
                gxs[i * dim + j] += p;
                of_mu[j] -= p;
                const T slope = power == 2 ? v : std::copysign(std::pow(std::fabs(v), power - 1), v);
                // sign(0) is 0 for p = 1, as autograd has it; below 1 the slope at zero is infinite
                gvs[i * dim + j] += push * (v == 0 && power >= 1 ? T(0) : slope);
            }
        }
    }
};

// f(first row, rows) for the tiles of this thread's share.
template <typename F> void for_tiles(const Call &call, F f) {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t begin = call.rows * me / threads, end = call.rows * (me + 1) / threads;
    if (begin == end) return;
    const int64_t tiles = (end - begin + call.tile - 1) / call.tile, size = (end - begin + tiles - 1) / tiles;
    for (int64_t start = begin; start < end; start += size) f(start, std::min(size, end - start));
}

inline int64_t tile_rows(const Call &call) { return std::min(call.tile, call.rows); }

template <typename T> bool forward(const Call &call) {
    const Layer<T> layer(call);
    const int64_t dim = call.dim, width = call.width;
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(call.threads)
    unless_out_of_memory(failed, [&] {
        const OneThreadEach products(call.blas);
        const int64_t most = tile_rows(call);
        Scratch<T> o(most * call.groups * dim), u(most * width), activated(most * width);
        Scratch<T> whole(call.fraction ? 2 * most * dim : 0);
        for_tiles(call, [&](int64_t start, int64_t n) {
            const T *x = (const T *)call.x + start * dim, *v = call.v ? (const T *)call.v + start * dim : nullptr;
            const T *c = call.candidate ? (const T *)call.candidate + start * dim : nullptr;
            T *x_out = (T *)call.x_out + start * dim, *v_out = (T *)call.v_out + start * dim;
            for (int64_t t = 0; t < call.iterations; t++) {
                T *here = t < call.kept ? (T *)call.hidden + (t * call.rows + start) * width : u.data();
                layer.hidden(n, (const T *)call.hoisted + start * width, x, v, here);
                layer.outputs(n, here, activated.data(), o.data());
                if (layer.is_partial(t)) {
                    T *wx = whole.data(), *wv = wx + most * dim, f = layer.fraction();
                    layer.step(n, o.data(), x, v, c, layer.forcing(t), wx, wv);
                    for (int64_t i = 0; i < n * dim; i++) {
                        const T from = v ? v[i] : T(0);
                        x_out[i] = x[i] + f * (wx[i] - x[i]);
                        v_out[i] = from + f * (wv[i] - from);
                    }
                } else {
                    layer.step(n, o.data(), x, v, c, layer.forcing(t), x_out, v_out);
                }
                x = x_out;
                v = v_out;
                if (call.speed) layer.add_losses(n, t, x, v, (T *)call.speed + start, (T *)call.energy + start);
            }
        });
    });
    return !failed;
}

constexpr int64_t SUMMED_ROWS = 64;  // at most these are summed in the state's own precision

// Sums over tokens of the gradients of rows: bias, mu and one step's forcing.
template <typename T> struct RowSums {
    std::vector<T> bias, mu, forcing;
    explicit RowSums(const Call &c) : bias(c.groups * c.dim), mu(c.dim), forcing(c.dim) {}
};

// One thread's sums of the gradients that all tokens share. Those of rows are double: their terms are many and small.
template <typename T> struct Sums {
    std::vector<T> inner, outer;
    std::vector<double> bias, mu, forcing;
    double fraction = 0;

    explicit Sums(const Call &c)
        : inner(c.width * 2 * c.dim), outer(c.width * c.groups * c.dim), bias(c.groups * c.dim), mu(c.dim),
          forcing(c.iterations * c.dim) {}

    // Take the sums of one tile's step t, and leave zeros.
    void take(RowSums<T> &tile, int64_t t) {
        take(tile.bias, bias.data());
        take(tile.mu, mu.data());
        take(tile.forcing, forcing.data() + t * int64_t(tile.forcing.size()));
    }

  private:
    static void take(std::vector<T> &from, double *to) {
        for (size_t i = 0; i < from.size(); i++) to[i] += from[i];
        std::fill(from.begin(), from.end(), T(0));
    }
};

// Add this thread's share of the elements of one gradient: the threads' sums, in their order.
template <typename T, typename Parts, typename P> void add_share(void *to, const Parts &parts, P part) {
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num(), size = ((*parts[0]).*part).size();
    const int64_t begin = size * me / threads, end = size * (me + 1) / threads;
    T *sum = (T *)to;
    for (const auto &one : parts)
        if (one)
            for (int64_t i = begin; i < end; i++) sum[i] += T(((*one).*part)[i]);
}

// One thread's backward pass over its tiles.
template <typename T> struct Back {
    const Layer<T> &layer;
    const Call &call;
    int64_t dim, width, iterations, most;
    bool reads_last;
    Sums<T> &sums;
    RowSums<T> of_rows;
    Scratch<T> states, velocities, outputs, us, activated, grad_u, scratch_v, rest, of_x, of_candidate;

    Back(const Layer<T> &l, Sums<T> &s)
        : layer(l), call(l.call), dim(l.dim), width(l.width), iterations(l.iterations), most(tile_rows(l.call)),
          reads_last(call.fraction || call.power != 0), sums(s), of_rows(l.call), states((iterations - !reads_last) * most * dim),
          velocities((iterations - !reads_last) * most * dim), outputs(iterations * most * l.groups * dim), us(iterations * most * width),
          activated(iterations * most * width), grad_u(most * width), scratch_v(call.grad_v ? 0 : most * dim),
          rest(call.fraction ? 2 * most * dim : 0), of_x(dim), of_candidate(dim) {}

    // x_{t+1} and v_{t+1} of the tile.
    T *after(Scratch<T> &kept, int64_t t) { return kept.data() + t * most * dim; }
    T *output(int64_t t) { return outputs.data() + t * most * layer.groups * dim; }

    void tile(int64_t start, int64_t n) {
        const T *x0 = (const T *)call.x + start * dim, *v0 = call.v ? (const T *)call.v + start * dim : nullptr;
        const T *c = call.candidate ? (const T *)call.candidate + start * dim : nullptr;
        again(start, n, x0, v0, c);
        T *gx = (T *)call.grad_x + start * dim;
        T *gv = call.grad_v ? (T *)call.grad_v + start * dim : scratch_v.data();
        T *gc = call.grad_candidate ? (T *)call.grad_candidate + start * dim : nullptr;
        fetch(call.grad_x_out, start, n, gx);
        fetch(call.grad_v_out, start, n, gv);
        for (int64_t t = iterations - 1; t >= 0; t--) {
            const T *x = t ? after(states, t - 1) : x0, *v = t ? after(velocities, t - 1) : v0;
            if (layer.is_partial(t))
                split(start, n, t, x, v, gx, gv);
            else if (call.power != 0)
                layer.losses_back(start, n, t, after(states, t), after(velocities, t), gx, gv, of_rows.mu.data());
            for (int64_t i = 0; i < n; i += SUMMED_ROWS) {
                const int64_t at = i * dim;
                layer.step_back(std::min(SUMMED_ROWS, n - i), output(t) + at * layer.groups, x + at, v ? v + at : nullptr,
                                c ? c + at : nullptr, layer.forcing(t), gx + at, gv + at, gc ? gc + at : nullptr,
                                of_rows.bias.data(), of_rows.mu.data(), of_rows.forcing.data(), of_x.data(),
                                of_candidate.data());
                sums.take(of_rows, t);
            }
            through_controller(start, n, t, x, v, gx, gv);
            if (layer.is_partial(t))
                for (int64_t i = 0; i < n * dim; i++) {
                    gx[i] += rest.data()[i];
                    gv[i] += rest.data()[most * dim + i];
                }
        }
    }

    // The iterations again: the controller's outputs, and the states where they are read.
    void again(int64_t start, int64_t n, const T *x, const T *v, const T *c) {
        for (int64_t t = 0; t < iterations; t++) {
            T *u = us.data() + t * most * width;
            if (t < call.kept) {
                const T *kept = (const T *)call.hidden + (t * call.rows + start) * width;
                std::copy(kept, kept + n * width, u);
            } else {
                layer.hidden(n, (const T *)call.hoisted + start * width, x, v, u);
            }
            layer.outputs(n, u, activated.data() + t * most * width, output(t));
            if (t + 1 < iterations || reads_last) {
                layer.step(n, output(t), x, v, c, layer.forcing(t), after(states, t), after(velocities, t));
                x = after(states, t);
                v = after(velocities, t);
            }
        }
    }

    void fetch(const void *from, int64_t start, int64_t n, T *to) {
        const T *given = (const T *)from;
        if (given)
            std::copy(given + start * dim, given + (start + n) * dim, to);
        else
            std::fill(to, to + n * dim, T(0));
    }

    // Leave in gx and gv what goes into the last full step, and in `rest` what passes it by: (1 - f) x_{T-1} + f x_T.
    void split(int64_t start, int64_t n, int64_t t, const T *x, const T *v, T *gx, T *gv) {
        const T f = layer.fraction();
        T *x_new = after(states, t), *v_new = after(velocities, t), *rest_x = rest.data(), *rest_v = rest_x + most * dim;
        for (int64_t i = 0; i < n * dim; i++) {  // the mixture into `rest` for now
            const T from = v ? v[i] : T(0);
            rest_x[i] = x[i] + f * (x_new[i] - x[i]);
            rest_v[i] = from + f * (v_new[i] - from);
        }
        if (call.power != 0) layer.losses_back(start, n, t, rest_x, rest_v, gx, gv, of_rows.mu.data());
        double of_fraction = 0;
        for (int64_t i = 0; i < n * dim; i++) {
            of_fraction += double(gx[i]) * (x_new[i] - x[i]) + double(gv[i]) * (v_new[i] - (v ? v[i] : T(0)));
            rest_x[i] = gx[i] * (T(1) - f);
            rest_v[i] = gv[i] * (T(1) - f);
            gx[i] *= f;
            gv[i] *= f;
        }
        sums.fraction += of_fraction;
    }

    // Add what goes through the controller to the gradients of x, v, the context's projection and the weights.
    void through_controller(int64_t start, int64_t n, int64_t t, const T *x, const T *v, T *gx, T *gv) {
        const int64_t wide = layer.groups * dim;
        const T *o = output(t), *u = us.data() + t * most * width, *a = activated.data() + t * most * width;
        T *gu = grad_u.data(), *g_inner = sums.inner.data();
        layer.product(true, false, width, wide, n, a, width, o, wide, 1, sums.outer.data(), wide);
        layer.product(false, false, n, width, wide, o, wide, layer.outer, width, 0, gu, width);
        T *g_hoisted = (T *)call.grad_hoisted + start * width;
        const bool first = t + 1 == iterations;
        for (int64_t i = 0; i < n * width; i++) {
            gu[i] *= derivative(call.activation, u[i]);
            g_hoisted[i] = first ? gu[i] : g_hoisted[i] + gu[i];
        }
        layer.product(true, false, width, dim, n, gu, width, x, dim, 1, g_inner, 2 * dim);
        layer.product(false, false, n, dim, width, gu, width, layer.inner, 2 * dim, 1, gx, dim);
        if (!v) return;
        layer.product(true, false, width, dim, n, gu, width, v, dim, 1, g_inner + dim, 2 * dim);
        layer.product(false, false, n, dim, width, gu, width, layer.inner + dim, 2 * dim, 1, gv, dim);
    }
};

template <typename T> bool backward(const Call &call) {
    const Layer<T> layer(call);
    std::vector<std::unique_ptr<Sums<T>>> sums(call.threads);  // each made, and so first touched, by its own thread
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(call.threads)
    {
        unless_out_of_memory(failed, [&] {
            const OneThreadEach products(call.blas);
            Sums<T> &own = *(sums[omp_get_thread_num()] = std::make_unique<Sums<T>>(call));
            Back<T> back(layer, own);
            for_tiles(call, [&](int64_t start, int64_t n) { back.tile(start, n); });
        });
#pragma omp barrier
        if (!failed) {
            add_share<T>(call.grad_inner, sums, &Sums<T>::inner);
            add_share<T>(call.grad_outer, sums, &Sums<T>::outer);
            add_share<T>(call.grad_bias, sums, &Sums<T>::bias);
            add_share<T>(call.grad_mu, sums, &Sums<T>::mu);
            add_share<T>(call.grad_forcing, sums, &Sums<T>::forcing);
        }
    }
    if (call.fraction)
        for (const auto &one : sums)
            if (one) *(T *)call.grad_fraction += T(one->fraction);
    return !failed;
}

}  // namespace

// 1, or 0 when there was not the memory.
extern "C" int forward_float32(const Call *call) { return completed<Call, forward<float>>(call); }
extern "C" int forward_float64(const Call *call) { return completed<Call, forward<double>>(call); }
extern "C" int backward_float32(const Call *call) { return completed<Call, backward<float>>(call); }
extern "C" int backward_float64(const Call *call) { return completed<Call, backward<double>>(call); }
