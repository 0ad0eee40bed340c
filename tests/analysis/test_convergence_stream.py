"""The report on a stream: its figures against numpy on whole trajectories, and against models that lack a term."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner, Result

from inl_cli.app import app
from inl_core.analysis.convergence.collect import trace_stream
from inl_core.analysis.convergence.iterations import measure_iterations, num_passes, passed_over, without
from inl_core.analysis.convergence.sample import TokenSample
from inl_core.corpus.loader import IGNORED
from inl_core.inference.evaluate import evaluate
from inl_core.model import IntegratorLanguageModel, Options
from tests.analysis.test_convergence_collect import arrays, load, middle, windows
from tests.analysis.test_convergence_statistics import slow_metrics
from tests.analysis.test_depth import DOCUMENTS, FORCES, IDS, MOVEMENTS, PLACES, STREAMS, columns_below, rms
from tests.inference.tiny import tiny_model, write_checkpoint

TERMS = ["transport", "momentum", "anchor", "equilibrium", "excitation"]
WITHOUT: dict[str, dict[str, Any]] = {
    "transport": {"transport": False},
    **{term: {"stream": {term: False}} for term in ("momentum", "anchor", "equilibrium")},
    "excitation": {"stream": {"excitation": None}},
}


def model_of(name: str) -> IntegratorLanguageModel:
    preset, changes = STREAMS[name]
    return tiny_model(preset, **changes)


@torch.no_grad()
def whole_path(model: IntegratorLanguageModel, workplace: Path) -> tuple[np.ndarray, np.ndarray]:
    """States and velocities of all scored tokens, (T+1, N, D)."""
    parts = []
    for batch in windows(load(workplace, "v4")):
        path = model(**arrays(batch), options=Options(keep_trajectory=True)).layers[0].trajectory
        assert path is not None
        scored = torch.from_numpy(batch.targets != IGNORED)
        parts.append([values[:, scored].double().numpy() for values in (path.states, path.velocities)])
    states, velocities = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    return states, velocities


@pytest.mark.parametrize("name", ["v5", "transport"])
def test_the_statistics_equal_a_slow_reference(workplace: Path, name: str) -> None:
    model = model_of(name)
    statistics = trace_stream(model, windows(load(workplace, "v4")), epsilon=0.4)
    rows, (states, velocities) = statistics.rows(), whole_path(model, workplace)
    assert statistics.num_tokens == states.shape[1]
    steps = model.steps()
    for t, row in enumerate(rows):
        assert row["used"]
        assert row["state_rms"]["p50"] == pytest.approx(middle(rms(states[t])), rel=0.01)
        assert row["energy"]["mean"] == pytest.approx((velocities[t] ** 2).mean(), rel=1e-4)
        assert row["displacement"]["p95"] == pytest.approx(middle(rms(states[t] - states[0]), 95), rel=0.01)
        assert row["distance_end"]["mean"] == pytest.approx(rms(states[t] - states[-1]).mean(), rel=1e-4)
        targets = {"against_end": np.broadcast_to(states[-1], states.shape)}
        if name == "v5":
            mus = np.stack([step.mu.detach().double().numpy() for step in (steps[0], *steps)])[:, None]
            targets["against_mu"] = np.broadcast_to(mus, states.shape)
            assert row["distance_mu"]["mean"] == pytest.approx(rms(states[t] - mus[t]).mean(), rel=1e-4)
        for key, target in targets.items():
            wanted = slow_metrics(states[: t + 1, :40], target[: t + 1, :40], 0.4)
            few = trace_of_few(model, states[:, :40], velocities[:, :40])
            assert list(few[t][key].values()) == pytest.approx(wanted, rel=1e-4, abs=1e-5), (key, t)
        if t:
            place = PLACES[t - 1].removeprefix("layer ").split(" ", 1)
            assert [str(row["layer"]), row["sub_layer"]] == place
            moved = states[t] - states[t - 1]
            assert row["residual"]["p5"] == pytest.approx(middle(rms(moved), 5), rel=0.01)
            if name == "v5":
                wave = 0.03 * torch.sin(steps[t - 1].excitation.gamma * t + steps[t - 1].excitation.phi)
                unforced = rms(moved - wave.detach().double().numpy())
                assert row["unforced_residual"]["p50"] == pytest.approx(middle(unforced), rel=0.01)
            assert row["transport"]["mean"] == pytest.approx(steps[t - 1].transport.mean().item(), abs=1e-6)
    assert ("force_momentum" in rows[1], "distance_mu" in rows[0], "alpha" in rows[1]) == (name == "v5",) * 3
    moves = np.diff(states, axis=0)
    turns, paths = (moves[1:] * moves[:-1] < 0).sum(0), np.abs(moves).sum(0)
    assert statistics.num_turns(len(steps)) == pytest.approx((turns * paths).sum() / paths.sum(), rel=1e-4)


def trace_of_few(model: IntegratorLanguageModel, states: np.ndarray, velocities: np.ndarray) -> list[dict[str, Any]]:
    """The rows for a few tokens, whose trajectories are handed over."""
    from inl_core.analysis.convergence.stream_statistics import StreamStatistics
    from inl_core.model import Trajectory

    statistics, zero = StreamStatistics(model, 0.4), torch.zeros(states[1:].shape)
    path = Trajectory(torch.tensor(states).float(), torch.tensor(velocities).float(), zero, zero, zero, zero)
    with torch.no_grad():
        statistics.add(path)
    return statistics.rows()


@torch.no_grad()
@pytest.mark.parametrize("term", TERMS)
def test_without_a_term_the_model_is_one_that_never_had_it(term: str) -> None:
    model, other = model_of("v5"), tiny_model("v5", **WITHOUT[term])
    other.load_state_dict(model.state_dict(), strict=False)
    plain = model(IDS, document_ids=DOCUMENTS).hidden
    with without(model, term):
        found = model(IDS, document_ids=DOCUMENTS).hidden
    torch.testing.assert_close(found, other(IDS, document_ids=DOCUMENTS).hidden, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(IDS, document_ids=DOCUMENTS).hidden, plain)


@torch.no_grad()
def test_a_step_that_is_passed_over_hands_on_what_it_was_given() -> None:
    model = model_of("v5")
    plain = model(IDS).hidden
    with passed_over(model.steps()[2]):
        output = model(IDS, options=Options(keep_trajectory=True))
    path = output.layers[0].trajectory
    assert path is not None
    assert torch.equal(path.states[3], path.states[2])
    assert torch.equal(path.velocities[3], path.velocities[2])
    assert not torch.equal(path.states[2], path.states[1])
    assert torch.equal(model(IDS).hidden, plain)


@pytest.mark.parametrize("name", ["v5", "transport"])
def test_bits_per_byte_are_what_eval_says(workplace: Path, name: str) -> None:
    loaded, model = load(workplace, "v4"), model_of(name)
    table, passes = loaded.tokenizer.token_num_bytes, []
    report = measure_iterations(model, lambda: windows(loaded), table, done=lambda: passes.append(1))
    assert len(passes) == num_passes(model)
    own = evaluate(model, windows(loaded), table).bits_per_byte
    assert report.bits_per_byte == pytest.approx(own, rel=1e-6)
    assert (report.by_iterations, report.without_layer) == ([], [])
    assert [row["step"] for row in report.without_step] == [1, 2, 3, 4]
    assert [row["term"] for row in report.without_term] == list(model.config.stream_terms)
    with passed_over(model.steps()[1]):
        wanted = evaluate(model, windows(loaded), table).bits_per_byte
    assert report.without_step[1]["bits_per_byte"] == pytest.approx(wanted, rel=1e-6)
    assert report.without_step[1]["change"] == pytest.approx(wanted - own, abs=1e-6)


def test_the_sample_holds_the_whole_depth(workplace: Path) -> None:
    loaded, model = load(workplace, "v4"), model_of("v5")
    sample = TokenSample(loaded.tokenizer, size=10, num_tokens=300)
    trace_stream(model, windows(loaded), epsilon=0.4, sample=sample)
    table, (states, velocities) = sample.table().to_pandas(), whole_path(model, workplace)
    assert len(table) == 10 * 5
    for row in table.to_dict("records"):
        n, t = row["token_index"], row["iteration"]
        assert row["state_rms"] == pytest.approx(rms(states[t, n]), rel=1e-4)
        assert row["portrait_velocity"] == pytest.approx(velocities[t, n][[0, 8, 16, 24]], rel=1e-4, abs=1e-5)


@pytest.fixture
def reported(workplace: Path, tmp_path: Path) -> Callable[..., Result]:
    """reported(name of a stream, option, ...) -> what `inl convergence-report` prints of a checkpoint of it."""

    def run(name: str, *options: str) -> Result:
        preset, changes = STREAMS[name]
        write_checkpoint(tmp_path / name, preset, data=workplace / "data" / "tiny", **changes)
        output = ("--output", str(tmp_path / "report"), "--tokens", "160", "--sample-tokens", "8")
        return CliRunner().invoke(app, ["convergence-report", str(tmp_path / name), *output, *options])

    return run


@pytest.mark.parametrize("name", ["v5", "transport"])
def test_the_report_is_written_and_printed(reported: Callable[..., Result], tmp_path: Path, name: str) -> None:
    result = reported(name)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    text = (tmp_path / "report" / "report.md").read_text()
    [layer] = summary["layers"]
    assert summary["terms"] == (TERMS if name == "v5" else ["transport"])
    assert (summary["num_iterations"], len(layer["iterations"])) == (4, 5)
    assert f"all steps: the states {layer['verdict']['word']}" in result.stdout
    assert layer["verdict"]["reason"] in text
    for place in PLACES:
        assert f"\n{place} " in result.stdout
        assert f"| {place} |" in text
    titles = {"what makes the velocity": FORCES, "what moves the state": MOVEMENTS}
    for title, columns in list(titles.items())[name == "transport" :]:
        wanted = [term for term in columns if name == "v5" or term != "anchor"]
        assert columns_below(result.stdout, title) == wanted
        below = text.index(f"## {title[0].upper()}{title[1:]}")
        assert f"| t |  | {' | '.join(wanted)} |\n" in text[below : below + 200]
    assert ("what makes the velocity" in result.stdout) == (name == "v5")
    figures = {"residual", "distance", "coefficients", "shares", "transport", "bits_per_byte", "portrait"}
    assert {path.stem for path in (tmp_path / "report").glob("*.png")} == figures
    assert all(f"]({figure}.png)" in text for figure in figures)
    table = pq.read_table(tmp_path / "report" / "coefficients.parquet").to_pandas()
    assert len(table) == 5 * 32
    model = model_of(name)
    assert table[table["step"] == 3]["transport"].to_numpy() == pytest.approx(model.steps()[2].transport.tolist())
    assert table[table["step"] == 0]["transport"].to_numpy() == pytest.approx(model.entry.transport.tolist())
    assert table["mu"].notna().sum() == (4 * 32 if name == "v5" else 0)


def test_momentum_alone_is_reported_too(reported: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # figures take seconds
    result = reported("momentum", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["layers"][0]["iterations"]
    assert rows[1]["force_momentum"]["mean"] + rows[1]["force_candidate"]["mean"] == pytest.approx(1.0)
    assert not any("movement" in name or "mu" in name for name in rows[1])


def test_what_a_step_lacks_is_null(
    reported: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = reported("transport after attention")
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "report" / "summary.json").read_text())["layers"][0]["iterations"]
    assert [row["movement_transport"]["mean"] is None for row in rows] == [True, False, True, False, True]
    table = pq.read_table(tmp_path / "report" / "coefficients.parquet").to_pandas()
    assert table.groupby("step")["transport"].count().tolist() == [32, 32, 0, 32, 0]
    excited = table[(table["step"] == 1) & table["gamma"].notna()]["channel"]
    assert excited.tolist() == model_of("transport after attention").steps()[0].excitation.excited.tolist()


def test_a_stream_is_followed_whole(reported: Callable[..., Result]) -> None:
    result = reported("v5", "--iterations", "9")
    assert result.exit_code == 2
    assert "iterations 9: this model is one system of 4 steps" in result.stderr
