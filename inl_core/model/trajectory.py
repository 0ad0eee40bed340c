"""Every iteration of a layer, kept for whoever wants to look. Legend: B batch, S sequence, D d_model, T iterations."""

from dataclasses import dataclass

import torch
from torch import Tensor

from inl_core.model.dynamics import Gains


@dataclass
class Trajectory:
    """Every iteration of one layer: states and velocities (T+1, B, S, D), alpha, beta, gate (T, B, S, D).

    candidate: v_cand (T, B, S, D), one tensor seen T times where all steps share it; None where there is none.
    """

    states: Tensor
    velocities: Tensor
    alpha: Tensor
    beta: Tensor
    gate: Tensor
    candidate: Tensor | None = None


class Recorder:
    """Collects a trajectory while the iterations run."""

    def __init__(self, state: Tensor, velocity: Tensor) -> None:
        self.states, self.velocities = [state], [velocity]
        self.gains: list[Gains] = []

    def add(self, x: Tensor, v: Tensor, gains: Gains) -> None:
        """The state and velocity after one more iteration, (B, S, D), and the gains that led there."""
        self.states.append(x)
        self.velocities.append(v)
        self.gains.append(gains)

    def trajectory(self) -> Trajectory:
        """All that was added."""
        alpha, beta, gate, candidates = zip(*self.gains, strict=True)
        return Trajectory(
            torch.stack(self.states),
            torch.stack(self.velocities),
            torch.stack(alpha),
            torch.stack(beta),
            torch.stack(gate),
            _stacked(candidates),
        )


def _stacked(candidates: tuple[Tensor | None, ...]) -> Tensor | None:
    """(T, B, S, D); a view where all steps share one tensor, as they do when the feed-forward gives the candidate."""
    first = candidates[0]
    if first is None:
        return None
    if all(candidate is first for candidate in candidates):
        return first.expand(len(candidates), *first.shape)
    return torch.stack([candidate for candidate in candidates if candidate is not None])
