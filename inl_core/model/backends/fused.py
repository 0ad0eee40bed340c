"""The T iterations with a hand-written backward pass that computes them again: what is kept does not depend on T.

- Kept: x_0, v_0, the context's projection, v_cand, the weights, and u of the first two iterations, which is small (C of
  D) and spares the backward pass its larger matrix product. No step's gains, states or velocities.
- Both passes go over the tokens a few rows at a time, all T iterations for each, so that every intermediate stays in
  the processor's cache and the largest buffer of the backward pass is a few rows high, whatever B and S.
- Between the matrix products stand the steps: torch's operations (steps.py) or one pass in C++ (native.py).
- Under autocast the matrix products take its precision, everything else the state's, as in the plain path.
- Legend: N tokens, n rows of a chunk, D d_model, C controller width, T iterations.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from inl_core.model.backends import native, steps
from inl_core.model.backends.rule import ACTIVATIONS, Inputs, Result, Rule, Step, Sums, speed_weights
from inl_core.model.by_rows import add_product, matrix_dtype, row_chunks

_KEPT_ITERATIONS = 2


class Steps(Protocol):
    """What steps.py and native.py both are."""

    @property
    def CHUNK_BYTES(self) -> int:
        """Bytes of one (n, D) tensor of the rows that are worked on together."""
        ...

    def forward(self, rule: Rule, step: Step, results: tuple[Tensor, Tensor] | None) -> Any:
        """A tape, whose `v` and `v_new` are the step's."""
        ...

    def backward(
        self, rule: Rule, tape: Any, grad_x: Tensor, grad_v: Tensor, grad_candidate: Tensor | None, sums: Sums
    ) -> Tensor:
        """The gradient of the controller's output."""
        ...


class Weights(NamedTuple):
    """The two matrices and the bias in the products' precision."""

    inner_x: Tensor
    inner_v: Tensor
    outer: Tensor
    bias: Tensor


def run(rule: Rule, inputs: Inputs) -> Result:
    """T iterations on N tokens, all tensors flat, the steps by torch's operations."""
    return _apply(steps, rule, inputs)


def run_native(rule: Rule, inputs: Inputs) -> Result:
    """The same, the steps in C++ where they can be."""
    return _apply(native if native.supports(inputs) else steps, rule, inputs)


def _apply(by: Steps, rule: Rule, inputs: Inputs) -> Result:
    return Result(*Recomputed.apply(by, rule, matrix_dtype(inputs.x), *(_dense(tensor) for tensor in inputs)))


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def chunks(by: Steps, x: Tensor) -> Iterator[slice]:
    """Rows of x (N, D) that are worked on together."""
    return row_chunks(x, x.shape[1], by.CHUNK_BYTES)


def _rows(tensor: Tensor | None, where: slice) -> Tensor | None:
    return None if tensor is None else tensor[where]


def _weights(inputs: Inputs, dtype: torch.dtype) -> Weights:
    inner = inputs.inner.to(dtype)
    dim = inputs.x.shape[1]
    return Weights(inner[:, :dim], inner[:, dim:], inputs.outer.to(dtype), inputs.bias.to(dtype))


def _hidden(weights: Weights, hoisted: Tensor, x: Tensor, v: Tensor | None) -> Tensor:
    """u before its activation, (n, C)."""
    dtype = weights.outer.dtype
    u = torch.addmm(hoisted.to(dtype), x.to(dtype), weights.inner_x.T)
    return u if v is None else u.addmm_(v.to(dtype), weights.inner_v.T)


def _step(rule: Rule, weights: Weights, inputs: Inputs, where: slice, t: int, now: "_Now", space: Tensor) -> Step:
    """One iteration's, its controller evaluated into `space` (n, GD)."""
    activated = ACTIVATIONS[rule.activation][0](now.u)
    if activated.dtype == space.dtype:
        torch.addmm(weights.bias, activated, weights.outer.T, out=space)
    else:
        space.copy_(torch.addmm(weights.bias, activated, weights.outer.T))
    return Step(space, now.x, now.v, _rows(inputs.candidate, where), inputs.mu, inputs.forcing[t])


class _Now(NamedTuple):
    """One iteration's beginning: x, v (n, D), and u (n, C) before its activation."""

    x: Tensor
    v: Tensor | None
    u: Tensor


class Recomputed(torch.autograd.Function):
    """(steps, rule, dtype of the matrix products, *Inputs) -> Result."""

    @staticmethod
    def forward(ctx: Any, by: Steps, rule: Rule, dtype: torch.dtype, *tensors: Any) -> tuple[Tensor | None, ...]:
        """Run the iterations; see the module for what is kept."""
        inputs = Inputs(*tensors)
        ctx.set_materialize_grads(False)
        ctx.by, ctx.rule, ctx.dtype = by, rule, dtype
        with torch.autocast(inputs.x.device.type, enabled=False):
            result, kept = _run(by, rule, inputs, dtype, keep=any(ctx.needs_input_grad))
        # mu's moving average may move it in place before the backward pass, which needs the mu of this pass.
        ctx.save_for_backward(*inputs._replace(mu=inputs.mu.clone()), *kept)
        return tuple(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of every input, or None where none is asked for."""
        saved = ctx.saved_tensors
        inputs, kept = Inputs(*saved[: len(Inputs._fields)]), saved[len(Inputs._fields) :]
        with torch.autocast(inputs.x.device.type, enabled=False):
            found = _Backward(ctx.by, ctx.rule, inputs, ctx.dtype, Result(*grads)).run(kept)  # type: ignore[arg-type]
        return None, None, None, *found


def _run(by: Steps, rule: Rule, inputs: Inputs, dtype: torch.dtype, *, keep: bool) -> tuple[Result, list[Tensor]]:
    x_out, v_out = torch.empty_like(inputs.x), torch.empty_like(inputs.x)
    terms = [inputs.x.new_zeros(inputs.x.shape[0]) for _ in range(2)] if rule.energy_power is not None else None
    weights = _weights(inputs, dtype)
    num_kept = min(_KEPT_ITERATIONS, rule.num_iterations) if keep else 0
    kept = [inputs.hoisted.new_empty(inputs.hoisted.shape, dtype=dtype) for _ in range(num_kept)]
    space = _space(by, inputs)
    for where in chunks(by, inputs.x):
        x, v = inputs.x[where], _rows(inputs.v, where)
        new_x, new_v = x_out[where], v_out[where]
        for t in range(rule.num_iterations):
            now = _Now(x, v, _hidden(weights, inputs.hoisted[where], x, v))
            if t < num_kept:
                kept[t][where] = now.u
            step = _step(rule, weights, inputs, where, t, now, space[: x.shape[0]])
            if inputs.last_fraction is not None and t + 1 == rule.num_iterations:
                _part_of_a_step(by, rule, step, inputs.last_fraction.to(x.dtype), (new_x, new_v))
            else:
                by.forward(rule, step, (new_x, new_v))  # from the second iteration on in place
            x, v = new_x, new_v
            if terms is not None:
                _add_losses(rule, t, x - inputs.mu, v, terms[0][where], terms[1][where])
    return Result(x_out, v_out, *(terms or (None, None))), kept


def _space(by: Steps, inputs: Inputs, *times: int) -> Tensor:
    """Room for the controller's output of one chunk, (*times, n, GD), used again for every other."""
    first = next(chunks(by, inputs.x), slice(0, 0))
    return inputs.x.new_empty(*times, first.stop, inputs.bias.shape[0])


def _part_of_a_step(by: Steps, rule: Rule, step: Step, fraction: Tensor, results: tuple[Tensor, Tensor]) -> None:
    """x + fraction (x_new - x), and v alike, into `results`, which may be the step's own x and v."""
    whole = torch.empty_like(step.x), torch.empty_like(step.x)
    by.forward(rule, step, whole)
    torch.lerp(step.x, whole[0], fraction, out=results[0])
    if step.v is None:
        torch.mul(whole[1], fraction, out=results[1])
    else:
        torch.lerp(step.v, whole[1], fraction, out=results[1])


def _add_losses(rule: Rule, t: int, error: Tensor, v: Tensor, speed: Tensor, energy: Tensor) -> None:
    assert rule.energy_power is not None
    weights = speed_weights(rule.num_iterations)
    speed.add_(error.abs_().mean(-1), alpha=weights[t])
    size = v.square() if rule.energy_power == 2.0 else v.abs().pow_(rule.energy_power)
    energy.add_(size.mean(-1), alpha=1 / len(weights))


class _Backward:
    """One backward pass: sums of the weights' gradients, filled chunk by chunk."""

    def __init__(self, by: Steps, rule: Rule, inputs: Inputs, dtype: torch.dtype, grads: Result) -> None:
        self.by, self.rule, self.inputs, self.dtype, self.grads = by, rule, inputs, dtype, grads
        self.weights = _weights(inputs, dtype)
        self.space = _space(by, inputs, rule.num_iterations)
        self.grad_x, self.grad_v = torch.empty_like(inputs.x), torch.empty_like(inputs.x)
        self.grad_hoisted = torch.zeros_like(inputs.hoisted)
        self.grad_candidate = None if inputs.candidate is None else torch.zeros_like(inputs.candidate)
        self.grad_inner = torch.zeros_like(inputs.inner)
        self.grad_outer = inputs.outer.new_zeros(
            inputs.outer.shape[::-1]
        )  # (C, GD): the faster way round for a CPU's product
        self.grad_bias, self.grad_mu = torch.zeros_like(inputs.bias), torch.zeros_like(inputs.mu)
        self.grad_forcing = torch.zeros_like(inputs.forcing)
        self.grad_fraction = None if inputs.last_fraction is None else torch.zeros_like(inputs.last_fraction)

    def run(self, kept: tuple[Tensor, ...]) -> Inputs:
        """The gradients, in the places of their inputs."""
        for where in chunks(self.by, self.inputs.x):
            tapes, last = self._forward_chunk(where, [u[where] for u in kept])
            self._backward_chunk(where, tapes, last)
        return Inputs(
            self.grad_x,
            None if self.inputs.v is None else self.grad_v,
            self.grad_hoisted,
            self.grad_candidate,
            self.grad_inner,
            self.grad_outer.T,
            self.grad_bias,
            self.grad_mu,
            self.grad_forcing,
            self.grad_fraction,
        )

    def _forward_chunk(self, where: slice, hidden: list[Tensor]) -> tuple[list[tuple[_Now, Any]], Tensor]:
        """Every iteration again: its beginning and its tape; and x_T, where the last step's results are wanted."""
        rule, inputs = self.rule, self.inputs
        x, v = inputs.x[where], _rows(inputs.v, where)
        wants_last = rule.energy_power is not None or inputs.last_fraction is not None
        tapes = []
        for t in range(rule.num_iterations):
            u = hidden[t] if t < len(hidden) else _hidden(self.weights, inputs.hoisted[where], x, v)
            now = _Now(x, v, u)
            step = _step(rule, self.weights, inputs, where, t, now, self.space[t, : x.shape[0]])
            is_read = wants_last or t + 1 < rule.num_iterations
            results = (torch.empty_like(x), torch.empty_like(x)) if is_read else None
            tapes.append((now, self.by.forward(rule, step, results)))
            if results is not None:
                x, v = results
        return tapes, x

    def _backward_chunk(self, where: slice, tapes: list[tuple[_Now, Any]], x_last: Tensor) -> None:
        rule = self.rule
        # The results' places, in which the gradients travel back.
        grad_x, grad_v = self.grad_x[where], self.grad_v[where]
        for place, given in ((grad_x, self.grads.x), (grad_v, self.grads.v)):
            place.zero_() if given is None else place.copy_(given[where])
        grad_candidate = _rows(self.grad_candidate, where)
        following = x_last
        for t in reversed(range(rule.num_iterations)):
            now, tape = tapes[t]
            rest = None
            if t + 1 == rule.num_iterations and self.inputs.last_fraction is not None:
                rest = self._split_last(where, now, following, tape.v_new, grad_x, grad_v)
            elif rule.energy_power is not None:
                self._loss_gradients(where, t, following, tape.v_new, grad_x, grad_v)
            sums = Sums(self.grad_bias, self.grad_mu, self.grad_forcing[t])
            outputs = self.by.backward(rule, tape, grad_x, grad_v, grad_candidate, sums)
            grad_hidden = self._through_controller(outputs, now, grad_x, grad_v)
            self.grad_hoisted[where] += grad_hidden
            if rest is not None:
                grad_x.add_(rest[0])
                grad_v.add_(rest[1])
            following = now.x

    def _through_controller(self, outputs: Tensor, now: _Now, grad_x: Tensor, grad_v: Tensor) -> Tensor:
        """Add what goes through the controller to the gradients of x, v and the weights; that of u comes back."""
        dim, weights = now.x.shape[1], self.weights
        activate, derive = ACTIVATIONS[self.rule.activation]
        outputs = outputs.to(self.dtype)
        add_product(self.grad_outer, activate(now.u).T, outputs)
        grad_u = derive(outputs @ weights.outer, now.u)
        add_product(self.grad_inner[:, :dim], grad_u.T, now.x.to(self.dtype))
        add_product(grad_x, grad_u, weights.inner_x)
        if now.v is not None:
            add_product(self.grad_inner[:, dim:], grad_u.T, now.v.to(self.dtype))
            add_product(grad_v, grad_u, weights.inner_v)
        return grad_u

    def _loss_gradients(self, where: slice, t: int, x: Tensor, v: Tensor, grad_x: Tensor, grad_v: Tensor) -> None:
        """Add the gradients of the speed and energy terms at the end of step t, in place."""
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
            grad_v.add_(push.mul_(self.grads.energy[where, None] / (dim * rule.num_iterations)))

    def _split_last(
        self, where: slice, now: _Now, x_new: Tensor, v_new: Tensor, grad_x: Tensor, grad_v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Leave what goes into the last full step, and return what passes it by: (1 - f) x_{T-1} + f x_T, v alike."""
        assert self.inputs.last_fraction is not None
        assert self.grad_fraction is not None
        fraction, x = self.inputs.last_fraction.to(now.x.dtype), now.x
        v = torch.zeros_like(x) if now.v is None else now.v
        if self.rule.energy_power is not None:
            mixed = torch.lerp(x, x_new, fraction), torch.lerp(v, v_new, fraction)
            self._loss_gradients(where, self.rule.num_iterations - 1, *mixed, grad_x, grad_v)
        self.grad_fraction += (grad_x * (x_new - x)).sum() + (grad_v * (v_new - v)).sum()
        rest = grad_x * (1 - fraction), grad_v * (1 - fraction)
        grad_x.mul_(fraction)
        grad_v.mul_(fraction)
        return rest
