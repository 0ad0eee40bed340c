"""`inl convergence-report` as a user meets it: files, words, JSON, and input that cannot be used."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from inl_cli.app import app
from tests.inference.tiny import TEXT, write_checkpoint

SHORT = ("--tokens", "160", "--iterations", "4", "--sample-tokens", "8")
TABLES = ["report.html", "report.md", "summary.json", "trajectories.parquet"]
FIGURES = ["residual.png", "distance.png", "gains.png", "stability.png", "bits_per_byte.png", "portrait.png"]
FIGURES += ["iterations_used.png"]  # only where tokens stop early


@pytest.fixture
def inl(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(workplace)
    return lambda *arguments: CliRunner().invoke(app, ["convergence-report", *arguments])


@pytest.fixture
def run(tmp_path: Path, workplace: Path) -> Path:
    """A run of v3 with two iterations, which stops early."""
    write_checkpoint(tmp_path / "elsewhere", "v3", data=workplace / "data" / "tiny", integrator={"num_iterations": 2})
    return tmp_path / "elsewhere"


def test_every_file_is_written_and_the_words_are_printed(inl: Callable[..., Result], run: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "report"
    result = inl(str(run), "--output", str(output), *SHORT)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in output.iterdir()) == sorted([*TABLES, *FIGURES])
    for name in FIGURES:
        assert (output / name).read_bytes().startswith(b"\x89PNG")
        assert (output / name).stat().st_size > 10_000
    summary, report = json.loads((output / "summary.json").read_text()), (output / "report.md").read_text()
    assert len(summary["layers"]) == 2
    for layer in summary["layers"]:
        verdict = layer["verdict"]
        assert verdict["word"] in ("converge", "oscillate", "drift", "ignored")
        assert f"layer {layer['layer']}: the states" in result.stdout
        assert verdict["reason"] in result.stdout
        assert verdict["reason"] in report
        assert [row["iteration"] for row in layer["iterations"]] == [0, 1, 2, 3, 4]
    assert all(f"]({name})" in report for name in FIGURES)
    rows = pq.read_table(output / "trajectories.parquet").num_rows
    assert rows == 8 * 2 * 5


def test_the_report_goes_to_the_run_by_default_and_json_is_the_summary(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # figures take seconds
    arguments = ["convergence-report", str(run), *SHORT, "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    directory = run / "reports" / "convergence-step-00000007"
    assert printed.pop("directory") == str(directory)
    assert sorted(printed.pop("files")) == sorted(TABLES)
    assert printed == json.loads((directory / "summary.json").read_text())
    assert printed["early_stopping"]["tokens_by_iterations"]


def test_without_matplotlib_all_but_the_figures_is_written(
    inl: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "residual.png").write_text("of an earlier report")
    result = inl("runs/v4", "--output", str(tmp_path), *SHORT)
    assert result.exit_code == 0, result.output
    assert 'pip install "inl[plot]"' in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == TABLES
    assert 'pip install "inl[plot]"' in (tmp_path / "report.md").read_text()


def test_any_text_can_be_measured(inl: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # figures take seconds
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "one.txt").write_text("a")
    for name in ("a.txt", "one.txt"):
        result = inl("--text", str(tmp_path / name), "--output", str(tmp_path / "out"), "--json", *SHORT)
        assert result.exit_code == 0, result.output
        summary = json.loads(result.stdout)
        assert summary["text"] == str(tmp_path / name)
        assert summary["layers"][0]["iterations"][0]["nonfinite_tokens"] == 0


def test_a_v5_without_terms_has_nothing_to_report(inl: Callable[..., Result], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "off", "v5", stream=None, transport=False)
    result = inl(str(tmp_path / "off"))
    assert result.exit_code == 4
    assert "all terms of this model's stream are off, so it is a plain Transformer" in result.stderr
    assert "name a checkpoint of a preset v1 to v5, or of a Transformer with transport" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["runs/transformer"], 4, "has no integrator, so it is a plain Transformer"),
        (["runs/none"], 4, "no such run or checkpoint"),
        (["runs/v4", "--text", "missing.txt"], 2, "no such file"),
        (["runs/v4", "--data", "missing"], 4, "missing"),
        (["runs/v4", "--data", "data/tiny", "--text", "a.txt"], 2, "give one of them"),
        (["runs/v4", "--iterations", "1"], 2, "must be at least 2"),
        (["runs/v4", "--epsilon", "0"], 2, "must be above 0"),
        (["runs/v4", "--window", "1000"], 2, "model's context"),
        (["runs/v4", "--window", "0"], 2, "window 0"),
        (["runs/v4", "--tokens", "0"], 2, "tokens"),
        (["runs/v4", "--output", "data/tiny/manifest.json"], 2, "is a file"),
    ],
)
def test_what_cannot_be_used_is_one_clear_error(
    inl: Callable[..., Result], arguments: list[str], code: int, message: str
) -> None:
    result = inl(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
