"""What a worker repeats: a model with its training step, prefill or generation, and where its parts are."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from inl_core.analysis.bench.parts import part
from inl_core.analysis.bench.settings import BenchSettings
from inl_core.recipe import TrainingSettings
from inl_core.training.optimizers import Optimizers


@dataclass
class Work:
    """One candidate, ready to run."""

    run: Callable[[], None]
    """One repetition: an optimizer step, a prefill, a generation."""
    model: nn.Module
    parts: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Modules and the parts they are; none inside another."""
    functions: list[tuple[Any, str, str]] = field(default_factory=list)
    """(owner, attribute, part) of work that is no module's own."""

    @property
    def num_parameters(self) -> int:
        """All parameters, a tied one once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def compile_parts(self) -> None:
        """Compile attention, integrator and feed-forward each by itself, and nothing else.

        In one compiled graph the parts are fused and cannot be told apart; this is the nearest program in which they
        can.
        """
        for module in self.model.modules():
            module._compiled_call_impl = None
        for module, name in self.parts:
            if name in ("attention", "integrator", "feed-forward"):
                module.compile()


class TokenSource:
    """Random token ids, new at every call; the speed of a step does not depend on them."""

    def __init__(self, settings: BenchSettings, vocab_size: int) -> None:
        self.generator = np.random.default_rng(settings.seed)
        self.vocab_size = vocab_size

    def rows(self, rows: int, length: int) -> np.ndarray:
        """(rows, length) int64."""
        return self.generator.integers(0, self.vocab_size, (rows, length))


def update(model: nn.Module, optimizers: Optimizers, settings: TrainingSettings) -> None:
    """What follows the backward pass of every candidate: clip, step, drop the gradients."""
    with part("optimizer"):
        clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizers.step()
        optimizers.zero_grad()


def autocast(settings: BenchSettings) -> torch.autocast:
    """bfloat16 where asked for."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.bf16)
