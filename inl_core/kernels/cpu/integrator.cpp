// The T iterations of one layer on a CPU, forward and backward: whole tiles of tokens through all iterations.
//
//   u = act(hoisted + x W_x + v W_v)                           (a, b, g and, where G = 4, c) = u W_out + bias
//   v_new = alpha (v - c) + c + beta (mu - x) + forcing        alpha = sigmoid(a) (1 - exp(-kappa rms(x - mu)))
//   x_new = x + stride gate v_new                              beta = min(softplus(b), beta_max), gate = sigmoid(g)
//
// - A tile of tokens goes through all iterations in its thread's own cache. The matrix products are a library's, called
//   for one tile in one thread; the rest is one pass.
// - The backward pass computes the iterations again; u of the first `kept` iterations is kept.
// - Legend: N tokens, n rows of a tile, D dim, C width, G groups, T iterations; matrices are row-major.

#include "integrator_step.h"

namespace {

inline int64_t tile_rows(const Integrator &call) { return std::min(call.tile, call.rows); }

template <typename T> bool forward(const Integrator &call) {
    const Layer<T> layer(call);
    const int64_t dim = call.dim, width = call.width;
    std::atomic<bool> failed{false};
#pragma omp parallel num_threads(call.threads)
    unless_out_of_memory(failed, [&] {
        const OneThreadEach products(call.blas);
        const int64_t most = tile_rows(call);
        Scratch<T> o(most * call.groups * dim), u(most * width), activated(most * width);
        Scratch<T> whole(call.fraction ? 2 * most * dim : 0);
        for_tiles(call.rows, tile_rows(call), [&](int64_t start, int64_t n) {
            const T *x = (const T *)call.x + start * dim, *v = (const T *)call.v + start * dim;
            const T *c = call.candidate ? (const T *)call.candidate + start * dim : nullptr;
            T *x_out = (T *)call.x_out + start * dim, *v_out = (T *)call.v_out + start * dim;
            const T *hoisted = (const T *)call.hoisted + start * width;
            for (int64_t t = 0; t < call.iterations; t++) {
                T *here = t < call.kept ? (T *)call.hidden + (t * call.rows + start) * width : u.data();
                layer.hidden(n, hoisted, x, v, here);
                layer.outputs(n, here, activated.data(), o.data());
                if (layer.is_partial(t)) {
                    T *wx = whole.data(), *wv = wx + most * dim, f = layer.fraction();
                    layer.template step<false>(n, o.data(), x, v, c, layer.forcing(t), wx, wv);
                    for (int64_t i = 0; i < n * dim; i++) {
                        x_out[i] = x[i] + f * (wx[i] - x[i]);
                        v_out[i] = v[i] + f * (wv[i] - v[i]);
                    }
                } else {
                    layer.template step<false>(n, o.data(), x, v, c, layer.forcing(t), x_out, v_out);
                }
                x = x_out;
                v = v_out;
                if (call.speed) layer.add_losses(n, t, x, v, (T *)call.speed + start, (T *)call.energy + start);
            }
        });
    });
    return !failed;
}

// Sums over tokens of the gradients of rows: bias, mu and one step's forcing.
template <typename T> struct RowSums {
    std::vector<T> bias, mu, forcing;
    explicit RowSums(const Integrator &c) : bias(c.groups * c.dim), mu(c.dim), forcing(c.dim) {}
};

// One thread's sums of the gradients that all tokens share. Those of rows are double: their terms are many and small.
template <typename T> struct Sums {
    std::vector<T> inner, outer;
    std::vector<double> bias, mu, forcing;
    double fraction = 0;

    explicit Sums(const Integrator &c)
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

// One thread's backward pass over its tiles.
template <typename T> struct Back {
    const Layer<T> &layer;
    const Integrator &call;
    int64_t dim, width, iterations, most;
    bool reads_last;
    Sums<T> &sums;
    RowSums<T> of_rows;
    Scratch<T> states, velocities, outputs, slopes, us, activated, grad_u, turned, rest, of_x, of_candidate;

    Back(const Layer<T> &l, Sums<T> &s)
        : layer(l), call(l.call), dim(l.dim), width(l.width), iterations(l.iterations), most(tile_rows(l.call)),
          reads_last(call.fraction || call.power != 0), sums(s), of_rows(l.call),
          states((iterations - !reads_last) * most * dim), velocities((iterations - !reads_last) * most * dim),
          outputs(iterations * most * l.groups * dim), slopes(iterations * most * dim),
          us((iterations - call.kept) * most * width), activated(iterations * most * width), grad_u(most * width),
          turned(width * most), rest(call.fraction ? 2 * most * dim : 0), of_x(dim), of_candidate(dim) {}

    // x_{t+1} and v_{t+1} of the tile.
    T *after(Scratch<T> &kept, int64_t t) { return kept.data() + t * most * dim; }
    T *output(int64_t t) { return outputs.data() + t * most * layer.groups * dim; }
    T *slope(int64_t t) { return slopes.data() + t * most * dim; }
    // u of the tile before its activation, as it was kept or to be computed again.
    T *hidden(int64_t start, int64_t t) {
        if (t < call.kept) return (T *)call.hidden + (t * call.rows + start) * width;
        return us.data() + (t - call.kept) * most * width;
    }

    void tile(int64_t start, int64_t n) {
        const T *x0 = (const T *)call.x + start * dim, *v0 = (const T *)call.v + start * dim;
        const T *c = call.candidate ? (const T *)call.candidate + start * dim : nullptr;
        again(start, n, x0, v0, c);
        T *gx = (T *)call.grad_x + start * dim, *gv = (T *)call.grad_v + start * dim;
        T *g_hoisted = (T *)call.grad_hoisted + start * width;
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
                layer.step_back(t + 1 == iterations, std::min(SUMMED_ROWS, n - i), output(t) + at * layer.groups,
                                slope(t) + at, x + at, v + at, c ? c + at : nullptr, layer.forcing(t), gx + at, gv + at,
                                gc ? gc + at : nullptr, of_rows.bias.data(), of_rows.mu.data(), of_rows.forcing.data(),
                                of_x.data(), of_candidate.data());
                sums.take(of_rows, t);
            }
            through_controller(start, n, t, x, v, gx, gv, g_hoisted);
            if (layer.is_partial(t))
                for (int64_t i = 0; i < n * dim; i++) {
                    gx[i] += rest.data()[i];
                    gv[i] += rest.data()[most * dim + i];
                }
        }
    }

    // The iterations again: the gains, and the states where they are read.
    void again(int64_t start, int64_t n, const T *x, const T *v, const T *c) {
        const T *hoisted = (const T *)call.hoisted + start * width;
        for (int64_t t = 0; t < iterations; t++) {
            T *u = hidden(start, t);
            if (t >= call.kept) layer.hidden(n, hoisted, x, v, u);
            layer.outputs(n, u, activated.data() + t * most * width, output(t));
            layer.gains(n, output(t), slope(t));
            if (t + 1 < iterations || reads_last) {
                T *x_new = after(states, t), *v_new = after(velocities, t);
                layer.template step<true>(n, output(t), x, v, c, layer.forcing(t), x_new, v_new);
                x = x_new;
                v = v_new;
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
        T *x_new = after(states, t), *v_new = after(velocities, t);
        T *rest_x = rest.data(), *rest_v = rest_x + most * dim;
        for (int64_t i = 0; i < n * dim; i++) {  // the mixture into `rest` for now
            rest_x[i] = x[i] + f * (x_new[i] - x[i]);
            rest_v[i] = v[i] + f * (v_new[i] - v[i]);
        }
        if (call.power != 0) layer.losses_back(start, n, t, rest_x, rest_v, gx, gv, of_rows.mu.data());
        double of_fraction = 0;
        for (int64_t i = 0; i < n * dim; i++) {
            of_fraction += double(gx[i]) * (x_new[i] - x[i]) + double(gv[i]) * (v_new[i] - v[i]);
            rest_x[i] = gx[i] * (T(1) - f);
            rest_v[i] = gv[i] * (T(1) - f);
            gx[i] *= f;
            gv[i] *= f;
        }
        sums.fraction += of_fraction;
    }

    // Add what goes through the controller to the gradients of x, v, the hoisted context and the weights.
    void through_controller(int64_t start, int64_t n, int64_t t, const T *x, const T *v, T *gx, T *gv, T *g_hoisted) {
        const int64_t wide = layer.groups * dim;
        const T *o = output(t), *u = hidden(start, t), *a = activated.data() + t * most * width;
        T *gu = grad_u.data(), *g_inner = sums.inner.data();
        transpose(n, width, a, width, turned.data(), most);
        layer.product(width, wide, n, turned.data(), most, o, wide, true, sums.outer.data(), wide);
        layer.product(n, width, wide, o, wide, layer.outer, width, false, gu, width);
        with_activation(call.activation, [&](auto kind) {
#pragma omp simd
            for (int64_t i = 0; i < n * width; i++) gu[i] *= derivative(kind, u[i]);
        });
        if (t + 1 == iterations)
            std::copy(gu, gu + n * width, g_hoisted);
        else
            for (int64_t i = 0; i < n * width; i++) g_hoisted[i] += gu[i];
        transpose(n, width, gu, width, turned.data(), most);
        layer.product(width, dim, n, turned.data(), most, x, dim, true, g_inner, 2 * dim);
        layer.product(n, dim, width, gu, width, layer.inner, 2 * dim, true, gx, dim);
        layer.product(width, dim, n, turned.data(), most, v, dim, true, g_inner + dim, 2 * dim);
        layer.product(n, dim, width, gu, width, layer.inner + dim, 2 * dim, true, gv, dim);
    }
};

template <typename T> bool backward(const Integrator &call) {
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
        }
    }
    if (call.fraction)
        for (const auto &one : sums)
            if (one) *(T *)call.grad_fraction += T(one->fraction);
    return !failed;
}

}  // namespace

extern "C" int64_t size_of_integrator() { return sizeof(Integrator); }

IN_BOTH_PRECISIONS(iterate, forward, Integrator)
IN_BOTH_PRECISIONS(iterate_back, backward, Integrator)
