"""`inl inspect-params`: learned values against the tensors, measured values against a trajectory."""

import io
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner, Result

from inl_cli.app import app
from inl_cli.parameters_view import bars
from inl_core.analysis.parameters import ParameterReport, report_parameters
from inl_core.analysis.report.learned import parameter_findings
from inl_core.inference.loading import load_model
from inl_core.inference.texts import open_split, open_text
from inl_core.model import Options
from inl_core.recipe.load import load_recipe
from tests.inference.tiny import TEXT, write_checkpoint


def report(workplace: Path, preset: str) -> ParameterReport:
    loaded = load_model(workplace / "runs" / preset / "checkpoints" / "step-00000007")
    return report_parameters(loaded, open_split(loaded), max_tokens=320)


@pytest.mark.parametrize("preset", ["v3", "v4"])
@torch.no_grad()
def test_figures_equal_the_tensors_and_a_trajectory(workplace: Path, preset: str) -> None:
    found = report(workplace, preset)
    loaded = load_model(workplace / "runs" / preset / "checkpoints" / "step-00000007")
    batch = next(open_split(loaded).windows(window=32, batch_size=10))
    extra = {
        name: None if (array := getattr(batch, name)) is None else torch.from_numpy(array)
        for name in ("positions", "document_ids")
    }
    options = Options(keep_trajectory=True, early_stopping=False)
    output = loaded.model(torch.from_numpy(batch.tokens), options=options, **extra)
    assert found.tokens == 320
    for index, block in enumerate(loaded.model.blocks):
        rows = {row["quantity"]: row for row in found.layers if row["layer"] == index}
        mu, gamma = block.integrator.equilibrium().numpy(), block.integrator.excitation.gamma.numpy()  # type: ignore
        values = {name: getattr(output.layers[index].trajectory, name).numpy() for name in ("alpha", "beta", "gate")}
        values |= {"mu": mu, "gamma": gamma, "period": 2 * math.pi / np.abs(gamma)}
        for name, array in values.items():
            wanted = {"mean": array.mean(), "std": array.std(), "min": array.min(), "max": array.max()}
            wanted |= {f"p{p}": np.percentile(array, p) for p in (5, 50, 95)}
            assert {key: rows[name][key] for key in wanted} == pytest.approx(wanted, rel=1e-4, abs=1e-5), name
        assert rows["mu"]["drift"] == pytest.approx(np.sqrt((mu**2).mean()), rel=1e-5)  # both presets start mu at 0
        outside = (values["gate"] < 0.01) | (values["gate"] > 0.99)
        assert rows["gate"]["saturated"] == pytest.approx(outside.mean(), abs=1e-6)


def test_a_text_shorter_than_a_window_is_measured_without_padding(workplace: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("fox")
    loaded = load_model(workplace / "runs" / "v4" / "checkpoints" / "step-00000007")
    text = open_text(loaded, tmp_path / "a.txt")
    assert report_parameters(loaded, text).tokens == text.num_targets < 32


@pytest.fixture
def inl(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(workplace)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def test_tables_json_and_csv_hold_the_same_figures(inl: Callable[..., Result], workplace: Path) -> None:
    rows = report(workplace, "v4").layers
    arguments = ("inspect-params", "--max-tokens", "320")
    data = json.loads(inl(*arguments, "--json").stdout)
    assert data["layers"] == json.loads(json.dumps(rows))
    assert data["text"].endswith("data/tiny, validation split")
    table = pd.read_csv(io.StringIO(inl(*arguments, "--csv").stdout))
    assert list(table["quantity"]) == [row["quantity"] for row in rows]
    assert list(table["mean"]) == pytest.approx([row["mean"] for row in rows])
    printed = inl(*arguments)
    assert printed.exit_code == 0
    for title in (
        "parameters",
        "mu, the learned",
        "gamma, radians",
        "phi, radians",
        "alpha, beta, gate",
        "rms velocity",
    ):
        assert title in printed.stdout
    assert "half-life of alpha" in printed.stdout
    assert "variance of the coefficients" in printed.stdout
    alpha = next(row for row in rows if row["quantity"] == "alpha")
    assert sum(alpha["histogram"]) == 320 * 32 * 2  # tokens, channels, iterations
    assert bars(alpha["histogram"]) in printed.stdout
    assert f"{alpha['mean']:.4f}" in printed.stdout
    assert f"{alpha['saturated']:.1%}" in printed.stdout


@pytest.mark.parametrize("preset", ["v4", "v5"])
def test_what_is_not_finite_is_a_dash(
    inl: Callable[..., Result], workplace: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    found = report(workplace, preset)
    for row in found.layers:
        row |= dict.fromkeys(row.keys() & {"mean", "saturated"}, math.nan)
    monkeypatch.setattr("inl_core.analysis.parameters.report_parameters", lambda *given, **options: found)
    result = inl("inspect-params", f"runs/{preset}")
    assert result.exit_code == 0, result.output
    assert "nan" not in result.stdout
    assert " - " in result.stdout


def test_a_transformer_has_no_integrator_and_says_so(inl: Callable[..., Result]) -> None:
    result = inl("inspect-params", "runs/transformer")
    assert result.exit_code == 0
    assert "no integrator" in result.stdout
    assert "attention" in result.stdout
    data = json.loads(inl("inspect-params", "runs/transformer", "--json").stdout)
    assert (data["layers"], data["amplitude"]) == ([], None)
    assert data["parameters"]["feed-forward"] > 0


@pytest.mark.parametrize("preset", ["v4", "v5"])
def test_another_checkpoint_is_compared_by_value(inl: Callable[..., Result], workplace: Path, preset: str) -> None:
    path = workplace / "runs" / preset / "checkpoints" / "step-00000007"
    loaded, other = load_model(path), load_model(path)
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            if name.endswith((".gamma", "alpha", "embedding.table.weight")):
                parameter.add_(0.25)
    found = report_parameters(loaded, open_split(loaded), max_tokens=320, against=other)
    assert [row["against"] for row in found.of("gamma")] == pytest.approx([0.25] * len(found.of("gamma")), rel=1e-5)
    assert {row["against"] for row in found.of("phi")} == {0}
    assert all(row["against"] > 0 for row in found.of("alpha"))
    changes = {one.part: one.distance for one in found.since_other}
    assert changes["embedding"] == pytest.approx(0.25 * loaded.model.embedding.table.weight.numel() ** 0.5, rel=1e-5)
    assert changes["attention"] == 0
    same = json.loads(inl("inspect-params", f"runs/{preset}", "--against", f"runs/{preset}", "--json").stdout)
    assert {row["against"] for row in same["layers"] if "against" in row} == {0}
    assert "distance from the other" in inl("inspect-params", f"runs/{preset}", "--against", f"runs/{preset}").stdout
    refused = inl("inspect-params", f"runs/{preset}", "--against", "runs/transformer")
    assert refused.exit_code == 4
    assert "cannot be compared" in refused.output


@pytest.mark.parametrize("preset", ["v1", "v3", "v4", "v5", "transformer"])
def test_what_a_preset_does_not_have_is_absent(inl: Callable[..., Result], preset: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", preset)
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    data = json.loads(inl("inspect-params", str(tmp_path / "run"), "--text", str(tmp_path / "a.txt"), "--json").stdout)
    values = [value for row in data["layers"] for key, value in row.items() if key != "layer"]
    assert None not in values  # NaN would be null
    columns = {row["quantity"]: set(row) for row in data["layers"] if "mean" in row}
    assert ("variance_tokens" in columns.get("alpha", ())) == (preset in ("v1", "v3", "v4"))
    assert ("half_life" in columns) == (preset != "transformer")
    assert {one["part"] for one in data["since_start"]} >= {"embedding", "attention", "all"}


def test_another_text_can_be_measured(inl: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    result = inl("inspect-params", "--text", str(tmp_path / "a.txt"))
    assert f"tokens of {tmp_path / 'a.txt'}" in result.stdout
    assert inl("inspect-params", "--csv", "--json").exit_code == 2


def test_the_findings_say_what_is_used_what_is_dead_and_what_cannot_be_told() -> None:
    def said(**means: float) -> str:
        """What is found of two sub-layers of a stream in which these quantities have these means."""
        rows = [
            {"layer": 0, "sub_layer": part, "quantity": name, "mean": mean, "std": 0.5}
            for part in ("attention", "feed-forward")
            for name, mean in means.items()
        ]
        return "\n".join(f"{text}." for text, _ in parameter_findings(ParameterReport({}, None, "a text", 1, rows)))

    found = said(force_momentum=0.3, force_candidate=0.695, force_pull=0.005)
    assert "over all steps, what makes the velocity is 30% momentum." in found
    assert "the pull does nothing: its share of what makes the velocity is 0.5%" in found
    assert "candidate" not in found
    lost = said(force_momentum=math.nan, force_pull=0.2)
    assert "not finite, so that nothing is said of them: force_momentum" in lost
    assert "momentum" not in lost.replace("force_momentum", "")
    constant = [{"layer": 0, "quantity": "gate", "mean": 0.5, "variance_tokens": 1e-8}]
    (only,) = parameter_findings(ParameterReport({}, None, "a text", 1, constant))
    assert only[0].endswith("it is as good as constant")


def test_a_checkpoint_from_early_in_its_run_is_not_judged_as_a_finished_one(workplace: Path, tmp_path: Path) -> None:
    start = {"mean": 0.0, "std": 0.0, "drift": 0.001}
    rows = [
        {"layer": 0, "sub_layer": "attention", "quantity": name, **start} for name in ("alpha", "transport", "gamma")
    ]

    def said(progress: float) -> str:
        return "\n".join(text for text, _ in parameter_findings(replace(empty, layers=rows, progress=progress)))

    empty = ParameterReport({}, None, "a text", 1, [])
    assert "gamma, alpha, transport hardly left their start" in said(0.5)
    assert "momentum is unused" in said(0.5)
    assert "hardly" not in said(0.01)
    assert "unused" not in said(0.01)
    loaded = load_model(workplace / "runs" / "v4" / "checkpoints" / "step-00000007")
    steps = load_recipe(loaded.path / "recipe.yaml").training.num_steps
    assert report(workplace, "v4").progress == 7 / steps
    unknown = shutil.copytree(loaded.path, tmp_path / "imported", ignore=shutil.ignore_patterns("recipe.yaml"))
    assert report_parameters(replace(loaded, path=unknown), open_split(loaded), max_tokens=32).progress == 1


@pytest.mark.parametrize("part", ["embedding", "mu"])  # mu began as zeros
def test_nothing_is_said_of_weights_that_are_not_finite(
    inl: Callable[..., Result], workplace: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    loaded = load_model(workplace / "runs" / "v5" / "checkpoints" / "step-00000007")
    with torch.no_grad():
        names = {"embedding": "embedding.table.weight", "mu": ".mu"}
        chosen = (own for name, own in loaded.model.named_parameters() if name.endswith(names[part]))
        next(chosen).view(-1)[0] = math.nan
    found = report_parameters(loaded, open_split(loaded), max_tokens=32)
    assert (None in [one.effective_rank for one in found.ranks]) == (part == "embedding")
    said = [text for text, _ in parameter_findings(found)]
    assert any(
        text.startswith("how far weights have moved since the start is not finite") and part in text for text in said
    )
    assert not any("nan" in text.replace("finite", "") for text in said)
    monkeypatch.setattr("inl_core.analysis.parameters.report_parameters", lambda *given, **options: found)
    result = inl("inspect-params", "runs/v5")
    assert result.exit_code == 0, result.output
    assert "nan" not in result.stdout


@pytest.mark.parametrize("preset", ["v4", "v5"])
def test_findings_come_first_and_are_the_same_everywhere(inl: Callable[..., Result], preset: str) -> None:
    findings = json.loads(inl("inspect-params", f"runs/{preset}", "--json").stdout)["findings"]
    assert len(findings) >= 2
    printed = inl("inspect-params", f"runs/{preset}").stdout.split("\n\n")[0]
    assert printed.splitlines()[-len(findings) :] == [f"- {finding}." for finding in findings]
