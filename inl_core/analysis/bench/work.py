"""What a worker repeats, as far as it is the same for every candidate: random tokens, a prefill, an optimizer step."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from inl_core.analysis.bench.parts import Timed, part
from inl_core.analysis.bench.settings import BenchSettings
from inl_core.recipe import TrainingSettings
from inl_core.training.optimizers import build_optimizers


@dataclass
class Work:
    """One candidate, ready to run."""

    run: Callable[[], None]
    """One repetition: an optimizer step, a prefill, a generation."""
    model: nn.Module
    timed: list[Timed]
    """The modules and functions whose time counts to a part; none calls another of them."""

    @property
    def num_parameters(self) -> int:
        """All parameters, a tied one once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def compile_parts(self) -> None:
        """Compile attention, integrator and feed-forward each by itself, and nothing else.

        A compiler fuses the parts of a larger graph, so their times could not be told apart. This is the nearest
        program in which they can.
        """
        for module in self.model.modules():
            module._compiled_call_impl = None
        for owner, attribute, name in self.timed:
            if attribute == "forward" and name in ("attention", "integrator", "feed-forward"):
                owner.compile()


def random_rows(settings: BenchSettings, vocab_size: int) -> Callable[[int], np.ndarray]:
    """A function of a length S that gives new random token ids (B, S), int64: speed does not depend on the ids."""
    generator = np.random.default_rng(settings.seed)
    return lambda length: generator.integers(0, vocab_size, (settings.batch_size, length))


def on_random_prompts(settings: BenchSettings, vocab_size: int, use: Callable[[Tensor], Any]) -> Callable[[], None]:
    """A repetition that hands `use` random token ids (B, S), without gradients: a prefill, or a decoding of prompts."""
    draw = random_rows(settings, vocab_size)
    length = settings.prompt_tokens if settings.task == "decode" else settings.sequence_length

    @torch.inference_mode()
    def run() -> None:
        with part("data"):
            ids = torch.from_numpy(draw(length)).to(settings.device)
        with autocast(settings):
            use(ids)

    return run


def optimizer_step(
    model: nn.Module, training: TrainingSettings, settings: BenchSettings, differentiate: Callable[[], Any]
) -> Callable[[], None]:
    """A repetition of training: `differentiate` leaves gradients; clipping and the optimizers follow."""
    optimizers = build_optimizers(model, training.optimizer, torch.device(settings.device))

    def run() -> None:
        differentiate()
        with part("optimizer"):
            clip_grad_norm_(model.parameters(), training.gradient_clip)
            optimizers.step()
            optimizers.zero_grad()

    return run


def autocast(settings: BenchSettings) -> torch.autocast:
    """bfloat16 where asked for."""
    return torch.autocast(settings.device, torch.bfloat16, enabled=settings.bf16)
