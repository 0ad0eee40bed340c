"""The documents' loss: task + mean + speed + energy, for the regression model and the language model alike.

    L_mean   = lambda_mean   mean_i w_i (xbar_i - mu_i)^2     w_i = 1 / (1 + Var_i), x the final states
    L_speed  = lambda_speed  sum_t w_t mean |x_t - mu|        w_t proportional to exp(-t / tau), tau = T/3, t = 1..T
    L_energy = lambda_energy mean |v_t|^2                     t = 1..T

- Source: document 002 (docs/model.md, "Losses"). The documents sum over dimensions; means are taken here, so
  that a weight means the same at every width. For the documents' scalar state the two are the same.
- The terms are computed by the functions `inl train` uses (inl_core/training/losses.py).
- Legend: B batch, S sequence (1 in regression), D state, L layers, T iterations, V classes.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inl_core.documents.arguments import validated
from inl_core.model import IntegratorOutput
from inl_core.model.dynamics import speed_weights
from inl_core.recipe import LossSettings
from inl_core.training.cycles import annealed
from inl_core.training.losses import mean_loss_share, state_moments, token_term

IGNORED = -100


class IntegratorLoss(nn.Module):
    """`losses = loss_fn(predictions, targets, trajectory, epoch, learned_mu)`; `losses["total"].backward()`.

    lambda_mean is annealed from lambda_mean_init to a tenth of it over `annealing_epochs`. Once
    `set_exploration_phase` has been called it is equilibrium_lambda_mean (False) or exploration_lambda_mean (True).

    Args:
        target_value: mu, where neither `learned_mu` nor the trajectory gives one.
        lambda_mean_init, lambda_speed, lambda_energy: weights.
        annealing_epochs: epochs over which lambda_mean anneals when there are no phases.
        variance_weighted: w_i as above, so that a dimension that varies more weighs less; False is w_i = 1. (The prose
            of the documents says the opposite of their equation. The equation is followed.)
        exploration_lambda_mean, exploration_lambda_energy: weights in exploration.
        equilibrium_lambda_mean: lambda_mean in equilibrium.
        annealing: how lambda_mean anneals.

    Raises:
        ValueError: an argument out of its range, named.
    """

    def __init__(
        self,
        target_value: float = 5.0,
        lambda_mean_init: float = 1.0,
        lambda_speed: float = 0.1,
        lambda_energy: float = 0.01,
        annealing_epochs: int = 100,
        variance_weighted: bool = True,
        exploration_lambda_mean: float = 0.05,
        exploration_lambda_energy: float = 0.001,
        *,
        equilibrium_lambda_mean: float = 0.5,
        annealing: Literal["exponential", "linear"] = "exponential",
    ) -> None:
        super().__init__()
        values = {
            "lambda_mean": lambda_mean_init,
            "lambda_mean_final": lambda_mean_init / 10,
            "lambda_speed": lambda_speed,
            "lambda_energy": lambda_energy,
            "annealing": annealing,
            "annealing_fraction": 1.0,
        }
        checked = {
            "lambda_mean_init": lambda_mean_init,
            "annealing_epochs": annealing_epochs,
            "exploration_lambda_mean": exploration_lambda_mean,
            "exploration_lambda_energy": exploration_lambda_energy,
            "equilibrium_lambda_mean": equilibrium_lambda_mean,
        }
        for name, value in checked.items():
            _check_weight(name, value)
        self.settings = validated(LossSettings, values)
        self.target_value, self.annealing_epochs = target_value, annealing_epochs
        self.variance_weighted, self.equilibrium_lambda_mean = variance_weighted, equilibrium_lambda_mean
        self.exploration_lambda_mean = exploration_lambda_mean
        self.exploration_lambda_energy = exploration_lambda_energy
        self.is_exploration: bool | None = None
        self._phase_lambda_mean: float | None = None

    def set_exploration_phase(self, is_exploration: bool, *, lambda_mean: float | None = None) -> None:
        """Enter a phase of a cycle.

        Args:
            lambda_mean: the phase's own weight, such as the scheduler's `phase_info["lambda_mean"]`; None is the one
                given at construction, by default the balanced preset's.
        """
        if lambda_mean is not None:
            _check_weight("lambda_mean", lambda_mean)
        self.is_exploration, self._phase_lambda_mean = is_exploration, lambda_mean

    def lambda_mean(self, epoch: float) -> float:
        """Weight of the mean loss."""
        if self.is_exploration is None:
            return annealed(self.settings, epoch, self.annealing_epochs)
        own = self.exploration_lambda_mean if self.is_exploration else self.equilibrium_lambda_mean
        return own if self._phase_lambda_mean is None else self._phase_lambda_mean

    @property
    def lambda_energy(self) -> float:
        """Weight of the energy loss."""
        return self.exploration_lambda_energy if self.is_exploration else self.settings.lambda_energy

    def forward(
        self,
        predictions: Tensor,
        targets: Tensor,
        trajectory: Mapping[str, Any] | None = None,
        epoch: float = 0,
        learned_mu: Tensor | float | None = None,
    ) -> dict[str, Tensor]:
        """All losses, each a 0-dim tensor.

        Args:
            predictions: of the targets' shape for float targets (mean squared error); logits (..., V) for integer
                targets (...,) (cross-entropy; -100 is ignored, in every loss).
            trajectory: x and v, (B, T+1, D) of the regression model, or a list of one (B, S, T+1, D) a layer of the
                language model, and there mu (L, D). None: no losses but the task's.
            epoch: counted from 0.
            learned_mu: (D,), (L, D) or a number; None takes the trajectory's mu, else target_value.

        Returns:
            total = L_task + L_mean + L_speed + L_energy; these four; task, mean, speed, energy without their weights;
            lambda_mean and lambda_energy, the weights that were used.
        """
        task, valid = _task_loss(predictions, targets)
        weights = {"mean": self.lambda_mean(epoch), "speed": self.settings.lambda_speed, "energy": self.lambda_energy}
        mu = self.target_value if learned_mu is None else learned_mu
        if learned_mu is None and trajectory is not None:
            mu = trajectory.get("mu", mu)
        terms = self._terms(trajectory, mu, valid) if trajectory is not None and len(trajectory["x"]) else {}
        losses = {"task": task} | {name: terms.get(name, task.new_zeros(())) for name in weights}
        parts = {"L_task": task} | {f"L_{name}": weight * losses[name] for name, weight in weights.items()}
        used = {f"lambda_{name}": torch.tensor(weights[name]) for name in ("mean", "energy")}
        return {"total": torch.stack(list(parts.values())).sum(), **parts, **losses, **used}

    def _terms(self, trajectory: Mapping[str, Any], mu: Tensor | float, valid: Tensor | None) -> dict[str, Tensor]:
        """mean, speed and energy, without their weights."""
        states, velocities = _by_layer(trajectory["x"]), _by_layer(trajectory["v"])
        shape, dim = states[0].shape[:2], states[0].shape[-1]
        places = torch.as_tensor(mu, dtype=states[0].dtype, device=states[0].device).expand(len(states), dim)
        layers = [_summary(*layer) for layer in zip(states, velocities, places, strict=True)]
        mask = states[0].new_ones(shape) if valid is None else valid.to(states[0].dtype).reshape(shape)
        count = mask.sum().clamp(min=1)
        moments = state_moments(layers, mask)
        return {
            "mean": mean_loss_share(moments, moments.detach(), count, count, places, self.variance_weighted),
            "speed": token_term(layers, "speed", mask, count),
            "energy": token_term(layers, "energy", mask, count),
        }


def _check_weight(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name} {value}: must be a finite number of at least 0")


def _task_loss(predictions: Tensor, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    """Mean squared error or cross-entropy, and a mask of the targets that count (None: all)."""
    if targets.is_floating_point():
        if predictions.shape != targets.shape and predictions.squeeze(-1).shape != targets.squeeze(-1).shape:
            raise ValueError(
                f"predictions {tuple(predictions.shape)} and float targets {tuple(targets.shape)} must have one shape"
            )
        return F.mse_loss(predictions, targets.reshape(predictions.shape)), None
    if predictions.shape[:-1] != targets.shape or predictions.shape[-1] == 1:
        raise ValueError(
            f"integer targets {tuple(targets.shape)} are classes and need logits {(*targets.shape, 'V')}, got "
            f"{tuple(predictions.shape)}; for a regression convert the targets with .float()"
        )
    valid = targets != IGNORED
    total = F.cross_entropy(
        predictions.flatten(0, -2).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
    )
    return total / valid.sum().clamp(min=1), valid


def _by_layer(value: Any) -> list[Tensor]:
    """A tensor (B, S, T+1, D) for each layer; a regression's (B, T+1, D) is one layer with S = 1."""
    if isinstance(value, list):
        return value
    return [value.unsqueeze(1) if value.dim() == 3 else value]


def _summary(x: Tensor, v: Tensor, mu: Tensor) -> IntegratorOutput:
    """A layer's trajectory (B, S, T+1, D) as the output that the integrator itself would have given in training."""
    weights = x.new_tensor(speed_weights(x.shape[-2] - 1))
    speed = ((x[..., 1:, :] - mu).abs().mean(-1) * weights).sum(-1)
    energy = v[..., 1:, :].square().mean((-1, -2))
    return IntegratorOutput(x[..., -1, :], v[..., -1, :], x.shape[-2] - 1, speed=speed, energy=energy)
