// The T iterations of one layer on a CPU, forward and backward: whole tiles of tokens through all iterations.
//
//   u = act(hoisted + x W_x + v W_v)                           (a, b, g and, where G = 4, c) = u W_out + bias
//   v_new = alpha (v - c) + c + beta (mu - x) + forcing        alpha = sigmoid(a) (1 - exp(-kappa rms(x - mu)))
//   x_new = x + stride gate v_new                              beta = min(softplus(b), beta_max), gate = sigmoid(g)
//
// - A tile of tokens goes through all iterations in its thread's own cache. The matrix products are a library's, called for
//   one tile in one thread; the rest is one pass.
// - The backward pass computes the iterations again, as fused.py does; u of the first `kept` iterations is kept.
// - A missing v or c is a row of zeros: the same arithmetic, one instance for all.
// - Legend: N tokens, n rows of a tile, D dim, C width, G groups, T iterations; matrices are row-major.

#include "tiles.h"

// The same fields in the same order as native.py's Call.
struct Call {
    int64_t threads, rows, dim, width, groups, iterations, kept, activation, tile, context_dim;
    double stride;
    double kappa;     // < 0: no dynamic alpha
    double beta_max;  // may be infinite
    double power;     // p of the energy terms; 0: no loss terms
    const double *speed_weights;  // (T,)
    Blas blas;
    // inputs
    const void *x, *v, *hoisted, *candidate, *inner, *outer, *bias, *mu, *forcing, *fraction;
    const void *context, *context_weight, *context_bias;  // (N, K), (C, K), (C,): in the place of `hoisted`, or null
    const void *stream, *gain;                            // (N, D), (D,): what is read out to, or null
    void *hidden;                                         // (kept, N, C): u before its activation
    // results
    void *x_out, *v_out, *speed, *energy;
    void *stream_out;  // stream + gain (x_T - x_0)
    // gradients of the results, null for none
    const void *grad_x_out, *grad_v_out, *grad_speed, *grad_energy, *grad_stream_out;
    // gradients of the inputs
    void *grad_x, *grad_v, *grad_hoisted, *grad_candidate, *grad_inner, *grad_outer, *grad_bias, *grad_mu, *grad_forcing,
        *grad_fraction;
    void *grad_context, *grad_context_weight, *grad_context_bias, *grad_gain;
};

namespace {

// beta and its derivative by b.
template <typename T> struct Pull {
    T beta, slope;
};

template <typename T> inline Pull<T> pull(T b, T beta_max) {
    const T e = exponential(-std::fabs(b));
    const T share = T(1) / ((T(1) + e) * (T(2) + e));  // one division for both quotients
    const T beta = (b > 0 ? b : T(0)) + log1p_by_quotient(e, e * (T(1) + e) * share);
    const T slope = (b > 0 ? T(1) : e) * (T(2) + e) * share;
    return {beta > beta_max ? beta_max : beta, beta < beta_max ? slope : T(0)};
}

// sigmoid(a) and sigmoid(g) by one division. Below -40 it is 4e-18, so that the product of both denominators is finite.
template <typename T> struct Pair {
    T base, gate;
};

template <typename T> inline Pair<T> sigmoids(T a, T g) {
    a = a < T(-40) ? T(-40) : a;  // comparisons that are false for NaN, which passes
    g = g < T(-40) ? T(-40) : g;
    const T one = T(1) + exponential(-a), other = T(1) + exponential(-g), share = T(1) / (one * other);
    return {other * share, one * share};
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

enum Activation { RELU, GELU, SILU, TANH };  // as native.py counts them

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

// f(kind) with the kind as a constant, so that loops inside it become vectors.
template <typename F> inline void with_activation(int64_t kind, F f) {
    switch (kind) {
    case RELU: return f(std::integral_constant<int64_t, RELU>());
    case GELU: return f(std::integral_constant<int64_t, GELU>());
    case SILU: return f(std::integral_constant<int64_t, SILU>());
    default: return f(std::integral_constant<int64_t, TANH>());
    }
}

// What one call needs everywhere, typed.
template <typename T> struct Layer {
    const Call &call;
    int64_t dim, width, groups, iterations;
    T stride, kappa, beta_max, power;
    const T *inner, *outer, *bias, *mu;
    std::vector<T> zeros, inner_turned, outer_turned, context_turned;  // (D,), (2 D, C), (C, G D), (K, C)

    explicit Layer(const Call &c)
        : call(c), dim(c.dim), width(c.width), groups(c.groups), iterations(c.iterations), stride(T(c.stride)),
          kappa(T(c.kappa)), beta_max(T(c.beta_max)), power(T(c.power)), inner((const T *)c.inner),
          outer((const T *)c.outer), bias((const T *)c.bias), mu((const T *)c.mu), zeros(c.dim, T(0)),
          inner_turned(2 * dim * width), outer_turned(width * groups * dim),
          context_turned(c.context ? c.context_dim * width : 0) {
        if (c.context) transpose(width, c.context_dim, (const T *)c.context_weight, c.context_dim, context_turned.data(), width);
        transpose(width, 2 * dim, inner, 2 * dim, inner_turned.data(), width);
        transpose(groups * dim, width, outer, width, outer_turned.data(), groups * dim);
    }

    // out (m, n) = left (m, k) right (k, n), added to what is there or not
    void product(int64_t m, int64_t n, int64_t k, const T *left, int64_t left_step, const T *right, int64_t right_step,
                 bool add, T *out, int64_t out_step) const {
        ::product<T>(call.blas, m, n, k, left, left_step, right, right_step, add, out, out_step);
    }

    const T *forcing(int64_t t) const { return (const T *)call.forcing + t * dim; }
    T fraction() const { return *(const T *)call.fraction; }
    bool is_partial(int64_t t) const { return call.fraction && t + 1 == iterations; }

    // What the context adds to u of the n rows from `start` on, given or computed in `room`.
    const T *hoisted(int64_t start, int64_t n, T *room) const {
        if (!call.context) return (const T *)call.hoisted + start * width;
        const T *given = (const T *)call.context_bias;
        for (int64_t i = 0; i < n; i++) std::copy(given, given + width, room + i * width);
        product(n, width, call.context_dim, (const T *)call.context + start * call.context_dim, call.context_dim,
                context_turned.data(), width, true, room, width);
        return room;
    }

    // u (n, C) before its activation.
    void hidden(int64_t n, const T *hoisted, const T *x, const T *v, T *u) const {
        product(n, width, dim, x, dim, inner_turned.data(), width, false, u, width);
        if (v) product(n, width, dim, v, dim, inner_turned.data() + dim * width, width, true, u, width);
#pragma omp simd
        for (int64_t i = 0; i < n * width; i++) u[i] += hoisted[i];
    }

    // The controller's output (n, GD) of u, without its bias; `activated` (n, C) is left for the backward pass.
    void outputs(int64_t n, const T *u, T *activated, T *o) const {
        with_activation(call.activation, [&](auto kind) {
#pragma omp simd
            for (int64_t i = 0; i < n * width; i++) activated[i] = activate(kind, u[i]);
        });
        product(n, groups * dim, width, activated, width, outer_turned.data(), groups * dim, false, o, groups * dim);
    }

    // The gains of n rows of the controller's output, in its place: alpha_base, beta, gate and, where G = 4, c; beta's
    // derivative to `slopes` (n, D).
    void gains(int64_t n, T *o, T *slopes) const {
        for (int64_t i = 0; i < n; i++, o += groups * dim, slopes += dim) {
#pragma omp simd
            for (int64_t j = 0; j < dim; j++) {
                const Pull<T> p = pull(o[dim + j] + bias[dim + j], beta_max);
                const Pair<T> s = sigmoids(o[j] + bias[j], o[2 * dim + j] + bias[2 * dim + j]);
                o[j] = s.base;
                o[dim + j] = p.beta;
                slopes[j] = p.slope;
                o[2 * dim + j] = s.gate;
            }
            if (groups == 4)
                for (int64_t j = 3 * dim; j < 4 * dim; j++) o[j] += bias[j];
        }
    }

    // 1 - exp(-kappa rms(x - mu)), or 1 without the dynamic alpha, of a size that is rms(x - mu).
    T dynamic(T size) const { return kappa < 0 ? T(1) : -std::expm1(-kappa * size); }

    // x_new and v_new of n rows; they may be x and v themselves. Of the controller's output, or of the gains made of it.
    template <bool are_gains>
    void step(int64_t n, const T *o, const T *xs, const T *vs, const T *candidates, const T *f, T *x_new, T *v_new) const {
        const T *of_b = bias + dim, *of_g = bias + 2 * dim, *of_c = groups == 4 && !are_gains ? bias + 3 * dim : zeros.data();
        for (int64_t i = 0; i < n; i++, o += groups * dim) {
            const T *x = xs + i * dim, *v = vs ? vs + i * dim : zeros.data();
            const T *cs = groups == 4 ? o + 3 * dim : candidates ? candidates + i * dim : zeros.data();
            T *to_x = x_new + i * dim, *to_v = v_new + i * dim;
            const T m = dynamic(kappa < 0 ? T(0) : rms(x, mu, dim));
#pragma omp simd
            for (int64_t j = 0; j < dim; j++) {
                const T beta = are_gains ? o[dim + j] : pull(o[dim + j] + of_b[j], beta_max).beta;
                const Pair<T> s = are_gains ? Pair<T>{o[j], o[2 * dim + j]} : sigmoids(o[j] + bias[j], o[2 * dim + j] + of_g[j]);
                const T xj = x[j], c = cs[j] + of_c[j], w = s.base * m * (v[j] - c) + c + f[j] + beta * (mu[j] - xj);
                to_v[j] = w;
                to_x[j] = xj + stride * s.gate * w;
            }
        }
    }

    // Gradients of n rows of one step: `o`, the gains, becomes that of the controller's output, gv that of v; gx gains that
    // of x past the controller; gcs (or null) is written by the `first` step, and added to like the sums over rows.
    void step_back(bool first, int64_t n, T *o, const T *slopes, const T *xs, const T *vs, const T *candidates, const T *f, T *gxs, T *gvs, T *gcs,
                   T *of_bias, T *of_mu, T *of_forcing, T *of_x, T *of_candidate) const {
        for (int64_t i = 0; i < n; i++) {
            const T *x = xs + i * dim, *v = vs ? vs + i * dim : zeros.data();
            const T *c = groups == 4 ? o + 3 * dim : candidates ? candidates + i * dim : zeros.data();
            T *gx = gxs + i * dim, *gv = gvs + i * dim, *gc = groups == 4 ? o + 3 * dim : of_candidate;
            const T size = rms(x, mu, dim), m = dynamic(size);
            T total = 0;  // what reaches m, times m's own factor
#pragma omp simd reduction(+ : total)
            for (int64_t j = 0; j < dim; j++) {
                const T base = o[j], beta = o[dim + j], gate = o[2 * dim + j];
                const T away = mu[j] - x[j], lead = v[j] - c[j];
                const T w = base * m * lead + c[j] + f[j] + beta * away;
                const T gw = gv[j] + stride * gate * gx[j];  // the gradient of v_new, all told
                const T of_alpha = gw * lead * base, carried = gw * base * m;
                const T of_a = of_alpha * m * (T(1) - base), of_b = gw * away * slopes[j];
                const T of_g = stride * gx[j] * w * gate * (T(1) - gate);
                total += of_alpha;
                o[j] = of_a;
                o[dim + j] = of_b;
                o[2 * dim + j] = of_g;
                gv[j] = carried;
                gc[j] = gw - carried;
                of_x[j] = -gw * beta;
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
            if (add_to && first && groups == 3)
                std::copy(gc, gc + dim, add_to);
            else if (add_to)
#pragma omp simd
                for (int64_t j = 0; j < dim; j++) add_to[j] += gc[j];
            o += groups * dim;
            slopes += dim;
        }
    }

    // to (n, D) = stream + gain (end - start)
    void read_out(int64_t n, const T *stream, const T *start, const T *end, T *to) const {
        const T *gain = (const T *)call.gain;
        for (int64_t i = 0; i < n * dim; i += dim)
#pragma omp simd
            for (int64_t j = 0; j < dim; j++) to[i + j] = stream[i + j] + gain[j] * (end[i + j] - start[i + j]);
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
        Scratch<T> room(call.context ? most * width : 0);
        Scratch<T> whole(call.fraction ? 2 * most * dim : 0);
        for_tiles(call.rows, tile_rows(call), [&](int64_t start, int64_t n) {
            const T *x = (const T *)call.x + start * dim, *v = call.v ? (const T *)call.v + start * dim : nullptr;
            const T *c = call.candidate ? (const T *)call.candidate + start * dim : nullptr;
            T *x_out = (T *)call.x_out + start * dim, *v_out = (T *)call.v_out + start * dim;
            const T *x0 = x, *hoisted = layer.hoisted(start, n, room.data());
            for (int64_t t = 0; t < call.iterations; t++) {
                T *here = t < call.kept ? (T *)call.hidden + (t * call.rows + start) * width : u.data();
                layer.hidden(n, hoisted, x, v, here);
                layer.outputs(n, here, activated.data(), o.data());
                if (layer.is_partial(t)) {
                    T *wx = whole.data(), *wv = wx + most * dim, f = layer.fraction();
                    layer.template step<false>(n, o.data(), x, v, c, layer.forcing(t), wx, wv);
                    for (int64_t i = 0; i < n * dim; i++) {
                        const T from = v ? v[i] : T(0);
                        x_out[i] = x[i] + f * (wx[i] - x[i]);
                        v_out[i] = from + f * (wv[i] - from);
                    }
                } else {
                    layer.template step<false>(n, o.data(), x, v, c, layer.forcing(t), x_out, v_out);
                }
                x = x_out;
                v = v_out;
                if (call.speed) layer.add_losses(n, t, x, v, (T *)call.speed + start, (T *)call.energy + start);
            }
            if (call.stream) layer.read_out(n, (const T *)call.stream + start * dim, x0, x, (T *)call.stream_out + start * dim);
        });
    });
    return !failed;
}

// Sums over tokens of the gradients of rows: bias, mu and one step's forcing.
template <typename T> struct RowSums {
    std::vector<T> bias, mu, forcing;
    explicit RowSums(const Call &c) : bias(c.groups * c.dim), mu(c.dim), forcing(c.dim) {}
};

// One thread's sums of the gradients that all tokens share. Those of rows are double: their terms are many and small.
template <typename T> struct Sums {
    std::vector<T> context;  // (C, K)
    RowSum<T> context_bias, gain;
    std::vector<T> inner, outer;
    std::vector<double> bias, mu, forcing;
    double fraction = 0;

    explicit Sums(const Call &c)
        : context(c.context ? c.width * c.context_dim : 0), context_bias(c.context ? c.width : 0),
          gain(c.stream ? c.dim : 0), inner(c.width * 2 * c.dim), outer(c.width * c.groups * c.dim), bias(c.groups * c.dim), mu(c.dim),
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

// One thread's backward pass over its tiles.
template <typename T> struct Back {
    const Layer<T> &layer;
    const Call &call;
    int64_t dim, width, iterations, most;
    bool reads_last;
    Sums<T> &sums;
    RowSums<T> of_rows;
    Scratch<T> states, velocities, outputs, slopes, us, activated, grad_u, turned, room, scratch_v, rest, of_x, of_candidate;

    Back(const Layer<T> &l, Sums<T> &s)
        : layer(l), call(l.call), dim(l.dim), width(l.width), iterations(l.iterations), most(tile_rows(l.call)),
          reads_last(call.fraction || call.power != 0), sums(s), of_rows(l.call), states((iterations - !reads_last) * most * dim),
          velocities((iterations - !reads_last) * most * dim), outputs(iterations * most * l.groups * dim),
          slopes(iterations * most * dim), us((iterations - call.kept) * most * width),
          activated(iterations * most * width), grad_u(most * width), turned(width * most), room(l.call.context ? most * width : 0), scratch_v(call.grad_v ? 0 : most * dim),
          rest(call.fraction ? 2 * most * dim : 0), of_x(dim), of_candidate(dim) {}

    // x_{t+1} and v_{t+1} of the tile.
    T *after(Scratch<T> &kept, int64_t t) { return kept.data() + t * most * dim; }
    T *output(int64_t t) { return outputs.data() + t * most * layer.groups * dim; }
    T *slope(int64_t t) { return slopes.data() + t * most * dim; }
    // u of the tile before its activation, as it was kept or to be computed again.
    T *hidden(int64_t start, int64_t t) {
        return t < call.kept ? (T *)call.hidden + (t * call.rows + start) * width : us.data() + (t - call.kept) * most * width;
    }

    void tile(int64_t start, int64_t n) {
        const T *x0 = (const T *)call.x + start * dim, *v0 = call.v ? (const T *)call.v + start * dim : nullptr;
        const T *c = call.candidate ? (const T *)call.candidate + start * dim : nullptr;
        again(start, n, x0, v0, c);
        T *gx = (T *)call.grad_x + start * dim, *g_hoisted = hoisted_grads(start);
        T *gv = call.grad_v ? (T *)call.grad_v + start * dim : scratch_v.data();
        T *gc = call.grad_candidate ? (T *)call.grad_candidate + start * dim : nullptr;
        fetch(call.grad_x_out, start, n, gx);
        fetch(call.grad_v_out, start, n, gv);
        if (call.stream) into_end(start, n, x0, gx);
        for (int64_t t = iterations - 1; t >= 0; t--) {
            const T *x = t ? after(states, t - 1) : x0, *v = t ? after(velocities, t - 1) : v0;
            if (layer.is_partial(t))
                split(start, n, t, x, v, gx, gv);
            else if (call.power != 0)
                layer.losses_back(start, n, t, after(states, t), after(velocities, t), gx, gv, of_rows.mu.data());
            for (int64_t i = 0; i < n; i += SUMMED_ROWS) {
                const int64_t at = i * dim;
                layer.step_back(t + 1 == iterations, std::min(SUMMED_ROWS, n - i), output(t) + at * layer.groups, slope(t) + at, x + at, v ? v + at : nullptr,
                                c ? c + at : nullptr, layer.forcing(t), gx + at, gv + at, gc ? gc + at : nullptr,
                                of_rows.bias.data(), of_rows.mu.data(), of_rows.forcing.data(), of_x.data(),
                                of_candidate.data());
                sums.take(of_rows, t);
            }
            through_controller(start, n, t, x, v, gx, gv, g_hoisted);
            if (layer.is_partial(t))
                for (int64_t i = 0; i < n * dim; i++) {
                    gx[i] += rest.data()[i];
                    gv[i] += rest.data()[most * dim + i];
                }
        }
        if (call.stream) into_start(start, n, gx);
        if (call.context) into_context(start, n, g_hoisted);
    }

    // Where the gradient of what the context adds to u goes, (n, C).
    T *hoisted_grads(int64_t start) { return call.context ? room.data() : (T *)call.grad_hoisted + start * width; }

    // Add what the read-out sends to x_T to its gradient, and what it sends to the gain.
    void into_end(int64_t start, int64_t n, const T *x0, T *gx) {
        const T *gain = (const T *)call.gain, *g = (const T *)call.grad_stream_out + start * dim;
        const T *end = (const T *)call.x_out + start * dim;
        T *of_gain = sums.gain.few.data();
        for (int64_t i = 0; i < n; i++) {
#pragma omp simd
            for (int64_t j = 0; j < dim; j++) {
                const int64_t at = i * dim + j;
                gx[at] += gain[j] * g[at];
                of_gain[j] += g[at] * (end[at] - x0[at]);
            }
            if (i + 1 == n || (i + 1) % SUMMED_ROWS == 0) sums.gain.take();
        }
    }

    // Take what it sends to x_0 from the gradient of that.
    void into_start(int64_t start, int64_t n, T *gx) {
        const T *gain = (const T *)call.gain, *g = (const T *)call.grad_stream_out + start * dim;
        for (int64_t i = 0; i < n * dim; i += dim)
#pragma omp simd
            for (int64_t j = 0; j < dim; j++) gx[i + j] -= gain[j] * g[i + j];
    }

    void into_context(int64_t start, int64_t n, const T *g_hoisted) {
        const int64_t inputs = call.context_dim;
        const T *given = (const T *)call.context + start * inputs;
        transpose(n, width, g_hoisted, width, turned.data(), n);
        layer.product(width, inputs, n, turned.data(), n, given, inputs, true, sums.context.data(), inputs);
        sums.context_bias.add(n, g_hoisted);
        layer.product(n, inputs, width, g_hoisted, width, (const T *)call.context_weight, inputs, false,
                      (T *)call.grad_context + start * inputs, inputs);
    }

    // The iterations again: the gains, and the states where they are read.
    void again(int64_t start, int64_t n, const T *x, const T *v, const T *c) {
        const T *hoisted = call.kept < iterations ? layer.hoisted(start, n, room.data()) : nullptr;
        for (int64_t t = 0; t < iterations; t++) {
            T *u = hidden(start, t);
            if (t >= call.kept) layer.hidden(n, hoisted, x, v, u);
            layer.outputs(n, u, activated.data() + t * most * width, output(t));
            layer.gains(n, output(t), slope(t));
            if (t + 1 < iterations || reads_last) {
                layer.template step<true>(n, output(t), x, v, c, layer.forcing(t), after(states, t), after(velocities, t));
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
    void through_controller(int64_t start, int64_t n, int64_t t, const T *x, const T *v, T *gx, T *gv, T *g_hoisted) {
        const int64_t wide = layer.groups * dim;
        const T *o = output(t), *u = hidden(start, t), *a = activated.data() + t * most * width;
        T *gu = grad_u.data(), *g_inner = sums.inner.data();
        transpose(n, width, a, width, turned.data(), n);
        layer.product(width, wide, n, turned.data(), n, o, wide, true, sums.outer.data(), wide);
        layer.product(n, width, wide, o, wide, layer.outer, width, false, gu, width);
        with_activation(call.activation, [&](auto kind) {
#pragma omp simd
            for (int64_t i = 0; i < n * width; i++) gu[i] *= derivative(kind, u[i]);
        });
        if (t + 1 == iterations)
            std::copy(gu, gu + n * width, g_hoisted);
        else
            for (int64_t i = 0; i < n * width; i++) g_hoisted[i] += gu[i];
        transpose(n, width, gu, width, turned.data(), n);
        layer.product(width, dim, n, turned.data(), n, x, dim, true, g_inner, 2 * dim);
        layer.product(n, dim, width, gu, width, layer.inner, 2 * dim, true, gx, dim);
        if (!v) return;
        layer.product(width, dim, n, turned.data(), n, v, dim, true, g_inner + dim, 2 * dim);
        layer.product(n, dim, width, gu, width, layer.inner + dim, 2 * dim, true, gv, dim);
    }
};

template <typename T> bool backward(const Call &call) {
    const Layer<T> layer(call);
    Parts<Sums<T>> sums(call.threads);
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(call.threads)
    {
        unless_out_of_memory(failed, [&] {
            const OneThreadEach products(call.blas);
            Sums<T> &own = *(sums[omp_get_thread_num()] = std::make_unique<Sums<T>>(call));
            Back<T> back(layer, own);
            for_tiles(call.rows, tile_rows(call), [&](int64_t start, int64_t n) { back.tile(start, n); });
        });
#pragma omp barrier
        if (!failed) {
            write_share<T>(call.grad_inner, sums, [](const Sums<T> &s) -> auto & { return s.inner; });
            write_share<T>(call.grad_outer, sums, [](const Sums<T> &s) -> auto & { return s.outer; });
            write_share<T>(call.grad_bias, sums, [](const Sums<T> &s) -> auto & { return s.bias; });
            write_share<T>(call.grad_mu, sums, [](const Sums<T> &s) -> auto & { return s.mu; });
            write_share<T>(call.grad_forcing, sums, [](const Sums<T> &s) -> auto & { return s.forcing; });
            if (call.context) {
                write_share<T>(call.grad_context_weight, sums, [](const Sums<T> &s) -> auto & { return s.context; });
                write_share<T>(call.grad_context_bias, sums, [](const Sums<T> &s) -> auto & { return s.context_bias.all; });
            }
            if (call.stream) write_share<T>(call.grad_gain, sums, [](const Sums<T> &s) -> auto & { return s.gain.all; });
        }
    }
    if (call.fraction)
        for (const auto &one : sums)
            if (one) *(T *)call.grad_fraction += T(one->fraction);
    return !failed;
}

}  // namespace

IN_BOTH_PRECISIONS(iterate, forward, Call)
IN_BOTH_PRECISIONS(iterate_back, backward, Call)
