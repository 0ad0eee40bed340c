"""How long the dynamics remember and how fast they turn: periods and half-lives, value by value.

    excitation      sin(gamma t + phi) has the period 2 pi / |gamma|
    alpha alone     a velocity that only decays, v' = alpha v, is halved after ln(1/2) / ln |alpha| steps
    frozen step     J = [[1 - s beta, s alpha], [-beta, alpha]] (stability.py) has eigenvalues r e^(+-i w): the
                    distance from rest is halved after ln(1/2) / ln r steps, r the larger one's where both are real,
                    and turns once in 2 pi / w

- A step is an iteration of an integrator, or a step of a stream, whose gate and s are 1.
- NaN stands where there is no such figure: what does not decay has no half-life, what does not turn no period.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Modes(NamedTuple):
    """Of every frozen step: half-life and period, in steps."""

    half_life: Tensor
    period: Tensor


def period(gamma: Tensor) -> Tensor:
    """2 pi / |gamma|, in float64."""
    return 2 * math.pi / gamma.double().abs()


def half_life(factor: Tensor) -> Tensor:
    """ln(1/2) / ln |factor|, in float64; 0 for the factor 0, NaN where it does not make smaller."""
    size = factor.double().abs()
    return torch.where(size < 1, math.log(0.5) / size.log(), math.nan)


def frozen_modes(alpha: Tensor, beta: Tensor, stride: Tensor | float = 1.0) -> Modes:
    """The modes of frozen steps; `stride` is s = dt velocity_scale gate. All of one shape, or broadcast to it."""
    a = alpha.double()
    trace = 1 + a - stride * beta.double()
    discriminant = trace.square() - 4 * a
    turns = discriminant < 0
    root = discriminant.abs().sqrt()
    radius = torch.where(turns, a.abs().sqrt(), (trace.abs() + root) / 2)
    return Modes(half_life(radius), torch.where(turns, 2 * math.pi / torch.atan2(root, trace), math.nan))
