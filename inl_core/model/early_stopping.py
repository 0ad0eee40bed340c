"""Per-token early stopping: a token whose state has stopped moving by itself is frozen exactly.

The displacement that the excitation causes in a step is known and does not count as movement: with it, a driven system
would never be seen to converge (docs/model.md, "Early stopping"). Legend: B batch, S sequence, D d_model.
"""

import torch
from torch import Tensor

from inl_core.model.derivatives import needs_plain_operations
from inl_core.model.dynamics import rms
from inl_core.recipe import EarlyStoppingConfig


class EarlyStopping:
    """Which tokens still iterate, and how many iterations each has used."""

    def __init__(self, config: EarlyStoppingConfig, state: Tensor) -> None:
        self.threshold, self.min_iterations = config.convergence_threshold, config.min_iterations
        self.active = torch.ones(state.shape[:-1], dtype=torch.bool, device=state.device)  # (B, S)
        self.iterations = torch.zeros(state.shape[:-1], dtype=torch.int32, device=state.device)

    def freeze(
        self, t: int, before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], forced: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The state and velocity after iteration t, (B, S, D), with stopped tokens left as they were.

        `forced` is the part of the state's change that the excitation caused.
        """
        moved = rms(after[0] - before[0] - forced).squeeze(-1)
        keep = self.active[..., None]
        self.iterations = self.iterations + self.active
        if t + 1 >= self.min_iterations:
            self.active = self.active & (moved >= self.threshold)
        return torch.where(keep, after[0], before[0]), torch.where(keep, after[1], before[1])

    def all_stopped(self) -> bool:
        """Whether no token is left that would still move; under vmap, which cannot branch on a value, never."""
        return not (needs_plain_operations() or bool(self.active.any()))
