"""What iterating is worth: bits per byte at T = 0, 1, 2, ..., without single layers, and under early stopping.

- A stream has no T to choose: bits per byte without single steps.
- Of every model: bits per byte without single terms of its equation.
- At T = 0 every integrator is skipped: s_T = s_0 and v_T = v_0, so it moves nothing. In v4 the feed-forward acts only
  through the integrator, as its candidate velocity, and is skipped with it.
- All figures are measured on the same batches, so that differences are paired; their standard error is over batches.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from inl_core.analysis.convergence.collect import hooked
from inl_core.corpus.loader import IGNORED, Batch
from inl_core.errors import ArtefactError
from inl_core.inference.evaluate import evaluate
from inl_core.model import Integrator, IntegratorLanguageModel, IntegratorOutput
from inl_core.model.dynamics import Drive
from inl_core.model.mixture import MixedDrive
from inl_core.model.stream import Step
from inl_core.recipe import ModelConfig
from inl_core.training.depth import places

MOST_POINTS = 12
"""Points of the curve over T beside 0 and the model's own T."""


@dataclass(frozen=True)
class Score:
    """Bits and bytes of text, batch by batch; NaN where the tokenizer does not tell the bytes."""

    bits: np.ndarray
    num_bytes: np.ndarray

    @property
    def bits_per_byte(self) -> float:
        """Of the whole text; NaN when it has no bytes."""
        total = self.num_bytes.sum()
        return float(self.bits.sum() / total) if total else math.nan

    def change_from(self, other: "Score") -> dict[str, float | None]:
        """Bits per byte more than `other` on the same batches, and the standard error of that (None for one batch)."""
        difference, count = self.bits - other.bits, len(self.bits)
        change = self.bits_per_byte - other.bits_per_byte
        if count < 2:
            return {"change": change, "standard_error": None}
        # A ratio of sums: its error is that of the residuals difference - change * bytes (linearised).
        residuals = difference - change * self.num_bytes
        error = math.sqrt(count / (count - 1) * float((residuals**2).sum())) / float(self.num_bytes.sum())
        return {"change": change, "standard_error": error}


def score(
    model: IntegratorLanguageModel,
    batches: Iterable[Batch],
    token_num_bytes: np.ndarray,
    *,
    num_iterations: int | None = None,
    early_stopping: bool = False,
) -> Score:
    """Score a text; `num_iterations` None is the model's own."""
    bits, sizes = [], []
    for batch in batches:
        if not batch.num_targets:
            continue
        settings: dict[str, Any] = {"num_iterations": num_iterations, "early_stopping": early_stopping}
        found = evaluate(model, [batch], token_num_bytes, **settings)
        size = math.nan if found.bytes is None else found.bytes
        bits.append(found.bits_per_byte * size if found.bits_per_byte is not None else 0.0)
        sizes.append(size)
    if not bits:
        raise ArtefactError("evaluation: the text holds no target token; give it more text")
    return Score(np.array(bits), np.array(sizes, dtype=np.float64))


@contextmanager
def skipped(model: IntegratorLanguageModel, layers: Iterable[int] | None = None) -> Iterator[None]:
    """While open, the integrators of `layers` (None is all) hand on the state and velocity they were given."""

    def skip(_: Integrator, args: tuple, kwargs: dict[str, Any], output: IntegratorOutput) -> IntegratorOutput:
        _, state, velocity = args
        return replace(output, state=state, velocity=velocity)

    with hooked(model, lambda layer: skip, layers):
        yield


@contextmanager
def passed_over(step: Step) -> Iterator[None]:
    """While open, a step of a stream hands on the state and velocity it was given: its sub-layer moves nothing."""
    handle = step.register_forward_hook(lambda _, inputs, output: inputs[:2])
    try:
        yield
    finally:
        handle.remove()


def terms(config: ModelConfig) -> tuple[str, ...]:
    """The terms that `without` can leave out. The candidate is not among them: without it nothing is left."""
    if config.integrator is None:
        return config.stream_terms
    return ("momentum", "equilibrium", *(("excitation",) if config.excites else ()))


_VECTORS = {"momentum": "alpha", "transport": "transport", "anchor": "anchor", "equilibrium": "beta"}
_GROUPS = {"momentum": 0, "equilibrium": 1}  # of a controller's outputs: a, from which alpha comes, and b, for beta
_NOTHING = -200.0  # of which sigmoid and softplus are exactly 0 in float32, whatever the controller adds to it


@contextmanager
@torch.no_grad()
def without(model: IntegratorLanguageModel, term: str) -> Iterator[None]:
    """While open, one of the model's `terms` is 0 in all steps and layers, and everything else as it is."""
    if model.config.integrator is not None and term in _GROUPS:

        def silence(_: nn.Module, args: tuple) -> tuple:
            return (_silenced(args[0], _GROUPS[term]), *args[1:])

        handles = [layer.dynamics.register_forward_pre_hook(silence) for layer in model.integrators()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        return
    named = (*model.named_parameters(), ("excitation", model.excitation_amplitude))
    ending = _VECTORS.get(term, term)
    found = [tensor for name, tensor in named if name.split(".")[-1] == ending]
    kept = [tensor.clone() for tensor in found]
    try:
        for tensor in found:
            tensor.zero_()
        yield
    finally:
        for tensor, value in zip(found, kept, strict=True):
            tensor.copy_(value)


def _silenced(drive: Drive | MixedDrive, group: int) -> Drive | MixedDrive:
    """A drive whose steps have alpha = 0, or beta = 0."""
    if isinstance(drive, MixedDrive):
        return drive._replace(drives=[own for each in drive.drives if isinstance(own := _silenced(each, group), Drive)])
    bias, dim = drive.bias.clone(), len(drive.mu)
    bias[group * dim : (group + 1) * dim] = _NOTHING
    return drive._replace(bias=bias)


def iteration_counts(num_iterations: int) -> list[int]:
    """0, 1, ... 2T. For a large T about MOST_POINTS of these, evenly spaced, with 0, 1 and T always among them."""
    every = max(1, -(-2 * num_iterations // MOST_POINTS))
    return sorted({0, 1, num_iterations, *range(every, 2 * num_iterations + 1, every)})


@dataclass(frozen=True)
class IterationReport:
    """Scores by T and without layers; every change is against the model as it is, without early stopping."""

    bits_per_byte: float
    """The model as it is."""
    by_iterations: list[dict[str, Any]]
    """iterations, bits_per_byte, change, standard_error."""
    without_layer: list[dict[str, Any]]
    """layer, bits_per_byte, change, standard_error."""
    without_step: list[dict[str, Any]] = field(default_factory=list)
    """Of a stream: step, layer, sub_layer, bits_per_byte, change, standard_error."""
    without_term: list[dict[str, Any]] = field(default_factory=list)
    """Without one of the model's `terms`: term, bits_per_byte, change, standard_error."""


def measure_iterations(
    model: IntegratorLanguageModel,
    windows: Callable[[], Iterable[Batch]],
    token_num_bytes: np.ndarray,
    *,
    done: Callable[[], None] = lambda: None,
) -> IterationReport:
    """Score a text; each call of `windows` begins it anew, and `done` is called after each pass over it."""
    own, integrator = score(model, windows(), token_num_bytes), model.config.integrator
    done()

    def row(name: str, key: int | str, found: Score) -> dict[str, Any]:
        done()
        return {name: key, "bits_per_byte": found.bits_per_byte, **found.change_from(own)}

    without_step, without_term = [], []
    for term in terms(model.config):
        with without(model, term):
            without_term.append(row("term", term, score(model, windows(), token_num_bytes)))
    if integrator is None:
        for number, (place, step) in enumerate(zip(places(model.config.num_layers), model.steps(), strict=True), 1):
            with passed_over(step):
                without_step.append({**place, **row("step", number, score(model, windows(), token_num_bytes))})
        return IterationReport(own.bits_per_byte, [], [], without_step, without_term)

    by_iterations, without_layer = [], []
    for count in iteration_counts(integrator.num_iterations):
        if count == 0:
            with skipped(model):
                found = score(model, windows(), token_num_bytes)
        elif count == integrator.num_iterations and integrator.budget.strategy == "uniform":
            found = own
        else:
            found = score(model, windows(), token_num_bytes, num_iterations=count)
        by_iterations.append(row("iterations", count, found))
    for layer in range(len(model.integrators())):
        with skipped(model, [layer]):
            without_layer.append(row("layer", layer, score(model, windows(), token_num_bytes)))
    return IterationReport(own.bits_per_byte, by_iterations, without_layer, [], without_term)


def num_passes(model: IntegratorLanguageModel) -> int:
    """How often `measure_iterations` calls `done`."""
    num_terms = len(terms(model.config))
    if model.config.integrator is None:
        return 1 + len(model.steps()) + num_terms
    return 1 + num_terms + len(iteration_counts(model.config.num_iterations)) + len(model.integrators())


@dataclass(frozen=True)
class StoppingReport:
    """What early stopping, as configured, does on the text."""

    convergence_threshold: float
    bits_per_byte: float
    change: float
    """Bits per byte more than with all iterations."""
    standard_error: float | None
    tokens_by_iterations: list[list[int]]
    """For each layer, how many tokens used 0, 1, ... T iterations."""


def measure_stopping(
    model: IntegratorLanguageModel,
    windows: Callable[[], Iterable[Batch]],
    token_num_bytes: np.ndarray,
) -> StoppingReport | None:
    """Iterations used and their price under the configured early stopping; None where it is off."""
    integrator = model.config.integrator
    if integrator is None or not integrator.early_stopping.convergence_threshold:
        return None
    counts = [Counter[int]() for _ in model.integrators()]
    scored = torch.empty(0)  # of the batch that is running

    def watched() -> Iterator[Batch]:
        nonlocal scored
        for batch in windows():
            scored = torch.from_numpy(batch.targets != IGNORED)
            yield batch

    def hook_of(layer: int) -> Callable[..., None]:
        def count(_: Integrator, args: tuple, kwargs: dict[str, Any], output: IntegratorOutput) -> None:
            assert output.iterations is not None
            counts[layer].update(output.iterations.cpu()[scored].tolist())

        return count

    with hooked(model, hook_of):
        stopped = score(model, watched(), token_num_bytes, early_stopping=True)
    change = stopped.change_from(score(model, windows(), token_num_bytes))
    most = max(max(used, default=0) for used in counts)
    return StoppingReport(
        convergence_threshold=integrator.early_stopping.convergence_threshold,
        bits_per_byte=stopped.bits_per_byte,
        change=change["change"] or 0.0,
        standard_error=change["standard_error"],
        tokens_by_iterations=[[used[t] for t in range(most + 1)] for used in counts],
    )
