// One iteration forward and backward on a CPU, the pointwise part between the matrix products: steps.py in one pass.
//
//   v_new = alpha (v - c) + c + beta (mu - x) + forcing        alpha = sigmoid(a) (1 - exp(-kappa rms(x - mu)))
//   x_new = x + stride gate v_new                              beta = min(softplus(b), beta_max), gate = sigmoid(g)
//
// - A row is read once and stays in the first cache; rows are divided over the threads, always in the same way.
// - `outputs` are the controller's: a, b, g and, where G = 4, c.
// - A missing v or c is a row of zeros: the same arithmetic, one instance for all.
// - exp and log1p are polynomials so that the compiler makes vectors of them, within 2 units of the last place; NaN stays
//   NaN. In double precision, which tests use, they are the library's.
// - kappa < 0: no dynamic alpha.  Legend: n rows, D dim, G groups.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <vector>

namespace {

inline float exponential(float z) {
    z = z < -87.0f ? -87.0f : z;  // comparisons that are false for NaN, which passes
    z = z > 88.0f ? 88.0f : z;
    const float n = __builtin_rintf(z * 1.44269504088896341f);
    float r = z - n * 0.693359375f;  // ln 2 in two parts
    r = r + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float power_of_two;
    std::memcpy(&power_of_two, &bits, sizeof bits);
    return p * power_of_two;
}

inline double exponential(double z) { return std::exp(z); }

// log(1 + e) for e in [0, 1]: 2 artanh(s), s = e / (2 + e) <= 1/3, by its series.
inline float log1p_of_unit(float e) {
    const float s = e / (2.0f + e), q = s * s;
    float p = 1.0f / 15;
    p = p * q + 1.0f / 13;
    p = p * q + 1.0f / 11;
    p = p * q + 1.0f / 9;
    p = p * q + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    p = p * q + 1.0f;
    return 2.0f * s * p;
}

inline double log1p_of_unit(double e) { return std::log1p(e); }

template <typename T> struct Rule {
    int64_t rows, dim, groups;
    T stride, kappa, beta_max;
};

// alpha_base, beta, its derivative by b, gate: the gains of one element.
template <typename T> struct Gains {
    T base, beta, slope, gate;
};

template <typename T> inline T sigmoid(T z) { return T(1) / (T(1) + exponential(-z)); }

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

// What both passes read of one row.
template <typename T> struct Row {
    const T *x, *v, *candidate;

    Row(const Rule<T> &rule, int64_t i, const T *outputs, const T *xs, const T *vs, const T *candidates, const T *zeros) {
        const int64_t dim = rule.dim, at = i * dim;
        x = xs + at;
        v = vs ? vs + at : zeros;
        candidate = rule.groups == 4 ? outputs + 4 * at + 3 * dim : candidates ? candidates + at : zeros;
    }
};

// x_new and v_new may be x and v themselves.
template <typename T>
void forward(int threads, Rule<T> rule, const T *outputs, const T *xs, const T *vs, const T *candidates,
             const T *mu, const T *forcing, T *x_new, T *v_new) {
    const int64_t dim = rule.dim;
#pragma omp parallel num_threads(threads)
    {
        const std::vector<T> zeros(dim, T(0));
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rule.rows; i++) {
            const Row<T> row(rule, i, outputs, xs, vs, candidates, zeros.data());
            const T *o = outputs + i * rule.groups * dim;
            T *to_x = x_new + i * dim, *to_v = v_new + i * dim;
            const T m = rule.kappa < 0 ? T(1) : -std::expm1(-rule.kappa * rms(row.x, mu, dim));
#pragma omp simd
            for (int64_t j = 0; j < dim; j++) {
                const Gains<T> s = gains(o[j], o[dim + j], o[2 * dim + j], rule.beta_max);
                const T c = row.candidate[j], x = row.x[j];
                const T v = s.base * m * (row.v[j] - c) + c + forcing[j] + s.beta * (mu[j] - x);
                to_v[j] = v;
                to_x[j] = x + rule.stride * s.gate * v;
            }
        }
    }
}

// `outputs` become their gradient, grad_v that of v, grad_x gains that of x past the controller; grad_candidates (or null)
// and the sums over rows (bias GD, mu D, forcing D) are added to.
template <typename T>
void backward(int threads, Rule<T> rule, T *outputs, const T *xs, const T *vs, const T *candidates,
              const T *mu, const T *forcing, T *grad_x, T *grad_v, T *grad_candidates, T *sum_bias, T *sum_mu,
              T *sum_forcing) {
    const int64_t dim = rule.dim, groups = rule.groups, width = (groups + 2) * dim;
    std::vector<T> sums(threads * width, T(0));
#pragma omp parallel num_threads(threads)
    {
        const std::vector<T> zeros(dim, T(0));
        std::vector<T> of_x(dim), of_candidate(dim);
        T *of_bias = sums.data() + omp_get_thread_num() * width;
        T *of_mu = of_bias + groups * dim, *of_forcing = of_mu + dim;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rule.rows; i++) {
            const Row<T> row(rule, i, outputs, xs, vs, candidates, zeros.data());
            T *o = outputs + i * groups * dim, *gx = grad_x + i * dim, *gv = grad_v + i * dim;
            T *gc = groups == 4 ? o + 3 * dim : of_candidate.data(), *px = of_x.data();
            const T size = rms(row.x, mu, dim), m = rule.kappa < 0 ? T(1) : -std::expm1(-rule.kappa * size);
            T total = 0;  // what reaches m, times m's own factor
#pragma omp simd reduction(+ : total)
            for (int64_t j = 0; j < dim; j++) {
                const Gains<T> s = gains(o[j], o[dim + j], o[2 * dim + j], rule.beta_max);
                const T c = row.candidate[j], away = mu[j] - row.x[j], lead = row.v[j] - c;
                const T v = s.base * m * lead + c + forcing[j] + s.beta * away;
                const T gw = gv[j] + rule.stride * s.gate * gx[j];  // the gradient of v_new, all told
                const T of_alpha = gw * lead * s.base, carried = gw * s.base * m;
                const T of_a = of_alpha * m * (T(1) - s.base), of_b = gw * away * s.slope;
                const T of_g = rule.stride * gx[j] * v * s.gate * (T(1) - s.gate);
                total += of_alpha;
                o[j] = of_a;
                o[dim + j] = of_b;
                o[2 * dim + j] = of_g;
                gv[j] = carried;
                gc[j] = gw - carried;
                px[j] = -gw * s.beta;
                of_bias[j] += of_a;
                of_bias[dim + j] += of_b;
                of_bias[2 * dim + j] += of_g;
                of_forcing[j] += gw;
            }
            // The gradient of rms at zero is zero. A size that is NaN is not zero and must be seen.
            const T pull = rule.kappa < 0 || size == 0 ? T(0) : total * (T(1) - m) * rule.kappa / (dim * size);
#pragma omp simd
            for (int64_t j = 0; j < dim; j++) {
                const T p = px[j] - (mu[j] - row.x[j]) * pull;
                gx[j] += p;
                of_mu[j] -= p;
            }
            T *add_to = groups == 4 ? of_bias + 3 * dim : grad_candidates ? grad_candidates + i * dim : nullptr;
            if (add_to)
#pragma omp simd
                for (int64_t j = 0; j < dim; j++) add_to[j] += gc[j];
        }
    }
    for (int64_t j = 0; j < width; j++) {
        T sum = 0;
        for (int t = 0; t < threads; t++) sum += sums[t * width + j];
        (j < groups * dim ? sum_bias[j] : j < (groups + 1) * dim ? sum_mu[j - groups * dim]
                                                                 : sum_forcing[j - (groups + 1) * dim]) += sum;
    }
}

}  // namespace

// Numbers come as doubles and are rounded here, as a Python number is by an operation on a float tensor.
#define INSTANCE(T, NAME)                                                                                              \
    extern "C" void forward_##NAME(int threads, int64_t rows, int64_t dim, int64_t groups, double stride, double kappa, \
                                   double beta_max, const T *outputs, const T *x, const T *v, const T *candidate,      \
                                   const T *mu, const T *forcing, T *x_new, T *v_new) {                                \
        forward<T>(threads, {rows, dim, groups, T(stride), T(kappa), T(beta_max)}, outputs, x, v, candidate, mu,       \
                   forcing, x_new, v_new);                                                                             \
    }                                                                                                                  \
    extern "C" void backward_##NAME(int threads, int64_t rows, int64_t dim, int64_t groups, double stride,             \
                                    double kappa, double beta_max, T *outputs, const T *x, const T *v,                 \
                                    const T *candidate, const T *mu, const T *forcing, T *grad_x, T *grad_v,           \
                                    T *grad_candidate, T *sum_bias, T *sum_mu, T *sum_forcing) {                       \
        backward<T>(threads, {rows, dim, groups, T(stride), T(kappa), T(beta_max)}, outputs, x, v, candidate, mu,      \
                    forcing, grad_x, grad_v, grad_candidate, sum_bias, sum_mu, sum_forcing);                           \
    }

INSTANCE(float, float32)
INSTANCE(double, float64)
