// One step of a layer's iterations for some rows of tokens, forward and backward, and the constants it needs.
// integrator.cpp says what is computed, and takes tiles through it.
//
// - A missing c is a row of zeros: the same arithmetic, one instance for all.
// - Legend: N tokens, n rows, D dim, C width, G groups, T iterations.

#pragma once

#include "tiles.h"

// The same fields in the same order as in kernels/integrator.py; their sizes are compared at the first call.
struct Integrator {
    int64_t threads, rows, dim, width, groups, iterations, kept, activation, tile;
    double stride;
    double kappa;     // < 0: no dynamic alpha
    double beta_max;  // may be infinite
    double power;     // p of the energy terms; 0: no loss terms
    Blas blas;
    const double *speed_weights;  // (T,), null without loss terms
    // inputs
    const void *x, *v, *hoisted, *candidate, *inner, *outer, *bias, *mu, *forcing, *fraction;
    void *hidden;  // (kept, N, C): u before its activation
    // results
    void *x_out, *v_out, *speed, *energy;
    // gradients of the results, null for none
    const void *grad_x_out, *grad_v_out, *grad_speed, *grad_energy;
    // gradients of the inputs
    void *grad_x, *grad_v, *grad_hoisted, *grad_candidate, *grad_inner, *grad_outer, *grad_bias, *grad_mu;
    void *grad_forcing, *grad_fraction;
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

enum Activation { RELU, GELU, SILU, TANH };  // as kernels/integrator.py counts them

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
    const Integrator &call;
    int64_t dim, width, groups, iterations;
    T stride, kappa, beta_max, power;
    const T *inner, *outer, *bias, *mu;
    std::vector<T> zeros, inner_turned, outer_turned;  // (D,), (2 D, C), (C, G D)

    explicit Layer(const Integrator &c)
        : call(c), dim(c.dim), width(c.width), groups(c.groups), iterations(c.iterations), stride(T(c.stride)),
          kappa(T(c.kappa)), beta_max(T(c.beta_max)), power(T(c.power)), inner((const T *)c.inner),
          outer((const T *)c.outer), bias((const T *)c.bias), mu((const T *)c.mu), zeros(c.dim, T(0)),
          inner_turned(2 * dim * width), outer_turned(width * groups * dim) {
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

    // u (n, C) before its activation.
    void hidden(int64_t n, const T *hoisted, const T *x, const T *v, T *u) const {
        product(n, width, dim, x, dim, inner_turned.data(), width, false, u, width);
        product(n, width, dim, v, dim, inner_turned.data() + dim * width, width, true, u, width);
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

    // x_new and v_new of n rows; they may be x and v themselves. Of the controller's output, or of gains made of it.
    template <bool are_gains>
    void step(int64_t n, const T *o, const T *xs, const T *vs, const T *candidates, const T *f, T *x_new,
              T *v_new) const {
        const T *of_b = bias + dim, *of_g = bias + 2 * dim;
        const T *of_c = groups == 4 && !are_gains ? bias + 3 * dim : zeros.data();
        for (int64_t i = 0; i < n; i++, o += groups * dim) {
            const T *x = xs + i * dim, *v = vs + i * dim;
            const T *cs = groups == 4 ? o + 3 * dim : candidates ? candidates + i * dim : zeros.data();
            T *to_x = x_new + i * dim, *to_v = v_new + i * dim;
            const T m = dynamic(kappa < 0 ? T(0) : rms(x, mu, dim));
#pragma omp simd
            for (int64_t j = 0; j < dim; j++) {
                const T beta = are_gains ? o[dim + j] : pull(o[dim + j] + of_b[j], beta_max).beta;
                const Pair<T> s =
                    are_gains ? Pair<T>{o[j], o[2 * dim + j]} : sigmoids(o[j] + bias[j], o[2 * dim + j] + of_g[j]);
                const T xj = x[j], c = cs[j] + of_c[j];
                const T w = s.base * m * (v[j] - c) + c + f[j] + beta * (mu[j] - xj);
                to_v[j] = w;
                to_x[j] = xj + stride * s.gate * w;
            }
        }
    }

    // Gradients of n rows of one step: `o`, the gains, becomes that of the controller's output, gv that of v; gx gains
    // that of x past the controller; gcs (or null) is written by the `first` step, and added to like the sums over
    // rows.
    void step_back(bool first, int64_t n, T *o, const T *slopes, const T *xs, const T *vs, const T *candidates,
                   const T *f, T *gxs, T *gvs, T *gcs, T *of_bias, T *of_mu, T *of_forcing, T *of_x,
                   T *of_candidate) const {
        for (int64_t i = 0; i < n; i++) {
            const T *x = xs + i * dim, *v = vs + i * dim;
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

}  // namespace
