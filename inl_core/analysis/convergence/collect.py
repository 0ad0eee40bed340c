"""Trajectories of every layer on real text, window by window: statistics of all tokens, and a sample kept whole.

- Each layer's dynamics are followed for more iterations than the model uses, to see where they lead. The next layer
  still gets what the model itself computes.
- A hook on each integrator runs the longer path, so only one layer's path is in memory at a time.
- Iteration t >= 1 is the step from x_{t-1} to x_t: its alpha, beta, gate and fixed point are those of that step.
- Legend: B batch, S sequence, N scored tokens of a batch, D d_model, T iterations followed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from inl_core.analysis.convergence.sample import GAINS, TokenSample
from inl_core.analysis.convergence.sketch import Distribution
from inl_core.analysis.convergence.stability import BETA_FLOOR, KINDS, fixed_point, frozen_stability
from inl_core.corpus.loader import IGNORED, Batch
from inl_core.documents.convergence import ConvergenceMetrics
from inl_core.model import Integrator, IntegratorLanguageModel, IntegratorOutput, Options, Trajectory

TOKEN_MEASURES = (
    "state_rms",
    "velocity_rms",
    "energy",
    "displacement",
    "distance_mu",
    "distance_fixed_point",
    "residual",
    "unforced_residual",
)
_FROM_STEP_ONE = ("residual", "unforced_residual")


class LayerStatistics:
    """What the report says about one layer, gathered from its trajectories batch by batch.

    Args:
        num_iterations: how many are followed.
        used_iterations: how many of them the model itself runs.
        epsilon: tolerance of the convergence metrics.
    """

    def __init__(self, num_iterations: int, used_iterations: int, epsilon: float) -> None:
        self.num_iterations, self.used_iterations = num_iterations, used_iterations
        self.num_tokens = 0
        self.against_mu = ConvergenceMetrics(num_iterations, epsilon)
        self.against_fixed_point = ConvergenceMetrics(num_iterations, epsilon)
        names = (*TOKEN_MEASURES, *GAINS, "radius")
        self.distributions = {name: [Distribution() for _ in range(num_iterations + 1)] for name in names}
        # By iteration, how many elements are of each kind of stability, and how many have no fixed point.
        self.kinds = torch.zeros(len(KINDS), num_iterations + 1, dtype=torch.float64)
        self.without_fixed_point = torch.zeros(num_iterations + 1, dtype=torch.float64)
        # Sums over elements: the number of turns times the length of the path, and the length of the path.
        self.turning, self.motion = 0.0, 0.0

    def add(self, path: Trajectory, mu: Tensor, forcing: Tensor, stride: float) -> dict[str, Tensor]:
        """Count the trajectories of N tokens, states (T+1, N, D); returns their measures, (T+1, N) each.

        `forcing` (T, D) is the excitation; `stride` is dt velocity_scale.
        """
        targets = fixed_points(path, mu)
        measures = measure_tokens(path, mu, targets, forcing, stride)
        self.num_tokens += path.states.shape[1]
        self.against_mu.add(path.states, [mu] * len(path.states))
        self.against_fixed_point.add(path.states, targets)
        for name in TOKEN_MEASURES:
            for t in range(int(name in _FROM_STEP_ONE), self.num_iterations + 1):
                self.distributions[name][t].add(measures[name][t])
        for t in range(self.num_iterations):
            self._add_step(t + 1, path.alpha[t], path.beta[t], path.gate[t], stride)
        self._add_turns(path.states)
        return measures

    def _add_step(self, t: int, alpha: Tensor, beta: Tensor, gate: Tensor, stride: float) -> None:
        stability = frozen_stability(alpha, beta, gate, stride)
        for name, values in (("alpha", alpha), ("beta", beta), ("gate", gate), ("radius", stability.radius)):
            self.distributions[name][t].add(values)
        self.kinds[:, t] += torch.stack([getattr(stability, kind).sum() for kind in KINDS]).double().cpu()
        self.without_fixed_point[t] += (beta < BETA_FLOOR).sum().item()

    def _add_turns(self, states: Tensor) -> None:
        moves = states.diff(dim=0)
        turns = (moves[1:] * moves[:-1] < 0).sum(0)  # (N, D)
        paths = torch.nan_to_num(moves.abs().sum(0), nan=0.0, posinf=0.0)
        self.turning += (turns * paths).sum(dtype=torch.float64).item()
        self.motion += paths.sum(dtype=torch.float64).item()

    @property
    def num_turns(self) -> float:
        """How often a dimension of a token turns back, weighted by the length of its path: 0 .. T - 1."""
        return self.turning / self.motion if self.motion else 0.0

    def rows(self) -> list[dict[str, Any]]:
        """One row an iteration, 0 (the start) to T."""
        mu, rest = self.against_mu.rows(), self.against_fixed_point.rows()
        return [
            {
                "iteration": t,
                "used": t <= self.used_iterations,
                "against_mu": mu[t],
                "against_fixed_point": rest[t],
                **{name: self.distributions[name][t].summary() for name in TOKEN_MEASURES},
                "nonfinite_tokens": self.distributions["state_rms"][t].num_nonfinite,
                **(self._step_row(t) if t else {}),
            }
            for t in range(self.num_iterations + 1)
        ]

    def _step_row(self, t: int) -> dict[str, Any]:
        radius = self.distributions["radius"][t]
        count = max(1, radius.count + radius.num_nonfinite)
        shares = {kind: self.kinds[index, t].item() / count for index, kind in enumerate(KINDS)}
        return {
            **{name: self.distributions[name][t].summary() for name in GAINS},
            "stability": {**shares, "spectral_radius": radius.summary()},
            "share_without_fixed_point": self.without_fixed_point[t].item() / count,
        }


def fixed_points(path: Trajectory, mu: Tensor) -> Tensor:
    """Where each state would rest if the step that led to it were repeated without the excitation: (T+1, N, D).

    No step led to x_0; its fixed point is that of the step that leaves it.
    """
    found = fixed_point(mu, path.alpha, path.beta, path.candidate)
    return torch.cat((found[:1], found))


def measure_tokens(path: Trajectory, mu: Tensor, targets: Tensor, forcing: Tensor, stride: float) -> dict[str, Tensor]:
    """Norms of every token at every iteration, (T+1, N), as root mean squares over the D dimensions.

    residual is |x_t - x_{t-1}|, unforced_residual the same without the displacement that the excitation of this very
    step causes; both are NaN at t = 0. energy is the mean square of v.
    """
    states, velocities = path.states, path.velocities
    moves = states.diff(dim=0)
    unforced = moves - stride * path.gate * forcing[:, None, :]
    never = states.new_full((1, states.shape[1]), torch.nan)
    return {
        "state_rms": _rms(states),
        "velocity_rms": _rms(velocities),
        "energy": velocities.square().mean(-1),
        "displacement": _rms(states - states[:1]),
        "distance_mu": _rms(states - mu),
        "distance_fixed_point": _rms(states - targets),
        "residual": torch.cat((never, _rms(moves))),
        "unforced_residual": torch.cat((never, _rms(unforced))),
    }


def _rms(values: Tensor) -> Tensor:
    return values.square().mean(-1).sqrt()


@torch.inference_mode()
def trace(
    model: IntegratorLanguageModel,
    batches: Iterable[Batch],
    *,
    num_iterations: int,
    epsilon: float,
    sample: TokenSample | None = None,
) -> list[LayerStatistics]:
    """Follow every layer on the scored tokens of `batches`; the model must be in evaluation mode.

    Early stopping is off here; what it does is measured by iterations.py.
    """
    statistics: dict[int, LayerStatistics] = {}
    device = model.embedding.table.weight.device
    scored, kept = torch.empty(0), None  # of the batch that is running

    def receive(index: int, layer: Integrator, used: int, amplitude: Tensor, path: Trajectory) -> None:
        path = _tokens(path, scored)
        if index not in statistics:
            statistics[index] = LayerStatistics(num_iterations, used, epsilon)
        mu, forcing = layer.equilibrium(), layer.excitation(num_iterations, amplitude)
        measures = statistics[index].add(path, mu, forcing, layer.stride)
        if sample and kept is not None:
            sample.add(index, used, kept, path, mu, measures)

    with _followed(model, num_iterations, receive):
        for batch in batches:
            scored = torch.from_numpy(batch.targets != IGNORED).to(device)  # (B, S)
            if scored.any():
                kept = sample.choose(batch) if sample else None
                model(**model_inputs(batch, device), options=Options(early_stopping=False))
    return [statistics[index] for index in sorted(statistics)]


def model_inputs(batch: Batch, device: torch.device) -> dict[str, Any]:
    """The model's arguments ids, positions and document_ids: tensors (B, S) on the device, or None."""
    arrays = {"ids": batch.tokens, "positions": batch.positions, "document_ids": batch.document_ids}
    return {name: None if array is None else torch.from_numpy(array).to(device) for name, array in arrays.items()}


def _tokens(path: Trajectory, chosen: Tensor) -> Trajectory:
    """The chosen tokens (B, S) of a trajectory, all its tensors (T, N, D)."""
    parts: dict[str, Any] = {field.name: getattr(path, field.name) for field in fields(Trajectory)}
    parts = {name: part if part is None else part[:, chosen] for name, part in parts.items()}
    return Trajectory(**parts)


@contextmanager
def _followed(
    model: IntegratorLanguageModel,
    num_iterations: int,
    receive: Callable[[int, Integrator, int, Tensor, Trajectory], None],
) -> Iterator[None]:
    """While open, each integrator that runs also runs `num_iterations` from the same start; `receive` gets that path.

    `receive` is called with the layer's number, the integrator, the iterations the model uses, A, and the path.
    """

    def hook_of(index: int) -> Callable[..., None]:
        def follow(layer: Integrator, args: tuple, kwargs: dict[str, Any], output: IntegratorOutput) -> None:
            changes = {"num_iterations": num_iterations, "keep_trajectory": True, "early_stopping": False}
            longer = layer.forward(*args, **{**kwargs, "last_fraction": None, "energy_power": None, **changes})
            assert longer.trajectory is not None
            used = kwargs.get("num_iterations") or layer.config.num_iterations
            receive(index, layer, used, kwargs["amplitude"], longer.trajectory)

        return follow

    with hooked(model, hook_of):
        yield


@contextmanager
def hooked(
    model: IntegratorLanguageModel, hook_of: Callable[[int], Callable[..., Any]], layers: Iterable[int] | None = None
) -> Iterator[None]:
    """While open, each integrator of `layers` (None: all) has the forward hook that `hook_of` gives for its number."""
    integrators = model.integrators()
    chosen = range(len(integrators)) if layers is None else layers
    handles = [integrators[index].register_forward_hook(hook_of(index), with_kwargs=True) for index in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
