"""The T iterations on a GPU: one program for a tile of tokens, all iterations inside, forward and backward.

- A tile's states stay in the caches: the only large tensors that cross memory are the inputs and the results. Any D and
  C: the program walks over D in blocks, because a controller's unit and the rms need all of a token's dimensions.
- Sums over tokens (of mu's, the forcing's and the bias's gradients) are made by tile and added up outside: no atomic
  operation makes a run irreproducible.
- Products in the precision of the weights, everything else and all sums in float32.
- `TRITON_INTERPRET=1` runs the same kernels on a CPU; tests/model/test_triton.py does.
- Legend: N tokens, D d_model, C controller width, G output groups, T iterations, P programs.
"""

# A kernel is called with a grid and launch options that its signature does not have.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def _activate(u, KIND: tl.constexpr):
    if KIND == 0:
        return tl.maximum(u, 0.0)
    if KIND == 1:
        return u * tl.sigmoid(u)
    return 2.0 * tl.sigmoid(2.0 * u) - 1.0


@triton.jit
def _slope(u, KIND: tl.constexpr):
    if KIND == 0:
        return tl.where(u > 0.0, 1.0, 0.0)
    if KIND == 1:
        s = tl.sigmoid(u)
        return s * (1.0 + u * (1.0 - s))
    y = 2.0 * tl.sigmoid(2.0 * u) - 1.0
    return 1.0 - y * y


@triton.jit
def _distance(size, kappa):
    """1 - exp(-kappa size), by its series where the difference would cancel."""
    y = kappa * size
    return tl.where(y < 0.01, y * (1.0 - y * (0.5 - y / 6.0)), 1.0 - tl.exp(-y))


@triton.jit
def _softplus(b):
    """log(1 + e^b); for small e^b by its series, where 1 + e^b rounds."""
    small = tl.exp(-tl.abs(b))
    tail = tl.where(
        small < 0.01, small * (1.0 - small * (0.5 - small * (1.0 / 3.0 - small / 4.0))), tl.log(1.0 + small)
    )
    return tl.maximum(b, 0.0) + tail


@triton.jit
def _hidden(
    x_at, v_at, hoisted_at, inner_at, mu_at, rows, units, N,
    D: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """u before its activation (BLOCK_N, BLOCK_C) and rms(x - mu) (BLOCK_N) of one tile."""
    real, used = rows < N, units < C
    u = tl.load(hoisted_at + rows[:, None] * C + units[None, :], mask=real[:, None] & used[None, :], other=0.0)
    u = u.to(tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        inside = dims < D
        place, mask = rows[:, None].to(tl.int64) * D + dims[None, :], real[:, None] & inside[None, :]
        x = tl.load(x_at + place, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_at + place, mask=mask, other=0.0).to(tl.float32)
        mu = tl.load(mu_at + dims, mask=inside, other=0.0).to(tl.float32)
        weights = inner_at + units[None, :] * (2 * D) + dims[:, None]
        both = inside[:, None] & used[None, :]
        of_x, of_v = tl.load(weights, mask=both, other=0.0), tl.load(weights + D, mask=both, other=0.0)
        u = tl.dot(x.to(of_x.dtype), of_x, u, input_precision=PRECISION)
        u = tl.dot(v.to(of_v.dtype), of_v, u, input_precision=PRECISION)
        error = tl.where(mask, x - mu[None, :], 0.0)
        squares += tl.sum(error * error, axis=1)
    return u, tl.sqrt(squares / D)


@triton.jit
def _group(
    activated, outer_at, bias_at, group, dims, inside, units, used,
    D: tl.constexpr, C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One group of the controller's outputs, (BLOCK_N, BLOCK_D), and its weights (BLOCK_C, BLOCK_D)."""
    weight_at = outer_at + (group * D + dims[None, :]) * C + units[:, None]
    weight = tl.load(weight_at, mask=used[:, None] & inside[None, :], other=0.0)
    bias = tl.load(bias_at + group * D + dims, mask=inside, other=0.0).to(tl.float32)
    return tl.dot(activated.to(weight.dtype), weight, input_precision=PRECISION) + bias[None, :], weight


@triton.jit
def _gains(
    activated, m, outer_at, bias_at, dims, inside, units, used, beta_max,
    D: tl.constexpr, C: tl.constexpr, DYNAMIC: tl.constexpr, BOUNDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """alpha_base, alpha, b, beta, gate of one block of dimensions."""
    a, _ = _group(activated, outer_at, bias_at, 0, dims, inside, units, used, D, C, PRECISION)
    b, _ = _group(activated, outer_at, bias_at, 1, dims, inside, units, used, D, C, PRECISION)
    g, _ = _group(activated, outer_at, bias_at, 2, dims, inside, units, used, D, C, PRECISION)
    base = tl.sigmoid(a)
    alpha = base * m[:, None] if DYNAMIC else base
    beta = _softplus(b)
    beta = tl.minimum(beta, beta_max) if BOUNDED else beta
    return base, alpha, b, beta, tl.sigmoid(g)


@triton.jit
def _advance(
    x_at, v_at, x_to, v_to, candidate_at, outer_at, bias_at, mu_at, forcing_at, u, size, rows, units, N,
    stride, kappa, beta_max,
    D: tl.constexpr, C: tl.constexpr, BLOCK_D: tl.constexpr, CANDIDATE: tl.constexpr,
    DYNAMIC: tl.constexpr, BOUNDED: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One iteration of a tile from u and rms(x - mu), block by block of dimensions."""
    real, used = rows < N, units < C
    activated, m = _activate(u, KIND), _distance(size, kappa)
    for start in range(0, D, BLOCK_D):
        dims = start + tl.arange(0, BLOCK_D)
        inside = dims < D
        place, mask = rows[:, None].to(tl.int64) * D + dims[None, :], real[:, None] & inside[None, :]
        _, alpha, _, beta, gate = _gains(
            activated, m, outer_at, bias_at, dims, inside, units, used, beta_max, D, C, DYNAMIC, BOUNDED, PRECISION
        )
        x = tl.load(x_at + place, mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_at + place, mask=mask, other=0.0).to(tl.float32)
        mu = tl.load(mu_at + dims, mask=inside, other=0.0).to(tl.float32)
        forcing = tl.load(forcing_at + dims, mask=inside, other=0.0).to(tl.float32)
        v_new = alpha * v - beta * (x - mu[None, :]) + forcing[None, :]
        if CANDIDATE == 1:
            v_new += (1.0 - alpha) * tl.load(candidate_at + place, mask=mask, other=0.0).to(tl.float32)
        if CANDIDATE == 2:
            c, _ = _group(activated, outer_at, bias_at, 3, dims, inside, units, used, D, C, PRECISION)
            v_new += (1.0 - alpha) * c
        tl.store(x_to + place, x + stride * gate * v_new, mask=mask)
        tl.store(v_to + place, v_new, mask=mask)


@triton.jit(do_not_specialize=["N"])  # N = 1 would become a Python number
def forward(
    x_at, v_at, hoisted_at, candidate_at, inner_at, outer_at, bias_at, mu_at, forcing_at, N,
    stride, kappa, beta_max, T,
    D: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    CANDIDATE: tl.constexpr, DYNAMIC: tl.constexpr, BOUNDED: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """x and v (N, D) move T iterations on, in place."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.arange(0, BLOCK_C)
    for t in range(T):
        u, size = _hidden(
            x_at, v_at, hoisted_at, inner_at, mu_at, rows, units, N, D, C, BLOCK_N, BLOCK_D, BLOCK_C, PRECISION
        )
        tl.debug_barrier()  # other threads' stores come before this tile's next loads
        _advance(
            x_at, v_at, x_at, v_at, candidate_at, outer_at, bias_at, mu_at, forcing_at + t * D, u, size, rows, units,
            N, stride, kappa, beta_max, D, C, BLOCK_D, CANDIDATE, DYNAMIC, BOUNDED, KIND, PRECISION,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=["N"])
def backward(  # noqa: C901 - a kernel's branches are constants of its compilation
    xs_at, vs_at, hoisted_at, candidate_at, inner_at, outer_at, bias_at, mu_at, forcing_at,
    grad_x_at, grad_v_at, grad_candidate_at, hidden_at, grad_hidden_at, outputs_at,
    mu_sums_at, forcing_sums_at, bias_sums_at, N,
    stride, kappa, beta_max, T,
    D: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    CANDIDATE: tl.constexpr, DYNAMIC: tl.constexpr, BOUNDED: tl.constexpr, KIND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """From the gradients of x_T, v_T to those of x_0, v_0, in place; what the weights' gradients need goes to scratch.

    xs, vs (T, N, D) hold x_0, v_0 in their first row. hidden, grad_hidden (T, N, C) and outputs (T, N, GD) are left for
    the products; the sums (P, D), (P, T, D), (P, GD) start at zero.
    """
    program = tl.program_id(0)
    rows = program * BLOCK_N + tl.arange(0, BLOCK_N)
    units = tl.arange(0, BLOCK_C)
    real, used = rows < N, units < C
    tile = rows[:, None].to(tl.int64) * C + units[None, :]
    tile_mask = real[:, None] & used[None, :]
    step = N.to(tl.int64) * D
    for t in range(T):
        x_at, v_at = xs_at + t * step, vs_at + t * step
        u, size = _hidden(
            x_at, v_at, hoisted_at, inner_at, mu_at, rows, units, N, D, C, BLOCK_N, BLOCK_D, BLOCK_C, PRECISION
        )
        tl.store(hidden_at + t * N.to(tl.int64) * C + tile, u, mask=tile_mask)
        if t + 1 < T:
            _advance(
                x_at, v_at, x_at + step, v_at + step, candidate_at, outer_at, bias_at, mu_at, forcing_at + t * D, u,
                size, rows, units, N, stride, kappa, beta_max,
                D, C, BLOCK_D, CANDIDATE, DYNAMIC, BOUNDED, KIND, PRECISION,
            )  # fmt: skip
        tl.debug_barrier()
    for back in range(T):
        t = T - 1 - back
        u = tl.load(hidden_at + t * N.to(tl.int64) * C + tile, mask=tile_mask, other=0.0)
        activated = _activate(u, KIND)
        size = tl.zeros((BLOCK_N,), tl.float32)
        if DYNAMIC:
            for start in range(0, D, BLOCK_D):
                dims = start + tl.arange(0, BLOCK_D)
                inside = dims < D
                mask = real[:, None] & inside[None, :]
                x = tl.load(xs_at + t * step + rows[:, None].to(tl.int64) * D + dims[None, :], mask=mask, other=0.0)
                mu = tl.load(mu_at + dims, mask=inside, other=0.0).to(tl.float32)
                error = tl.where(mask, x - mu[None, :], 0.0)
                size += tl.sum(error * error, axis=1)
            size = tl.sqrt(size / D)
        m = _distance(size, kappa)
        grad_u = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        of_m = tl.zeros((BLOCK_N,), tl.float32)
        for start in range(0, D, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            inside = dims < D
            place, mask = rows[:, None].to(tl.int64) * D + dims[None, :], real[:, None] & inside[None, :]
            base, alpha, b, beta, gate = _gains(
                activated, m, outer_at, bias_at, dims, inside, units, used, beta_max, D, C, DYNAMIC, BOUNDED, PRECISION
            )
            x = tl.load(xs_at + t * step + place, mask=mask, other=0.0)
            v = tl.load(vs_at + t * step + place, mask=mask, other=0.0)
            mu = tl.load(mu_at + dims, mask=inside, other=0.0).to(tl.float32)
            forcing = tl.load(forcing_at + t * D + dims, mask=inside, other=0.0).to(tl.float32)
            error = tl.where(mask, x - mu[None, :], 0.0)
            v_new = alpha * v - beta * error + forcing[None, :]
            apart = v
            if CANDIDATE == 1:
                candidate = tl.load(candidate_at + place, mask=mask, other=0.0).to(tl.float32)
                v_new += (1.0 - alpha) * candidate
                apart = v - candidate
            if CANDIDATE == 2:
                candidate, _ = _group(activated, outer_at, bias_at, 3, dims, inside, units, used, D, C, PRECISION)
                v_new += (1.0 - alpha) * candidate
                apart = v - candidate
            grad_x = tl.load(grad_x_at + place, mask=mask, other=0.0)
            grad_v = tl.load(grad_v_at + place, mask=mask, other=0.0) + stride * gate * grad_x
            of_base = grad_v * apart * base
            of_m += tl.sum(of_base, axis=1)
            of_a = of_base * (1.0 - base)
            if DYNAMIC:
                of_a = of_a * m[:, None]
            of_b = -grad_v * error * tl.sigmoid(b)
            if BOUNDED:
                of_b = tl.where(beta < beta_max, of_b, 0.0)
            of_g = stride * grad_x * v_new * gate * (1.0 - gate)
            for group in tl.static_range(G):
                part = of_a
                if group == 1:
                    part = of_b
                if group == 2:
                    part = of_g
                if group == 3:
                    part = grad_v * (1.0 - alpha)
                weight_at = outer_at + (group * D + dims[:, None]) * C + units[None, :]
                weight = tl.load(weight_at, mask=inside[:, None] & used[None, :], other=0.0)
                grad_u = tl.dot(part.to(weight.dtype), weight, grad_u, input_precision=PRECISION)
                to = outputs_at + t * step * G + rows[:, None].to(tl.int64) * (G * D) + group * D + dims[None, :]
                tl.store(to, part.to(weight.dtype), mask=mask)
                sums = bias_sums_at + program * (G * D) + group * D + dims
                tl.store(sums, tl.load(sums, mask=inside) + tl.sum(part, axis=0), mask=inside)
            tl.store(forcing_sums_at + (program * T + t) * D + dims, tl.sum(grad_v, axis=0), mask=inside)
            sums = mu_sums_at + program * D + dims
            tl.store(sums, tl.load(sums, mask=inside) + tl.sum(grad_v * beta, axis=0), mask=inside)
            if CANDIDATE == 1:
                to = grad_candidate_at + place
                tl.store(to, tl.load(to, mask=mask, other=0.0) + grad_v * (1.0 - alpha), mask=mask)
            tl.store(grad_x_at + place, grad_x - grad_v * beta, mask=mask)
            tl.store(grad_v_at + place, grad_v * alpha, mask=mask)
        grad_u = grad_u * _slope(u, KIND)
        tl.debug_barrier()
        pull = tl.where(size > 0.0, of_m * kappa * (1.0 - m) / (D * tl.where(size > 0.0, size, 1.0)), 0.0)
        tl.store(grad_hidden_at + t * N.to(tl.int64) * C + tile, grad_u, mask=tile_mask)
        for start in range(0, D, BLOCK_D):
            dims = start + tl.arange(0, BLOCK_D)
            inside = dims < D
            place, mask = rows[:, None].to(tl.int64) * D + dims[None, :], real[:, None] & inside[None, :]
            weights = inner_at + units[:, None] * (2 * D) + dims[None, :]
            both = used[:, None] & inside[None, :]
            of_x, of_v = tl.load(weights, mask=both, other=0.0), tl.load(weights + D, mask=both, other=0.0)
            grad_x = tl.load(grad_x_at + place, mask=mask, other=0.0)
            grad_v = tl.load(grad_v_at + place, mask=mask, other=0.0)
            if DYNAMIC:
                x = tl.load(xs_at + t * step + place, mask=mask, other=0.0)
                mu = tl.load(mu_at + dims, mask=inside, other=0.0).to(tl.float32)
                pulled = tl.where(mask, pull[:, None] * (x - mu[None, :]), 0.0)
                grad_x += pulled
                sums = mu_sums_at + program * D + dims
                tl.store(sums, tl.load(sums, mask=inside) - tl.sum(pulled, axis=0), mask=inside)
            grad_x = tl.dot(grad_u.to(of_x.dtype), of_x, grad_x, input_precision=PRECISION)
            grad_v = tl.dot(grad_u.to(of_v.dtype), of_v, grad_v, input_precision=PRECISION)
            tl.store(grad_x_at + place, grad_x, mask=mask)
            tl.store(grad_v_at + place, grad_v, mask=mask)
        tl.debug_barrier()
