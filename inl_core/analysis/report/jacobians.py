"""How one token's state and velocity react to a small change: the true Jacobians of the steps that the model runs.

    J_t = d(x_{t+1}, v_{t+1}) / d(x_t, v_t)    (2D, 2D), all else held: other tokens, h and its candidate

- True means through the whole step: through controller and dynamic alpha in an integrator, and in a stream through the
  sub-layer of the token itself. The frozen step of the convergence report leaves these out.
- The finite-time Lyapunov exponents over T steps are ln(s_i) / T, s_i the singular values of J_{T-1} ... J_0. They are
  found by QR decompositions alone, forward and backward through the steps, so that a long product neither overflows nor
  loses the small ones. For T towards infinity they are the Lyapunov exponents (Benettin et al., 1980).
- Legend: K tokens, D d_model, T steps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inl_core.analysis.convergence.collect import model_inputs
from inl_core.corpus.loader import Batch
from inl_core.inference.texts import Text
from inl_core.model import Integrator, IntegratorLanguageModel, Options
from inl_core.model.derivatives import differentiable_attention, plain_operations
from inl_core.model.stream import StreamBlock

MOST_DIMENSIONS = 256
"""d_model above which the Jacobians, whose cost grows with its third power, are left out."""
NUM_TOKENS, CONTEXT, _AT_ONCE = 4, 32, 64
_SWEEPS = 4

Flow = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""One step of K tokens that do not see each other: x and v, (K, D) each, -> the next x and v."""


@dataclass(frozen=True)
class Reaction:
    """What the Jacobians of one system say."""

    system: str
    spectral_radius: np.ndarray
    """Of each step and token, (T, K)."""
    period: np.ndarray
    """Steps in which the eigenvalue of that radius turns once, (T, K); infinite where it is real and positive."""
    exponents: np.ndarray
    """Finite-time Lyapunov exponents of each token, a step, largest first, (K, 2D)."""


@torch.no_grad()
def measure_reactions(model: IntegratorLanguageModel, text: Text) -> list[Reaction]:
    """Of NUM_TOKENS tokens, each the last of a window of its own; of each layer, or of a stream as a whole.

    Empty for a model wider than MOST_DIMENSIONS; a system whose Jacobians are not finite is left out.
    """
    if model.config.d_model > MOST_DIMENSIONS or not model.config.has_dynamics:
        return []
    window = min(CONTEXT, text.num_targets, model.config.max_seq_len)
    batch = next(text.windows(window=window, batch_size=NUM_TOKENS, max_tokens=NUM_TOKENS * window))
    found: list[Reaction] = []
    for system, flows, x, v in _systems(model, batch):
        steps = []
        for flow in flows:
            steps.append(jacobians(flow, x, v).double())
            x, v = flow(x, v)
        if all(step.isfinite().all() for step in steps):  # of others LAPACK ends the process
            found.append(react(system, steps))
    return found


def react(system: str, steps: Sequence[Tensor]) -> Reaction:
    """What the Jacobians of consecutive steps, (K, 2D, 2D) each, say."""
    leading = [_leading(jacobian) for jacobian in steps]
    radius = torch.stack([value.abs() for value in leading])
    turned = torch.stack([value.angle().abs() for value in leading])
    period = torch.where(turned > 1e-9, 2 * torch.pi / turned, torch.inf)
    return Reaction(system, radius.cpu().numpy(), period.cpu().numpy(), lyapunov_exponents(steps).cpu().numpy())


def jacobians(flow: Flow, x: Tensor, v: Tensor) -> Tensor:
    """d(x', v') / d(x, v) of each token at x and v, (K, D) each: (K, 2D, 2D)."""
    dim, place = x.shape[-1], torch.cat((x, v), -1)

    def packed(state: Tensor) -> Tensor:
        return torch.cat(flow(state[:, :dim], state[:, dim:]), -1)

    def along(direction: Tensor) -> Tensor:
        return torch.func.jvp(packed, (place,), (direction.expand_as(place),))[1]

    with plain_operations(), differentiable_attention():
        columns = torch.func.vmap(along, chunk_size=_AT_ONCE)(torch.eye(2 * dim, dtype=x.dtype, device=x.device))
    return columns.permute(1, 2, 0)


def lyapunov_exponents(steps: Sequence[Tensor]) -> Tensor:
    """ln of the singular values of the product of `steps`, (K, n, n) each, over their number: (K, n), largest first."""
    basis = torch.eye(steps[0].shape[-1], dtype=steps[0].dtype, device=steps[0].device).expand_as(steps[0])
    back = [step.mT for step in reversed(steps)]
    growth = torch.zeros(())
    for sweep in range(2 * _SWEEPS):
        growth = torch.zeros_like(basis[..., 0])
        for step in back if sweep % 2 else steps:
            basis, upper = torch.linalg.qr(step @ basis)
            tiny = torch.finfo(upper.dtype).tiny
            growth = growth + upper.diagonal(dim1=-2, dim2=-1).abs().clamp(min=tiny).log()
    return (growth / len(steps)).sort(-1, descending=True).values


def _leading(jacobian: Tensor) -> Tensor:
    """The eigenvalue of the largest modulus, (K,) complex."""
    values = torch.linalg.eigvals(jacobian)
    return values.gather(-1, values.abs().argmax(-1, keepdim=True)).squeeze(-1)


System = tuple[str, list[Flow], Tensor, Tensor]
"""A name, its steps, and the x and v with which they begin."""


def _systems(model: IntegratorLanguageModel, batch: Batch) -> Iterator[System]:
    inputs = model_inputs(batch, model.embedding.table.weight.device)
    kept: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kept.append((module, args, kwargs))

    is_stream = model.config.integrator is None
    watched = [block for block in model.blocks if isinstance(block, StreamBlock)] if is_stream else model.integrators()
    handles = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in watched]
    model(**inputs, options=Options(early_stopping=False))
    for handle in handles:
        handle.remove()
    if is_stream:
        flows = [flow for block, args, _ in kept for flow in _stream_flows(block, *args[:3])]
        yield "all steps", flows, kept[0][1][0][:, -1], kept[0][1][1][:, -1]
        return
    for number, (layer, args, kwargs) in enumerate(kept):
        h, x, v = (tensor[:, -1:] for tensor in args[:3])
        yield f"layer {number}", _integrator_flows(layer, h, kwargs), x[:, 0], v[:, 0]


def _integrator_flows(layer: Integrator, h: Tensor, kwargs: dict[str, Any]) -> list[Flow]:
    """The iterations that the model runs, for the tokens whose context is h (K, 1, D)."""
    candidate = kwargs.get("candidate")
    controller = kwargs.get("controller") or layer.controller
    assert controller is not None
    drive: Any = layer.drive(
        controller,
        h,
        None if candidate is None else candidate[:, -1:],
        layer.router(h) if layer.router else None,
    )
    count = kwargs.get("num_iterations") or layer.config.num_iterations
    forcing = layer.excitation(count, kwargs["amplitude"])

    def flow_at(t: int) -> Flow:
        def flow(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            new_x, new_v, _ = layer.dynamics.step_with_gains(drive, x[:, None], v[:, None], forcing[t])
            return new_x[:, 0], new_v[:, 0]

        return flow

    return [flow_at(t) for t in range(count)]


def _stream_flows(block: StreamBlock, x: Tensor, v: Tensor, shared: Any) -> Iterator[Flow]:
    """The two steps of a block, for the last token of each window; the tokens before it are as in x and v (K, S, D)."""

    def flow_of(sub_layer: Callable[..., tuple[Tensor, Tensor]], x: Tensor, v: Tensor) -> Flow:
        def flow(own_x: Tensor, own_v: Tensor) -> tuple[Tensor, Tensor]:
            given = (torch.cat((tensor[:, :-1], own[:, None]), 1) for tensor, own in ((x, own_x), (v, own_v)))
            new_x, new_v = sub_layer(*given, shared, None)
            return new_x[:, -1], new_v[:, -1]

        return flow

    yield flow_of(block.attend, x, v)
    yield flow_of(block.feed, *block.attend(x, v, shared, None))
