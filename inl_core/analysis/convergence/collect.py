"""Trajectories of every layer on real text, window by window.

- Each layer's dynamics are followed for more iterations than the model uses, to see where they lead. The next layer
  still gets what the model itself computes.
- A hook on each integrator runs the longer path, so only one layer's path is in memory at a time. All tokens go into
  the layer's statistics, and those of a sample are kept whole.
- A stream is followed as it is: it ends where the model ends.
- Legend: B batch, S sequence, N scored tokens of a batch, D d_model, T iterations followed.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from inl_core.analysis.convergence.layer_statistics import LayerStatistics, PathStatistics
from inl_core.analysis.convergence.sample import TokenSample
from inl_core.analysis.convergence.stream_statistics import StreamStatistics
from inl_core.corpus.loader import IGNORED, Batch
from inl_core.model import Integrator, IntegratorLanguageModel, IntegratorOutput, Options, Trajectory


@torch.inference_mode()
def trace(
    model: IntegratorLanguageModel,
    batches: Iterable[Batch],
    *,
    num_iterations: int,
    epsilon: float,
    sample: TokenSample | None = None,
) -> Sequence[PathStatistics]:
    """Follow every layer, or the stream, on the scored tokens of `batches`; the model must be in evaluation mode.

    Early stopping is off here; what it does is measured by iterations.py.
    """
    if model.config.integrator is None:
        stream = trace_stream(model, batches, epsilon=epsilon, sample=sample)
        return [stream] if stream.num_tokens else []
    statistics: dict[int, LayerStatistics] = {}
    device = model.embedding.table.weight.device
    scored, kept = torch.empty(0), None  # of the batch that is running

    def receive(index: int, layer: Integrator, used: int, amplitude: Tensor, path: Trajectory) -> None:
        path = _tokens(path, scored)
        if index not in statistics:
            statistics[index] = LayerStatistics(num_iterations, used, epsilon)
        mu, forcing = layer.equilibrium(), layer.excitation(num_iterations, amplitude)
        measures = statistics[index].add(path, mu, forcing, layer.dynamics.stride)
        if sample and kept is not None:
            sample.add(index, used, kept, path, mu, measures)

    with _followed(model, num_iterations, receive):
        for batch in batches:
            scored = torch.from_numpy(batch.targets != IGNORED).to(device)  # (B, S)
            if scored.any():
                kept = sample.choose(batch) if sample else None
                model(**model_inputs(batch, device), options=Options(early_stopping=False))
    return [statistics[index] for index in sorted(statistics)]


@torch.inference_mode()
def trace_stream(
    model: IntegratorLanguageModel, batches: Iterable[Batch], *, epsilon: float, sample: TokenSample | None = None
) -> StreamStatistics:
    """Follow the stream of a model without integrators, all 2L steps of it, on the scored tokens of `batches`."""
    statistics, device = StreamStatistics(model, epsilon), model.embedding.table.weight.device
    mu = torch.zeros((), device=device) if statistics.mu is None else statistics.mu
    for batch in batches:
        scored = torch.from_numpy(batch.targets != IGNORED).to(device)
        if not scored.any():
            continue
        output = model(**model_inputs(batch, device), options=Options(keep_trajectory=True))
        path = output.layers[0].trajectory
        assert path is not None
        path = _tokens(path, scored)
        measures = statistics.add(path)
        if sample:
            sample.add(0, statistics.used_iterations, sample.choose(batch), path, mu, measures)
    return statistics


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
