"""AdamW with decay groups, or Muon for the blocks' matrices with AdamW for the rest.

- Only matrices decay. Norms, biases, mu, gamma, phi, gains and modulations are positions and scales, for which zero
  means nothing.
- The coefficients of the stream (model/stream.py) learn faster, by the recipe's factor.
- The matrices are what fsdp divides among processes (parallel.py); all else is small, and each process has it whole.
- Learning rates are set from outside at every step (schedules.py); `initial_lr` holds each group's peak.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import Optimizer

from inl_core.model.stream import stream_parameters
from inl_core.recipe import OptimizerSettings
from inl_core.training.muon import Muon


@dataclass(frozen=True)
class Assignment:
    """Which parameters one group holds, for the plan."""

    optimizer: str
    group: str
    num_tensors: int
    num_parameters: int


FLOAT32_BYTES = 4
_MOMENTS = {"adamw": 2, "muon": 1}


@dataclass(frozen=True)
class States:
    """Bytes of what stays in memory from the first step to the last, of a whole model."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer

    @property
    def checkpoint(self) -> int:
        """What a checkpoint holds: weights and optimizer."""
        return self.weights + self.optimizer


class Optimizers:
    """One or two torch optimizers, which are always used together."""

    def __init__(self, parts: list[Optimizer]) -> None:
        self.parts = parts

    @property
    def assignments(self) -> list[Assignment]:
        """The groups of parameters, in the order of the optimizers."""
        return [
            Assignment(
                type(part).__name__.lower(),
                group["label"],
                len(group["params"]),
                sum(parameter.numel() for parameter in group["params"]),
            )
            for part in self.parts
            for group in part.param_groups
        ]

    def set_learning_rate_factor(self, factor: float) -> float:
        """Set every group to `factor` times its peak; the first group's rate comes back, for the log."""
        for optimizer in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor
        return self.parts[-1].param_groups[0]["lr"]

    def step(self) -> None:
        """One update."""
        for optimizer in self.parts:
            optimizer.step()

    @property
    def can_skip(self) -> bool:
        """Whether every part can skip an update on the device: fused AdamW, and Muon."""
        return all(isinstance(part, Muon) or part.defaults.get("fused") for part in self.parts)

    def skip_while(self, flag: torch.Tensor) -> None:
        """From here on, skip each update at which `flag`, a float tensor () on the device, is 1."""
        for part in self.parts:
            part.found_inf = flag  # type: ignore[attr-defined]  # what torch's own gradient scaler sets

    def moments(self) -> dict[str, torch.Tensor]:
        """What the optimizers remember of past gradients, named by kind and parameter."""
        return {
            f"{kind} of {name}": value
            for part in self.parts
            for group in part.param_groups
            for name, parameter in zip(group["param_names"], group["params"], strict=True)
            for kind, value in part.state.get(parameter, {}).items()
            if isinstance(value, torch.Tensor)
        }

    def forget(self) -> None:
        """Drop all moments and step counts, as if no step had been taken."""
        for optimizer in self.parts:
            optimizer.state.clear()

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for optimizer in self.parts:
            optimizer.zero_grad(set_to_none=True)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a matrix that is multiplied with, not a vector or a table of scales."""
    return parameter.dim() == 2 and "modulation" not in name


def build_optimizers(model: nn.Module, settings: OptimizerSettings, device: torch.device) -> Optimizers:
    """Split the parameters into groups and build their optimizers (fused AdamW where torch has it: CPU and CUDA)."""
    muon, decay, plain, stream = [], [], [], []
    of_stream = stream_parameters(model)
    for name, parameter in model.named_parameters():
        if parameter in of_stream:
            stream.append((name, parameter))
        elif settings.name == "muon" and is_matrix(name, parameter) and name.startswith("blocks."):
            muon.append((name, parameter))
        elif is_matrix(name, parameter):
            decay.append((name, parameter))
        else:
            plain.append((name, parameter))

    def group(label: str, members: list[tuple[str, nn.Parameter]], weight_decay: float, rate: float) -> list[dict]:
        """A group of the members, if there are any."""
        entry = {"params": members, "label": label, "weight_decay": weight_decay, "lr": rate, "initial_lr": rate}
        return [entry] if members else []

    parts: list[Optimizer] = []
    if muon:
        # match_rms_adamw scales the orthogonal update to AdamW's size, so AdamW's learning rate and decay carry over.
        rate = settings.muon_learning_rate or settings.learning_rate
        groups = group("matrices of the blocks", muon, settings.weight_decay, rate)
        parts.append(Muon(groups, adjust_lr_fn="match_rms_adamw"))
    groups = group("with decay", decay, settings.weight_decay, settings.learning_rate)
    groups += group("without decay", plain, 0.0, settings.learning_rate)
    groups += group("vectors of the steps", stream, 0.0, settings.learning_rate * settings.stream_rate_factor)
    fused = device.type in ("cpu", "cuda")
    parts.append(torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, fused=fused))
    return Optimizers(parts)


def count_states(model: nn.Module, settings: OptimizerSettings) -> States:
    """The weights, gradients and optimizer state of a model, which may be on the meta device."""
    weights = FLOAT32_BYTES * sum(parameter.numel() for parameter in model.parameters())
    entries = build_optimizers(model, settings, torch.device("meta")).assignments
    moments = sum(_MOMENTS[entry.optimizer] * entry.num_parameters for entry in entries)
    return States(weights, weights, FLOAT32_BYTES * moments)
