"""Laws of a frozen step, one dimension at a time: where its state rests, whether it gets there, and how.

    J = [[1 - s beta, s alpha], [-beta, alpha]]    s = dt velocity_scale gate
    det J = alpha    trace J = 1 + alpha - s beta

- Stable iff alpha < 1 and 0 < s beta < 2 (1 + alpha). Complex eigenvalues (a rotation) iff (1 - sqrt(alpha))^2 <
  s beta < (1 + sqrt(alpha))^2; real and positive below, real and negative above (the state jumps from side to side).
- At rest v = 0, so 0 = (1 - alpha) v_cand - beta (x - mu), the excitation being off.
- Source: docs/model.md, "Stability of a frozen step". Frozen means that alpha, beta, gate and v_cand keep one step's
  values, where the real controller computes them anew from (x, v).
"""

from typing import NamedTuple

import torch
from torch import Tensor

BETA_FLOOR = 1e-3
"""Below it the pull towards mu takes more than about 1,000 iterations: the fixed point is computed with this beta."""

KINDS = ("steady", "oscillatory", "alternating", "unstable")
"""What a frozen step does in one dimension, see Stability."""


def fixed_point(mu: Tensor, alpha: Tensor, beta: Tensor, candidate: Tensor | None) -> Tensor:
    """x* = mu + (1 - alpha) v_cand / max(beta, BETA_FLOOR), the shape of alpha."""
    push = torch.zeros_like(alpha) if candidate is None else (1 - alpha) * candidate
    return mu + push / beta.clamp(min=BETA_FLOOR)


class Stability(NamedTuple):
    """Of every dimension: the spectral radius of J, and which of four kinds it is (boolean, one of them true)."""

    radius: Tensor
    steady: Tensor
    """Stable, real and not negative eigenvalues: it approaches from one side."""
    oscillatory: Tensor
    """Stable, complex eigenvalues: a damped rotation."""
    alternating: Tensor
    """Stable, a real negative eigenvalue: it jumps from side to side."""
    unstable: Tensor


def frozen_stability(alpha: Tensor, beta: Tensor, gate: Tensor, stride: float) -> Stability:
    """The laws for alpha, beta, gate of one shape; `stride` is dt velocity_scale."""
    pull = stride * gate * beta
    trace, root = 1 + alpha - pull, alpha.sqrt()
    discriminant = trace.square() - 4 * alpha
    real = (trace.abs() + discriminant.clamp(min=0).sqrt()) / 2
    stable = (alpha < 1) & (pull > 0) & (pull < 2 * (1 + alpha))
    complex_pair = (pull > (1 - root).square()) & (pull < (1 + root).square())
    above = pull >= (1 + root).square()
    return Stability(
        radius=torch.where(complex_pair, root, real),
        steady=stable & ~complex_pair & ~above,
        oscillatory=stable & complex_pair,
        alternating=stable & above & ~complex_pair,
        unstable=~stable,
    )
