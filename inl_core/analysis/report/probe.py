"""What a model does with every token of a text: its loss, the terms of each step, and its coefficients.

- The terms are those by which a step changes what it moves. Of a stream that is the state,
  x' - x = alpha v + c + beta (mu - x) + A sin + b shift(v') + r x_0; of an integrator the velocity,
  v' = alpha v + (1 - alpha) c + beta (mu - x) + A sin, and its figures are means over the layer's iterations.
- A term's share is its length over the sum of all terms' lengths, for one token. What it adds along the movement is the
  projection on the sum of all terms, over that sum's length: it can be negative, and adds up to 1.
- No token stops early here, but where its iterations are counted. A budget's last part of a step counts as a whole one.
- Legend: B batch, S sequence, N scored tokens, D d_model, T iterations, P places.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from inl_core.analysis.convergence.collect import model_inputs
from inl_core.corpus.loader import IGNORED, Batch
from inl_core.inference.loading import LoadedModel
from inl_core.inference.texts import Text
from inl_core.model import Integrator, IntegratorLanguageModel, Options, Trajectory
from inl_core.training.depth import forces, movements, place_name, places, shares

_ELEMENTS = 2**22
"""About how many numbers one tensor of the trajectories may have."""
NUM_PATHS = 12
"""Tokens whose states are kept."""
GAINS = ("alpha", "beta", "gate")

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Probe:
    """The tokens of a text in their order, and what happens at each place of the model."""

    places: list[str]
    """The steps of a stream, or the layers."""
    is_stream: bool
    token_ids: np.ndarray
    """(N,)"""
    target_ids: np.ndarray
    """(N,) the tokens to predict."""
    positions: np.ndarray
    """(N,) from the start of the window, or of the document in it."""
    loss: np.ndarray
    """(N,) nats."""
    terms: dict[str, np.ndarray]
    """Share of each term, (P, N); NaN where a place has no such term. Empty for a plain Transformer."""
    along: dict[str, np.ndarray]
    """What each term adds along the movement, over all tokens, (P,)."""
    gains: dict[str, np.ndarray]
    """Of integrators alone, of each token (P, N): alpha, beta, gate, means over dimensions and iterations; and the
    iterations that it takes, where tokens may stop early."""
    path_tokens: list[int]
    """Which of the tokens have their states kept."""
    paths: list[np.ndarray]
    """Their states (T+1, number, D), of each layer, or of the stream as a whole."""


@torch.inference_mode()
def probe(loaded: LoadedModel, text: Text, *, max_tokens: int, window: int) -> Probe:
    """Look at the first `max_tokens` scored tokens of a text."""
    model = loaded.model
    width = model.config.d_model * (2 * model.config.num_layers + 1) * window
    rows = max(1, min(16, _ELEMENTS // width))
    collected = _Collected(model)
    for batch in text.windows(window=window, batch_size=rows, max_tokens=max_tokens):
        collected.add(batch)
    return collected.probe()


def integrator_terms(layer: Integrator, path: Trajectory, amplitude: Tensor) -> Iterator[Terms]:
    """The terms whose sum is v_{t+1}, of each iteration, each (..., D)."""
    mu, forcing = layer.equilibrium(), layer.excitation(len(path.alpha), amplitude)
    for t, x in enumerate(path.states[:-1]):
        alpha, beta = path.alpha[t], path.beta[t]
        found = {"momentum": alpha * path.velocities[t]}
        if path.candidate is not None:
            found["candidate"] = (1 - alpha) * path.candidate[t]
        found |= {"pull": beta * (mu - x), "excitation": forcing[t].expand_as(x)}
        yield found


def stream_terms(model: IntegratorLanguageModel, path: Trajectory) -> Iterator[Terms]:
    """The terms whose sum is x_{t+1} - x_t, of each step, each (..., D)."""
    for t, step in enumerate(model.steps()):
        moves = movements(step, path, t)
        del moves["velocity"]  # its own terms stand in its place
        yield forces(step, path, t, model.excitation_amplitude) | moves


class _Collected:
    """The parts of a probe, batch by batch."""

    def __init__(self, model: IntegratorLanguageModel) -> None:
        self.model, self.is_stream = model, model.config.integrator is None
        layers = model.config.num_layers
        self.places = (
            [place_name(p) for p in places(layers)] if self.is_stream else [f"layer {n}" for n in range(layers)]
        )
        self.tokens: dict[str, list[np.ndarray]] = {name: [] for name in ("ids", "targets", "positions", "loss")}
        self.measured: dict[tuple[str, str, int], list[Tensor]] = {}
        self.projections: dict[tuple[str, int], Tensor] = {}
        self.path_tokens: list[int] = []
        self.paths: list[np.ndarray] = []

    def add(self, batch: Batch) -> None:
        inputs = model_inputs(batch, self.model.embedding.table.weight.device)
        output = self.model(**inputs, options=Options(keep_trajectory=True, early_stopping=False))
        scored = torch.from_numpy(batch.targets != IGNORED)
        if not scored.any():
            return
        targets = torch.from_numpy(batch.targets)[scored]
        hidden = output.hidden[scored.to(output.hidden.device)]
        loss = F.cross_entropy(self.model.logits(hidden), targets.to(hidden.device), reduction="none")
        positions = np.broadcast_to(np.arange(batch.tokens.shape[1]), batch.tokens.shape)
        positions = positions if batch.positions is None else batch.positions
        chosen = scored.numpy()
        for name, values in (("ids", batch.tokens), ("targets", batch.targets), ("positions", positions)):
            self.tokens[name].append(values[chosen])
        self.tokens["loss"].append(loss.cpu().numpy())
        paths = [layer.trajectory for layer in output.layers if layer.trajectory is not None]
        self._add_terms(paths, scored.to(hidden.device))
        self._add_iterations(inputs, scored.to(hidden.device))
        if not self.paths:
            self._keep_paths(paths, scored[0])

    def _add_terms(self, paths: list[Trajectory], scored: Tensor) -> None:
        if self.is_stream:
            for place, terms in enumerate(stream_terms(self.model, paths[0])):
                self._add_shares(place, [terms], scored)
            return
        for place, (layer, path) in enumerate(zip(self.model.integrators(), paths, strict=True)):
            iterations = list(integrator_terms(layer, path, self.model.excitation_amplitude))
            self._add_shares(place, iterations, scored)
            for name in GAINS:
                values = getattr(path, name)[:, scored].mean((0, -1))
                self.measured.setdefault(("gain", name, place), []).append(values.float().cpu())

    def _add_shares(self, place: int, iterations: list[Terms], scored: Tensor) -> None:
        kept = [{name: term[scored] for name, term in terms.items()} for terms in iterations]
        found = [shares(terms) for terms in kept]
        for name in kept[0]:
            mean = torch.stack([own[name] for own in found]).mean(0)
            self.measured.setdefault(("term", name, place), []).append(mean.float().cpu())
            along = torch.stack([(terms[name] * sum(terms.values())).double().sum() for terms in kept]).sum().cpu()
            self.projections[name, place] = self.projections.get((name, place), torch.zeros(())) + along

    def _add_iterations(self, inputs: dict[str, Any], scored: Tensor) -> None:
        """How many iterations each token takes when it may stop early, as it does in use."""
        integrator = self.model.config.integrator
        if integrator is None or not integrator.early_stopping.convergence_threshold:
            return
        for place, layer in enumerate(self.model(**inputs).layers):
            if layer.iterations is not None:
                own = layer.iterations[scored].float().cpu()
                self.measured.setdefault(("gain", "iterations used", place), []).append(own)

    def _keep_paths(self, paths: list[Trajectory], scored: Tensor) -> None:
        """The states of evenly spaced tokens of the first window."""
        columns = scored.nonzero().squeeze(-1)
        kept = sorted({int(index) for index in np.linspace(0, len(columns) - 1, min(NUM_PATHS, len(columns)))})
        self.path_tokens = kept
        self.paths = [path.states[:, 0, columns[kept].to(path.states.device)].float().cpu().numpy() for path in paths]

    def probe(self) -> Probe:
        """All that was added."""
        terms = self._stacked("term")
        terms = terms if len(terms) > 1 else {}  # the share of a single term is 1
        joined = {name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in self.tokens.items()}
        return Probe(
            self.places,
            self.is_stream,
            joined["ids"],
            joined["targets"],
            joined["positions"],
            joined["loss"],
            terms,
            self._along() if terms else {},
            self._stacked("gain"),
            self.path_tokens,
            self.paths,
        )

    def _stacked(self, kind: str) -> dict[str, np.ndarray]:
        names = dict.fromkeys(name for own, name, _ in self.measured if own == kind)
        size = sum(len(part) for part in self.tokens["loss"])
        found = {name: np.full((len(self.places), size), np.nan, np.float32) for name in names}
        for (own, name, place), parts in self.measured.items():
            if own == kind:
                found[name][place] = torch.cat(parts).numpy()
        return found

    def _along(self) -> dict[str, np.ndarray]:
        names = dict.fromkeys(name for name, _ in self.projections)
        table = np.array(
            [[float(self.projections.get((name, n), 0.0)) for n in range(len(self.places))] for name in names]
        )
        return dict(zip(names, table / table.sum(0), strict=True)) if len(table) else {}
