"""One iteration forward and backward, by hand: the pointwise part, between the matrix products.

    s       = sigmoid of (a, b, g)                  beta = -log(1 - sigmoid(b)), which is softplus(b)
    away    = mu - x                                m = 1 - exp(-kappa rms(away))       alpha = alpha_base m
    v_new   = alpha v + (1 - alpha) c + beta away + forcing
    x_new   = x + stride gate v_new

- In eager mode every operation here is a pass over memory, so they are few and in place, and the caller hands over
  rows that fit the cache. The backward pass needs sigmoid(b) anyway, which makes this form of beta the cheaper one.
- The negative of beta is kept, and mu - x in the error's place: no pass is spent on a sign.
- Legend: n rows, D d_model, G output groups.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inl_core.model.backends.rule import Rule

_EXACT_BELOW = 4.0
"""Up to this beta, -log(1 - sigmoid(b)) is softplus(b) to float32's precision; beyond it 1 - sigmoid(b) cancels."""


class Tape(NamedTuple):
    """What the backward pass of one iteration reads; (n, D) but for `gains` (n, GD), `m` and `size` (n, 1)."""

    gains: Tensor
    """sigmoid(a), sigmoid(b), sigmoid(g), and c as it came where there are four groups."""
    alpha: Tensor
    negative_beta: Tensor
    away: Tensor
    """mu - x"""
    m: Tensor | None
    size: Tensor | None
    """rms(away)"""
    candidate: Tensor | None
    v: Tensor | None
    v_new: Tensor


class StepGradients(NamedTuple):
    """Gradients of one iteration: of the controller's output (n, GD), and what reaches x and v past the controller."""

    outputs: Tensor
    x: Tensor
    """to be added to the gradient of x_new, (n, D)"""
    v: Tensor
    forcing: Tensor
    """(D,)"""
    mu: Tensor
    """(D,)"""


def forward(
    rule: Rule, outputs: Tensor, x: Tensor, v: Tensor | None, candidate: Tensor | None, mu: Tensor, forcing: Tensor
) -> tuple[Tensor, Tape]:
    """x_new and the tape of one iteration; `outputs` (n, GD), the controller's, is overwritten."""
    dim = x.shape[-1]
    away = mu - x
    negative_beta = None if _cancels(rule) else torch.empty_like(x)
    if negative_beta is None:
        negative_beta = F.softplus(outputs[:, dim : 2 * dim]).neg_()
        outputs[:, : 3 * dim].sigmoid_()
    else:
        outputs[:, : 3 * dim].sigmoid_()
        torch.neg(outputs[:, dim : 2 * dim], out=negative_beta).log1p_()
    if rule.beta_max is not None:
        negative_beta.clamp_(min=-rule.beta_max)
    base, gate = outputs[:, :dim], outputs[:, 2 * dim : 3 * dim]
    candidate = outputs[:, 3 * dim :] if outputs.shape[1] == 4 * dim else candidate
    m = size = None
    alpha = base
    if rule.kappa is not None:
        size = torch.linalg.vector_norm(away, dim=-1, keepdim=True).mul_(1 / math.sqrt(dim))
        m = torch.mul(size, -rule.kappa).expm1_().neg_()
        alpha = base * m
    if candidate is None:
        v_new = forcing.expand_as(x).clone() if v is None else torch.addcmul(forcing, alpha, v)
    elif v is None:
        v_new = torch.addcmul(candidate, alpha, candidate, value=-1.0).add_(forcing)
    else:
        v_new = torch.lerp(candidate, v, alpha).add_(forcing)
    v_new.addcmul_(negative_beta, away, value=-1.0)
    tape = Tape(outputs, alpha, negative_beta, away, m, size, candidate, v, v_new)
    return torch.addcmul(x, gate, v_new, value=rule.stride), tape


def backward(
    rule: Rule, tape: Tape, grad_x: Tensor, grad_v: Tensor | None, grad_candidate: Tensor | None
) -> StepGradients:
    """Gradients of one iteration from those of x_new and v_new; the tape and `grad_v` are overwritten.

    Args:
        grad_candidate: where the gradient of a given v_cand is accumulated.
    """
    dim = tape.away.shape[-1]
    base, slope, gate = (tape.gains[:, i * dim : (i + 1) * dim] for i in range(3))
    outputs = torch.empty_like(tape.gains)
    of_alpha, of_beta, of_gate = (outputs[:, i * dim : (i + 1) * dim] for i in range(3))
    if grad_v is None:
        grad_v = torch.mul(grad_x, gate).mul_(rule.stride)
    else:
        grad_v.addcmul_(grad_x, gate, value=rule.stride)

    torch.mul(grad_x, tape.v_new, out=of_gate)
    torch.ops.aten.sigmoid_backward.grad_input(of_gate, gate, grad_input=of_gate)
    if rule.stride != 1.0:
        of_gate.mul_(rule.stride)
    torch.mul(grad_v, tape.away, out=of_beta).mul_(slope)
    if rule.beta_max is not None:
        torch.ops.aten.threshold_backward.grad_input(of_beta, tape.negative_beta, -rule.beta_max, grad_input=of_beta)
    pull = _alpha_gradient(rule, tape, base, grad_v, of_alpha)

    carried = grad_v * tape.alpha
    if tape.candidate is not None:
        if outputs.shape[1] == 4 * dim:
            torch.sub(grad_v, carried, out=outputs[:, 3 * dim :])
        elif grad_candidate is not None:
            grad_candidate.add_(grad_v).sub_(carried)
    of_forcing = grad_v.sum(0)
    of_x = grad_v.mul_(tape.negative_beta)
    if pull is not None:
        of_x.addcmul_(tape.away, pull, value=-1.0)
    return StepGradients(outputs, of_x, carried, of_forcing, of_x.sum(0).neg_())


def _cancels(rule: Rule) -> bool:
    return rule.beta_max is None or rule.beta_max > _EXACT_BELOW


def _alpha_gradient(rule: Rule, tape: Tape, base: Tensor, grad_v: Tensor, out: Tensor) -> Tensor | None:
    """The gradient of a into `out`; with the dynamic alpha, what times x - mu reaches x through rms, (n, 1)."""
    if tape.candidate is None:
        if tape.v is None:
            out.zero_()
            return None
        torch.mul(grad_v, tape.v, out=out)
    elif tape.v is None:
        torch.mul(grad_v, tape.candidate, out=out).neg_()
    else:
        torch.sub(tape.v, tape.candidate, out=out).mul_(grad_v)
    out.mul_(base)
    pull = None
    if tape.m is not None and tape.size is not None and rule.kappa is not None:
        total = out.sum(-1, keepdim=True)
        pull = total.mul_(1 - tape.m).mul_(rule.kappa / out.shape[-1]).div_(tape.size)
        pull.masked_fill_(tape.size == 0, 0.0)  # the gradient of rms at zero is zero
        out.mul_(tape.m)
    torch.addcmul(out, out, base, value=-1.0, out=out)
    return pull
