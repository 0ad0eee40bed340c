"""What a report says of every token: its terms are those of the model's own steps, its figures those of a slow look."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from inl_cli.app import app
from inl_core.analysis.report.convergence import convergence_findings
from inl_core.analysis.report.examination import examine
from inl_core.analysis.report.forces import term_findings
from inl_core.analysis.report.jacobians import measure_reactions
from inl_core.analysis.report.paths import principal_plane
from inl_core.analysis.report.probe import Probe, integrator_terms, probe, stream_terms
from inl_core.analysis.report.tokens import token_kind
from inl_core.inference.evaluate import evaluate
from inl_core.inference.loading import load_model
from inl_core.inference.texts import open_split
from inl_core.model import Options
from tests.analysis.report_runs import browse, inside, needs_chromium
from tests.inference.tiny import tiny_model

IDS = torch.arange(24).view(2, 12)
TRANSPORT, WHOLE_STEPS = {"transport": True}, {"integrator": {"budget": {"strategy": "uniform"}}}


@torch.no_grad()
@pytest.mark.parametrize(
    ("preset", "changes"), [("v5", {}), ("transformer", TRANSPORT), ("v3", WHOLE_STEPS), ("v4", {})]
)
def test_the_terms_add_up_to_what_the_step_does(preset: str, changes: dict[str, Any]) -> None:
    model = tiny_model(preset, **changes)
    output = model(IDS, options=Options(keep_trajectory=True, early_stopping=False))
    paths = [layer.trajectory for layer in output.layers]
    if model.config.integrator is None:
        for t, terms in enumerate(stream_terms(model, paths[0])):
            moved = paths[0].states[t + 1] - paths[0].states[t]
            torch.testing.assert_close(sum(terms.values()), moved, rtol=1e-4, atol=1e-5)
        return
    for layer, path in zip(model.integrators(), paths, strict=True):
        for t, terms in enumerate(integrator_terms(layer, path, model.excitation_amplitude)):
            torch.testing.assert_close(sum(terms.values()), path.velocities[t + 1], rtol=1e-4, atol=1e-5)


@pytest.fixture
def v4(workplace: Path) -> tuple[Probe, Any]:
    loaded = load_model(workplace / "runs" / "v4" / "checkpoints" / "step-00000007")
    text = open_split(loaded)
    return probe(loaded, text, max_tokens=150, window=32), (loaded, text)


def test_losses_are_those_of_an_evaluation_and_shares_add_up(v4: tuple[Probe, Any]) -> None:
    found, (loaded, text) = v4
    table = text.byte_counts(150).token_num_bytes
    wanted = evaluate(loaded.model, text.windows(window=32, max_tokens=150), table, early_stopping=False)
    assert len(found.loss) == wanted.tokens
    assert found.loss.mean() == pytest.approx(wanted.loss, rel=1e-4)
    np.testing.assert_allclose(sum(found.terms.values()), 1, rtol=1e-4)
    np.testing.assert_allclose(sum(found.along.values()), 1, rtol=1e-4)


@torch.no_grad()
def test_the_iterations_of_a_text_that_stops_early_are_those_of_the_model(workplace: Path) -> None:
    loaded = load_model(workplace / "runs" / "v3" / "checkpoints" / "step-00000007")
    text = open_split(loaded)
    found = probe(loaded, text, max_tokens=150, window=32).gains["iterations used"]
    wanted = evaluate(loaded.model, text.windows(window=32, max_tokens=150), text.byte_counts(150).token_num_bytes)
    assert found.mean() == pytest.approx(wanted.iterations, rel=1e-5)


def test_the_plane_keeps_the_distances_of_states_that_lie_in_one() -> None:
    generator = np.random.default_rng(0)
    inside = generator.normal(size=(5, 4, 2))
    axes = np.linalg.qr(generator.normal(size=(16, 2)))[0].T
    plane, explained = principal_plane(inside @ axes + 3)
    assert explained == pytest.approx(1)
    for a, b in ((0, 3), (1, 2)):
        wanted = np.linalg.norm(inside[a] - inside[b], axis=-1)
        np.testing.assert_allclose(np.linalg.norm(plane[a] - plane[b], axis=-1), wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (" the", "word begins"),
        ("Class", "word begins"),
        ("ing", "word goes on"),
        ("\n\n", "line end"),
        ("  ", "space"),
        ("3.14", "number"),
        (" 12", "number"),
        ("():", "punctuation"),
        ("...", "punctuation"),
        ("_x", "other"),
    ],
)
def test_tokens_are_told_apart_by_their_text(text: str, kind: str) -> None:
    assert token_kind(text) == kind
    assert token_kind(text, is_special=True) == "special"


def told(change: float, error: float | None, term: str = "equilibrium") -> str:
    row = {"term": term, "change": change, "standard_error": error, "bits_per_byte": 2 + change}
    thresholds = {"ignored_change": 0.001}
    summary = {"bits_per_byte": {"bits_per_byte": 2.0, "without_term": [row]}, "thresholds": thresholds}
    pull = {"pull": np.full((1, 4), 0.3)}
    found = Probe(["layer 0"], False, *[np.zeros(4)] * 4, pull, {}, {}, [], [])
    return next(term_findings("a", found, summary)).sentence


def test_a_term_that_changes_nothing_is_said_to_do_nothing_and_the_opposite_as_clearly() -> None:
    assert told(0.0015, 0.0001).startswith("a: the equilibrium does nothing here: without it (beta = 0)")
    assert told(0.0025, 0.0001).startswith(
        "a: the equilibrium works: without it (beta = 0) bits per byte rise by +0.0025"
    )
    assert told(-0.0025, 0.0001).startswith("a: the equilibrium does harm here")
    assert "too close to tell" in told(0.0025, 0.002)
    assert "too close to tell" in told(0.0001, 0.004)  # 0.1% of 2 bits per byte is 0.002, and this may be more
    assert "its share of what makes the velocity is 30%" in told(0.5, 0.1)
    assert all("cannot be told" in told(change, None) for change in (0.0001, 0.5, -0.5))  # a single batch


def test_iterations_that_score_best_elsewhere_are_named() -> None:
    rows = [{"iterations": t, "bits_per_byte": bits, "change": bits - 2} for t, bits in ((0, 3.0), (2, 2.0), (4, 1.9))]
    layer = {"layer": 0, "verdict": {"word": "drift", "reason": "why"}, "beyond": None}
    bits = {"bits_per_byte": 2.0, "by_iterations": rows, "without_step": [], "without_layer": []}
    summary = {
        "layers": [layer],
        "terms": [],
        "bits_per_byte": bits,
        "thresholds": {"ignored_change": 0.001},
        "num_iterations": 2,
    }
    *_, finding = convergence_findings("a", summary)
    assert finding.sentence == "a: bits per byte are lowest with T = 4 (-0.1000), not at the trained 2."


def test_the_verdicts_of_many_layers_are_one_sentence() -> None:
    words = (("drift", "converge"), ("ignored", "converge"), ("drift", "converge"))
    layers = [{"layer": n, "verdict": {"word": a}, "beyond": {"word": b}} for n, (a, b) in enumerate(words)]
    bits = {"bits_per_byte": 2.0, "by_iterations": [], "without_step": [], "without_layer": []}
    summary = {"layers": layers, "bits_per_byte": bits, "thresholds": {"ignored_change": 0.001}, "num_iterations": 2}
    [finding] = convergence_findings("a", summary)
    assert finding.sentence == (
        "a: within T the states drift in layers 0, 2 and are ignored in layer 1; beyond T, which the model does not "
        "run, they would converge in every layer."
    )


@torch.no_grad()
def test_a_plain_transformer_has_losses_and_no_shares(workplace: Path) -> None:
    loaded = load_model(workplace / "runs" / "transformer" / "checkpoints" / "step-00000007")
    found = probe(loaded, open_split(loaded), max_tokens=60, window=32)
    assert (len(found.loss), found.terms, found.along, found.gains) == (60, {}, {}, {})


@needs_chromium
@pytest.mark.parametrize(
    "preset", ["v5", "v4", *(pytest.param(name, marks=pytest.mark.slow) for name in ("v3", "transformer"))]
)
def test_a_run_with_a_checkpoint_is_examined_and_drawn(
    workplace: Path, tmp_path: Path, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    path = tmp_path / "report.html"
    result = CliRunner().invoke(
        app, ["report", f"runs/{preset}", "--output", str(path), "--tokens", "160", "--json", "--quiet"]
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    parts = {part["key"]: part for section in report["sections"] for part in section["parts"]}
    assert preset == "transformer" or any("the equilibrium" in finding["sentence"] for finding in report["findings"])
    assert {finding["part"] for finding in report["findings"]} <= parts.keys()
    text = parts[f"{preset}-text"]
    bits, loss = (text["columns"].index(name) for name in ("bits", "loss"))
    assert all(row[bits] == pytest.approx(row[loss] / math.log(2), rel=1e-5) for row in text["rows"])
    document, log = browse(path, tmp_path / "profile")
    assert 'data-drawn="yes"' in document, log
    assert "CONSOLE" not in log, log


@torch.no_grad()
def test_a_model_whose_numbers_are_not_finite_is_said_to_be_that(workplace: Path) -> None:
    loaded = load_model(workplace / "runs" / "v5" / "checkpoints" / "step-00000007")
    loaded.model.embedding.table.weight.fill_(torch.nan)
    assert measure_reactions(loaded.model, open_split(loaded)) == []
    found = examine("a", loaded, open_split(loaded), max_tokens=60)
    (finding,) = found.findings
    assert "losses that are not finite" in finding.sentence
    assert found.parts == []


@needs_chromium
@pytest.mark.parametrize("preset", ["v5", pytest.param("v4", marks=pytest.mark.slow)])
def test_the_page_of_the_parameters_is_drawn(
    workplace: Path, tmp_path: Path, preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(workplace)
    path = tmp_path / "parameters.html"
    result = CliRunner().invoke(app, ["inspect-params", f"runs/{preset}", "--output", str(path), "--quiet", "--json"])
    assert result.exit_code == 0, result.output
    mu = next(row for row in json.loads(result.stdout)["layers"] if row["quantity"] == "mu")
    page = path.read_text(encoding="utf-8")
    shown = next(part for part in inside(page, "numbers")["sections"][0]["parts"] if part["key"] == "quantity-mu")
    assert shown["rows"][0][shown["columns"].index("mean")] == pytest.approx(mu["mean"], rel=1e-5)
    document, log = browse(path, tmp_path / "profile")
    assert 'data-drawn="yes"' in document, log
    assert "CONSOLE" not in log, log
