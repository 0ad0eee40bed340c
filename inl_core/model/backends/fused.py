"""The T iterations with a hand-written backward pass that computes them again: what is kept does not depend on T.

- Kept: x_0, v_0, the context's projection, v_cand, the weights, and u of the first two iterations, which is small (C of
  D) and spares the backward pass its larger matrix product. No step's gains, states or velocities.
- Both passes go over the tokens a few rows at a time, all T iterations for each, so that every intermediate stays in
  the processor's cache and the largest buffer of the backward pass is a few rows high, whatever B and S.
- Under autocast the matrix products take its precision, everything else the state's, as in the plain path.
- Legend: N tokens, n rows of a chunk, D d_model, C controller width, T iterations.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inl_core.model.backends import steps
from inl_core.model.backends.rule import ACTIVATIONS, Inputs, Result, Rule, speed_weights
from inl_core.model.by_rows import add_product, matrix_dtype, row_chunks
from inl_core.model.derivatives import OwnOperation

_CHUNK_BYTES = 1024 * 1024
"""Of one (n, D) tensor on a CPU; some ten of them are in use at a time."""
KEPT_ITERATIONS = 2


class Weights(NamedTuple):
    """The two matrices and the bias in the products' precision."""

    inner_x: Tensor
    inner_v: Tensor
    outer: Tensor
    bias: Tensor


def run(rule: Rule, inputs: Inputs) -> Result:
    """T iterations on N tokens, all tensors flat."""
    return Result(*Recomputed.apply(rule, matrix_dtype(inputs.x), *inputs))


def chunks(x: Tensor) -> Iterator[slice]:
    """Rows of x (N, D) that are worked on together."""
    return row_chunks(x, x.shape[1], _CHUNK_BYTES)


def _rows(tensor: Tensor | None, where: slice, dtype: torch.dtype | None = None) -> Tensor | None:
    if tensor is None:
        return None
    return tensor[where] if dtype is None else tensor[where].to(dtype)


def _weights(inputs: Inputs, dtype: torch.dtype) -> Weights:
    inner = inputs.inner.to(dtype)
    dim = inputs.x.shape[1]
    return Weights(inner[:, :dim], inner[:, dim:], inputs.outer.to(dtype), inputs.bias.to(dtype))


def _hidden(weights: Weights, hoisted: Tensor, x: Tensor, v: Tensor | None) -> Tensor:
    """u before its activation, (n, C)."""
    dtype = weights.outer.dtype
    u = torch.addmm(hoisted.to(dtype), x.to(dtype), weights.inner_x.T)
    return u if v is None else u.addmm_(v.to(dtype), weights.inner_v.T)


def _outputs(rule: Rule, weights: Weights, u: Tensor, dtype: torch.dtype) -> Tensor:
    activated = ACTIVATIONS[rule.activation][0](u)
    return torch.addmm(weights.bias, activated, weights.outer.T).to(dtype)


class Recomputed(OwnOperation):
    """(rule, dtype of the matrix products, *Inputs) -> Result."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, dtype: torch.dtype, *tensors: Any) -> tuple[Tensor | None, ...]:
        """Run the iterations; see the module for what is kept."""
        inputs = Inputs(*tensors)
        ctx.set_materialize_grads(False)
        ctx.rule, ctx.dtype = rule, dtype
        with torch.autocast(inputs.x.device.type, enabled=False):
            result, kept = _run(rule, inputs, dtype, keep=any(ctx.needs_input_grad))
        # mu's moving average may move it in place before the backward pass, which needs the mu of this pass.
        ctx.save_for_backward(*inputs._replace(mu=inputs.mu.clone()), *kept)
        return tuple(result)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of every input, or None where none is asked for."""
        saved = ctx.saved_tensors
        inputs, kept = Inputs(*saved[: len(Inputs._fields)]), saved[len(Inputs._fields) :]
        with torch.autocast(inputs.x.device.type, enabled=False):
            found = _Backward(ctx.rule, inputs, ctx.dtype, Result(*grads)).run(kept)  # type: ignore[arg-type]
        return None, None, *found


def _run(rule: Rule, inputs: Inputs, dtype: torch.dtype, *, keep: bool) -> tuple[Result, list[Tensor]]:
    x_out, v_out = torch.empty_like(inputs.x), torch.empty_like(inputs.x)
    terms = [inputs.x.new_zeros(inputs.x.shape[0]) for _ in range(2)] if rule.energy_power is not None else None
    weights = _weights(inputs, dtype)
    num_kept = min(KEPT_ITERATIONS, rule.num_iterations) if keep else 0
    kept = [inputs.hoisted.new_empty(inputs.hoisted.shape, dtype=dtype) for _ in range(num_kept)]
    for where in chunks(inputs.x):
        x, v = inputs.x[where], _rows(inputs.v, where)
        candidate = _rows(inputs.candidate, where, x.dtype)
        for t in range(rule.num_iterations):
            u = _hidden(weights, inputs.hoisted[where], x, v)
            if t < num_kept:
                kept[t][where] = u
            outputs = _outputs(rule, weights, u, x.dtype)
            x_new, tape = steps.forward(rule, outputs, x, v, candidate, inputs.mu, inputs.forcing[t])
            x, v = _last(rule, inputs.last_fraction, t, x, v, x_new, tape.v_new)
            if terms is not None:
                _add_losses(rule, t, x - inputs.mu, v, terms[0][where], terms[1][where])
        assert v is not None
        x_out[where], v_out[where] = x, v
    return Result(x_out, v_out, *(terms or (None, None))), kept


def _last(
    rule: Rule, fraction: Tensor | None, t: int, x: Tensor, v: Tensor | None, x_new: Tensor, v_new: Tensor
) -> tuple[Tensor, Tensor]:
    """The last step by its fraction; every other as it is."""
    if fraction is None or t + 1 < rule.num_iterations:
        return x_new, v_new
    fraction = fraction.to(x.dtype)
    return torch.lerp(x, x_new, fraction), v_new * fraction if v is None else torch.lerp(v, v_new, fraction)


def _add_losses(rule: Rule, t: int, error: Tensor, v: Tensor, speed: Tensor, energy: Tensor) -> None:
    assert rule.energy_power is not None
    weights = speed_weights(rule.num_iterations)
    speed.add_(error.abs_().mean(-1), alpha=weights[t])
    size = v.square() if rule.energy_power == 2.0 else v.abs().pow_(rule.energy_power)
    energy.add_(size.mean(-1), alpha=1 / len(weights))


class _Backward:
    """One backward pass: sums of the weights' gradients, filled chunk by chunk."""

    def __init__(self, rule: Rule, inputs: Inputs, dtype: torch.dtype, grads: Result) -> None:
        self.rule, self.inputs, self.dtype, self.grads = rule, inputs, dtype, grads
        self.weights = _weights(inputs, dtype)
        self.grad_x = torch.empty_like(inputs.x)
        self.grad_v = None if inputs.v is None else torch.empty_like(inputs.v)
        self.grad_hoisted = torch.zeros_like(inputs.hoisted)
        self.grad_candidate = None if inputs.candidate is None else torch.empty_like(inputs.candidate)
        self.grad_inner = torch.zeros_like(inputs.inner)
        self.grad_outer = inputs.outer.new_zeros(
            inputs.outer.shape[::-1]
        )  # (C, GD): the faster way round for a CPU's product
        self.grad_bias, self.grad_mu = torch.zeros_like(inputs.bias), torch.zeros_like(inputs.mu)
        self.grad_forcing = torch.zeros_like(inputs.forcing)
        self.grad_fraction = None if inputs.last_fraction is None else torch.zeros_like(inputs.last_fraction)

    def run(self, kept: tuple[Tensor, ...]) -> Inputs:
        """The gradients, in the places of their inputs."""
        for where in chunks(self.inputs.x):
            self._chunk(where, [u[where] for u in kept])
        return Inputs(
            self.grad_x,
            self.grad_v,
            self.grad_hoisted,
            self.grad_candidate,
            self.grad_inner,
            self.grad_outer.T,
            self.grad_bias,
            self.grad_mu,
            self.grad_forcing,
            self.grad_fraction,
        )

    def _chunk(self, where: slice, hidden: list[Tensor]) -> None:
        rule, inputs = self.rule, self.inputs
        x, v = inputs.x[where], _rows(inputs.v, where)
        candidate = _rows(inputs.candidate, where, x.dtype)
        states, tapes = [], []
        x_new = x
        for t in range(rule.num_iterations):
            states.append(x)
            if t >= len(hidden):
                hidden.append(_hidden(self.weights, inputs.hoisted[where], x, v))
            outputs = _outputs(rule, self.weights, hidden[t], x.dtype)
            x_new, tape = steps.forward(rule, outputs, x, v, candidate, inputs.mu, inputs.forcing[t])
            tapes.append(tape)
            x, v = x_new, tape.v_new
        self._backward_chunk(where, hidden, states, x_new, tapes)

    def _backward_chunk(
        self, where: slice, hidden: list[Tensor], states: list[Tensor], x_last: Tensor, tapes: list[steps.Tape]
    ) -> None:
        rule, x = self.rule, states[0]
        grad_x = self.grad_x[where]  # the result's place, in which the gradient travels back
        grad_x.zero_() if self.grads.x is None else grad_x.copy_(self.grads.x[where])
        grad_v = None if self.grads.v is None else self.grads.v[where].clone()
        grad_candidate = None if self.grad_candidate is None else torch.zeros_like(x)
        sum_hidden = None
        for t in reversed(range(rule.num_iterations)):
            tape, x = tapes[t], states[t]
            following = states[t + 1] if t + 1 < rule.num_iterations else x_last
            rest = None
            if t + 1 == rule.num_iterations and self.inputs.last_fraction is not None:
                grad_v, rest = self._split_last(where, tape, x, following, grad_x, grad_v)
            elif rule.energy_power is not None:
                grad_v = self._loss_gradients(where, t, following, tape.v_new, grad_x, grad_v)
            found = steps.backward(rule, tape, grad_x, grad_v, grad_candidate)
            grad_x.add_(found.x)
            self.grad_mu.add_(found.mu)
            self.grad_forcing[t].add_(found.forcing)
            grad_hidden = self._through_controller(found.outputs, hidden[t], x, tape.v, grad_x, found.v)
            sum_hidden = grad_hidden if sum_hidden is None else sum_hidden.add_(grad_hidden)
            grad_v = found.v
            if rest is not None:
                grad_x.add_(rest[0])
                grad_v.add_(rest[1])
        assert sum_hidden is not None
        self.grad_hoisted[where] = sum_hidden
        if self.grad_v is not None:
            assert grad_v is not None
            self.grad_v[where] = grad_v
        if self.grad_candidate is not None and grad_candidate is not None:
            self.grad_candidate[where] = grad_candidate

    def _through_controller(
        self, outputs: Tensor, u: Tensor, x: Tensor, v: Tensor | None, grad_x: Tensor, grad_v: Tensor
    ) -> Tensor:
        """Add what goes through the controller to the gradients of x, v and the weights; that of u comes back."""
        dim, weights = x.shape[1], self.weights
        activate, derive = ACTIVATIONS[self.rule.activation]
        _accumulate(self.grad_bias, outputs.sum(0))
        outputs = outputs.to(self.dtype)
        add_product(self.grad_outer, activate(u).T, outputs)
        grad_u = derive(outputs @ weights.outer, u)
        add_product(self.grad_inner[:, :dim], grad_u.T, x.to(self.dtype))
        add_product(grad_x, grad_u, weights.inner_x)
        if v is not None:
            add_product(self.grad_inner[:, dim:], grad_u.T, v.to(self.dtype))
            add_product(grad_v, grad_u, weights.inner_v)
        return grad_u

    def _loss_gradients(
        self, where: slice, t: int, x: Tensor, v: Tensor, grad_x: Tensor, grad_v: Tensor | None
    ) -> Tensor | None:
        """Add the gradients of the speed and energy terms at the end of step t; grad_x in place."""
        rule, dim = self.rule, x.shape[1]
        assert rule.energy_power is not None
        if self.grads.speed is not None:
            weight = speed_weights(rule.num_iterations)[t] / dim
            pull = (x - self.inputs.mu).sign_().mul_(self.grads.speed[where, None] * weight)
            grad_x.add_(pull)
            self.grad_mu.sub_(pull.sum(0))
        if self.grads.energy is not None:
            power = rule.energy_power
            push = 2.0 * v if power == 2.0 else v.sign() * v.abs().pow_(power - 1).mul_(power)
            push.mul_(self.grads.energy[where, None] / (dim * rule.num_iterations))
            grad_v = push if grad_v is None else grad_v.add_(push)
        return grad_v

    def _split_last(
        self, where: slice, tape: steps.Tape, x: Tensor, x_new: Tensor, grad_x: Tensor, grad_v: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Gradients into the last full step, x's in place, and what passes it by: (1 - f) x_{T-1} + f x_T, v alike."""
        assert self.inputs.last_fraction is not None
        assert self.grad_fraction is not None
        fraction = self.inputs.last_fraction.to(x.dtype)
        v = torch.zeros_like(x) if tape.v is None else tape.v
        if self.rule.energy_power is not None:
            mixed = torch.lerp(x, x_new, fraction), torch.lerp(v, tape.v_new, fraction)
            grad_v = self._loss_gradients(where, self.rule.num_iterations - 1, *mixed, grad_x, grad_v)
        if grad_v is None:
            grad_v = torch.zeros_like(x)
        self.grad_fraction += (grad_x * (x_new - x)).sum() + (grad_v * (tape.v_new - v)).sum()
        rest = grad_x * (1 - fraction), grad_v * (1 - fraction)
        grad_x.mul_(fraction)
        return grad_v * fraction, rest


def _accumulate(total: Tensor, part: Tensor) -> None:
    total.add_(part.to(total.dtype))
