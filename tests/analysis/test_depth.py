"""What is said of a stream's steps, against its equation in numpy and the model's own tensors."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner, Result

from inl_cli.app import app
from inl_core.model import IntegratorLanguageModel
from inl_core.training.depth import place_name
from inl_core.training.dynamics import headline, record_layers
from inl_core.training.records import write_record
from tests.inference.tiny import tiny_model, write_checkpoint

STREAMS: dict[str, tuple[str, dict[str, Any]]] = {
    "v5": ("v5", {}),
    "dynamic alpha": ("v5", {"stream": {"dynamic_alpha": True}}),
    "transport": ("transformer", {"transport": True}),
    "transport after attention": (
        "v5",
        {"transport": "attention", "stream": {"dynamic_alpha": False, "excitation": {"sparsity": 0.25}}},
    ),
    "momentum": ("v5", {"transport": False, "stream": {"anchor": False, "equilibrium": False, "excitation": None}}),
}
IDS = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
FORCES, MOVEMENTS = ["momentum", "candidate", "pull", "excitation"], ["velocity", "transport", "anchor"]
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1], [0] * 9])
PLACES = ["layer 0 attention", "layer 0 feed-forward", "layer 1 attention", "layer 1 feed-forward"]


def vector(parameter: torch.Tensor | None) -> np.ndarray:
    return np.zeros(32) if parameter is None else parameter.detach().double().numpy()


def rms(values: np.ndarray) -> np.ndarray:
    return np.sqrt((values**2).mean(-1))


@torch.no_grad()
def by_the_equation(model: IntegratorLanguageModel) -> dict[tuple[str, str], np.ndarray]:
    """Shares, states, velocities and residuals of every token, from the candidates that the sub-layers give."""
    candidates: list[np.ndarray] = []
    keep = lambda _, inputs, output: candidates.append(output.double().numpy())  # noqa: E731
    parts = [part for block in model.blocks for part in (block.attention, block.feed_forward)]
    hooks = [part.register_forward_hook(keep) for part in parts]
    model(IDS, document_ids=DOCUMENTS)
    for hook in hooks:
        hook.remove()
    start, amplitude = model.embedding(IDS)[0].double().numpy(), float(model.excitation_amplitude)
    follows = np.zeros((2, 9, 1))
    follows[:, 1:, 0] = DOCUMENTS[:, 1:] == DOCUMENTS[:, :-1]
    shift = lambda v: follows * np.roll(v, 1, axis=1)  # noqa: E731
    x, v, found = start + vector(model.entry.transport) * shift(start), start, {}
    steps = [step for block in model.blocks for step in (block.step_attention, block.step_feed_forward)]
    for t, (place, step, c) in enumerate(zip(PLACES, steps, candidates, strict=True), 1):
        mu, excitation = vector(step.mu), step.excitation
        wake = 1 - np.exp(-step.kappa * rms(x - mu)[..., None]) if step.kappa else 1.0
        forces = {"momentum": wake * vector(step.alpha) * v, "candidate": c, "pull": vector(step.beta) * (mu - x)}
        wave = np.zeros(32)
        if excitation:
            excited = excitation.excited.tolist()
            wave[excited] = amplitude * np.sin(vector(excitation.gamma) * t + vector(excitation.phi))
        forces["excitation"] = np.broadcast_to(wave, x.shape)
        v = sum(forces.values())
        moves = {"velocity": v, "transport": vector(step.transport) * shift(v), "anchor": vector(step.anchor) * start}
        for kind, terms in (("force", forces), ("movement", moves)):
            total = sum(rms(term) for term in terms.values())
            found |= {(place, f"{kind}_{name}"): rms(term) / total for name, term in terms.items()}
        moved = sum(moves.values())
        x = x + moved
        found |= {(place, "state"): rms(x), (place, "velocity"): rms(v), (place, "residual"): rms(moved)}
        if step.alpha is not None:
            found[place, "alpha"] = np.broadcast_to(wake * vector(step.alpha), x.shape)
    return found


@pytest.mark.parametrize("name", STREAMS)
def test_shares_and_motion_are_those_of_the_equation(name: str) -> None:
    preset, changes = STREAMS[name]
    model = tiny_model(preset, **changes)
    rows = {(place_name(row), row["quantity"]): row for row in record_layers(model, IDS, document_ids=DOCUMENTS)}
    for key, values in by_the_equation(model).items():
        if "_" in key[1] and not values.any():  # a term that is off
            assert key not in rows
        elif key in rows:
            wanted = {"mean": values.mean(), "min": values.min(), "max": values.max(), "p50": np.percentile(values, 50)}
            assert {part: rows[key][part] for part in wanted} == pytest.approx(wanted, rel=1e-3, abs=1e-5), key
        else:
            assert (values == 1).all(), key  # the only term of its sum
    for place in PLACES:
        for kind in ("force", "movement"):
            means = [row["mean"] for (where, what), row in rows.items() if where == place and what.startswith(kind)]
            assert sum(means) == pytest.approx(1.0) or not means


@pytest.mark.parametrize("name", ["v5", "transport", "transport after attention"])
def test_the_learned_vectors_are_the_models(name: str) -> None:
    preset, changes = STREAMS[name]
    model = tiny_model(preset, **changes)
    rows = {(place_name(row), row["quantity"]): row for row in record_layers(model, IDS)}
    steps = dict(zip(PLACES, model.steps(), strict=True))
    learned = {(place, key.split(".")[-1]): value for place in PLACES for key, value in steps[place].named_parameters()}
    learned["embedding", "transport"] = model.entry.transport
    for key, value in learned.items():
        values = value.detach().numpy()
        wanted = {"mean": values.mean(), "std": values.std(), "p5": np.percentile(values, 5), "max": values.max()}
        assert {part: rows[key][part] for part in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-6), key
        if key[1] == "mu":
            assert rows[key]["drift"] == pytest.approx(rms(values), rel=1e-5)


def test_a_record_names_sub_layers_and_its_headline_is_the_mean_over_them(tmp_path: Path) -> None:
    rows = record_layers(tiny_model("v5"), IDS)
    write_record(tmp_path, 4, rows)
    table = pq.read_table(tmp_path / "dynamics" / "step-00000004.parquet").to_pandas()
    assert set(table["sub_layer"]) == {"embedding", "attention", "feed-forward"}
    assert table["layer"].isna().sum() == 1  # the embedding
    means = table.groupby("quantity")["mean"].mean()
    wanted = {"alpha_mean": means["alpha"], "transport_mean": means["transport"], "state_rms": means["state"]}
    wanted |= {"velocity_rms": means["velocity"], "force_pull": means["force_pull"]}
    assert {name: headline(rows)[name] for name in wanted} == pytest.approx(wanted)


@pytest.fixture
def inspected(workplace: Path, tmp_path: Path) -> Callable[..., Result]:
    """inspected(name of a stream, option, ...) -> what `inl inspect-params` prints of a checkpoint of it."""

    def run(name: str, *options: str) -> Result:
        preset, changes = STREAMS[name]
        write_checkpoint(tmp_path / name, preset, data=workplace / "data" / "tiny", **changes)
        return CliRunner().invoke(app, ["inspect-params", str(tmp_path / name), "--max-tokens", "320", *options])

    return run


def columns_below(text: str, title: str) -> list[str]:
    """The columns of the table whose title's line begins so, without those that have no name."""
    lines = text.splitlines()
    [row] = [row for row, line in enumerate(lines) if line.startswith(title)]
    return lines[row + 1].split()


def test_inspect_params_shows_every_sub_layer(inspected: Callable[..., Result]) -> None:
    printed, data = inspected("v5"), json.loads(inspected("v5", "--json").stdout)
    assert printed.exit_code == 0, printed.output
    for title in ("alpha, momentum", "b, transport", "r, anchor", "beta, the pull", "mu, the", "gamma, radians a step"):
        assert f"\n{title}" in printed.stdout
    assert "\nperiods and half-lives in steps" in printed.stdout
    assert columns_below(printed.stdout, "what makes the velocity") == FORCES
    assert columns_below(printed.stdout, "what moves the state") == MOVEMENTS
    assert all(f"\n{place} " in printed.stdout for place in ["embedding", *PLACES])
    mu = next(row for row in data["layers"] if row["quantity"] == "mu")
    assert f"{mu['mean']:.4f}" in printed.stdout
    assert data["amplitude"] == pytest.approx(0.03)
    rows = list(csv.DictReader(io.StringIO(inspected("v5", "--csv").stdout)))
    assert [float(row["mean"]) for row in rows] == [row["mean"] for row in data["layers"]]
    assert {row["layer"] for row in rows} == {"", "0", "1"}


def test_a_term_that_a_sub_layer_lacks_is_a_dash(inspected: Callable[..., Result]) -> None:
    printed = inspected("transport after attention")
    assert printed.exit_code == 0, printed.output
    shares = printed.stdout[printed.stdout.index("\nwhat moves the state: shares") :]
    [line] = [line for line in shares.splitlines() if line.startswith("layer 0 feed-forward")]
    assert "-" in line.split()[-3:]


def test_of_a_transformer_with_transport_only_the_transport_is_learned(inspected: Callable[..., Result]) -> None:
    printed, data = inspected("transport").stdout, json.loads(inspected("transport", "--json").stdout)
    assert "b, transport" in printed
    assert not any(title in printed for title in ("alpha", "beta", "gamma", "what makes the velocity"))
    assert data["amplitude"] is None
    measured = {"state", "velocity", "residual", "movement_velocity", "movement_transport"}
    assert {row["quantity"] for row in data["layers"]} == {"transport", *measured}
