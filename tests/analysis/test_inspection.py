"""`inl inspect`: every kind is recognised, shown and written as JSON, damaged ones too."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from inl_cli.app import app
from inl_core.analysis.inspection import sparkline
from inl_core.corpus.manifest import load_manifest
from inl_core.recipe.load import dump_recipe
from tests.damage import put
from tests.inference.tiny import recipe, tiny_model, write_checkpoint

CHECKPOINT = "runs/v4/checkpoints/step-00000007"


@pytest.fixture
def inl(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    monkeypatch.chdir(workplace)
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


@pytest.fixture
def inspected(inl: Callable[..., Result]) -> Callable[[str], dict[str, Any]]:
    """The JSON of `inl inspect PATH`; what is printed without --json is checked on the way."""

    def run(path: str) -> dict[str, Any]:
        printed = inl("inspect", path)
        assert printed.exit_code == 0, printed.output
        result = inl("inspect", path, "--json")
        (line,) = result.stdout.splitlines()
        data = json.loads(line)
        assert printed.stdout.startswith(f"{data['kind']} {path}\n")
        assert all(f"\n{title}" in printed.stdout for title, section in data.items() if isinstance(section, dict))
        return data

    return run


def parameters(section: list[dict[str, Any]]) -> dict[str, int]:
    return {row["part"]: row["number"] for row in section}


def test_a_recipe_shows_model_parameters_plan_and_data(
    inspected: Callable[[str], dict[str, Any]], tmp_path: Path, workplace: Path
) -> None:
    path = tmp_path / "a.yaml"
    prepared = recipe("v3").model_copy(
        update={"data": recipe("v3").data.model_copy(update={"directory": workplace / "data" / "tiny"})}
    )
    path.write_text(dump_recipe(prepared))
    data = inspected(str(path))
    manifest = load_manifest(workplace / "data" / "tiny")
    assert data["kind"] == "recipe"
    assert data["integrator"]["mu"] == "hierarchical"
    assert data["data"]["train_tokens"] == manifest.splits["train"].tokens
    assert data["model"]["vocabulary"] == manifest.vocab_size == 300
    counts = parameters(data["parameters"])
    assert counts.pop("total") == sum(counts.values()) == sum(p.numel() for p in tiny_model("v3").parameters())
    assert data["plan"]["train_tokens"] == 10 * 64
    assert data["plan"]["epochs"] == pytest.approx(10 * 64 / manifest.splits["train"].tokens, rel=0.1)


def test_a_recipe_without_data_is_planned_all_the_same(
    inspected: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(dump_recipe(recipe("transformer")))
    data = inspected(str(path))
    assert data["data"]["prepared"] is False
    assert data["plan"]["epochs"] is None
    assert "integrator" not in data
    assert "stream" not in data


@pytest.mark.parametrize(
    ("preset", "changes", "terms"),
    [
        ("v5", {}, ["transport", "momentum", "anchor", "equilibrium", "excitation"]),
        ("transformer", {"transport": "embedding"}, ["transport"]),
    ],
)
def test_a_stream_shows_its_terms(
    inspected: Callable[[str], dict[str, Any]], tmp_path: Path, preset: str, changes: dict[str, Any], terms: list[str]
) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(dump_recipe(recipe(preset, **changes)))
    stream = inspected(str(path))["stream"]
    assert (stream["steps"], stream["terms"], stream["gate"], stream["dt"]) == (4, terms, 1, 1)
    assert (stream["excitation"] is None) == (preset == "transformer")
    assert stream["transport_at"] == (["embedding"] if changes else ["embedding", "attention", "feed_forward"])


def test_a_data_set_shows_splits_rows_and_sources(inspected: Callable[[str], dict[str, Any]], workplace: Path) -> None:
    data = inspected("data/tiny")
    manifest = load_manifest(workplace / "data" / "tiny")
    assert data["kind"] == "data set"
    assert data["data set"]["fingerprint"] == manifest.fingerprint
    assert sum(row["documents"] for row in data["splits"]) == data["rows"]["read"] == len(data["sources"]) == 30
    assert data["splits"][0]["bytes_per_token"] == manifest.splits["train"].bytes / manifest.splits["train"].tokens


def test_quarantined_rows_are_counted_by_reason(inl: Callable[..., Result], tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {number} of some words"}) for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{bad", '{"text": 3}', '{"text": 4}', lines[0]]) + "\n")
    arguments = ("--output", str(tmp_path / "data"), "--vocab-size", "280", "--max-bad-ratio", "0.5")
    assert inl("prepare-data", str(tmp_path / "a.jsonl"), *arguments).exit_code == 0
    data = json.loads(inl("inspect", str(tmp_path / "data"), "--json").stdout)
    assert (data["rows"]["quarantined"], data["rows"]["duplicates"]) == (3, 1)
    assert [row["rows"] for row in data["quarantine"]] == [2, 1]


def test_a_checkpoint_shows_progress_model_files_and_provenance(
    inspected: Callable[[str], dict[str, Any]], workplace: Path
) -> None:
    data = inspected(CHECKPOINT)
    assert data["kind"] == "checkpoint"
    facts = data["checkpoint"]
    assert (facts["step"], facts["samples"], facts["tokens"], facts["intact"]) == (7, 14, 448, True)
    assert parameters(data["parameters"])["total"] == sum(p.numel() for p in tiny_model("v4").parameters())
    files = {row["name"]: row["bytes"] for row in data["files"]}
    assert files["model.safetensors"] == (workplace / CHECKPOINT / "model.safetensors").stat().st_size
    assert "training_state/optimizer.safetensors" in files
    assert [(event["event"], event["run"], event["step"]) for event in data["provenance"]] == [("train", "v4", 7)]


def test_a_damaged_checkpoint_is_shown_with_its_problem_and_exits_with_4(
    inl: Callable[..., Result], workplace: Path, tmp_path: Path
) -> None:
    path = shutil.copytree(workplace / CHECKPOINT, tmp_path / "step-00000007")
    with (path / "model.safetensors").open("ab") as file:
        file.write(b"x")
    result = inl("inspect", str(path), "--json")
    data = json.loads(result.stdout)
    assert (result.exit_code, data["checkpoint"]["intact"]) == (4, False)
    assert data["problem"] == result.stderr.strip()
    assert "truncated or changed" in data["problem"]
    (path / "config.json").unlink()
    assert inl("inspect", str(path)).exit_code == 4


def test_a_run_shows_losses_evaluations_and_checkpoints(
    inspected: Callable[[str], dict[str, Any]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    write_checkpoint(run, "v4", step=5)
    broken = write_checkpoint(run, "v4", step=10)
    (broken / "manifest.json").unlink()
    rows = [{"step": step, "tokens": 64 * step, "loss": 8.0 - step / 2, "learning_rate": 1e-3} for step in range(1, 11)]
    scores = {"validation_loss": 3.5, "validation_bits_per_byte": 2.5, "validation_tokens": 99}
    rows.insert(5, {"step": 5, "tokens": 320, **scores})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "preempted.json").write_text('{"signal": "SIGTERM"}')
    data = inspected(str(run))
    assert data["run"] == {
        "recipe": "tiny-v4",
        "preset": "v4",
        "step": 10,
        "steps_planned": 10,
        "stopped_by": "SIGTERM",
    }
    assert (data["loss"]["first"], data["loss"]["lowest"], data["loss"]["last"]) == (7.5, 3.0, 3.0)
    assert data["loss"]["curve"] == sparkline([row["loss"] for row in rows if "loss" in row])
    (evaluation,) = data["evaluations"]
    assert (evaluation["step"], evaluation["tokens"], evaluation["scored_tokens"]) == (5, 320, 99)
    assert [(row["step"], row["intact"]) for row in data["checkpoints"]] == [(5, True), (10, False)]
    assert "has no manifest.json" in data["checkpoints"][1]["problem"]
    assert data["environment"]["torch"]


def test_a_run_that_has_only_begun_is_shown(inspected: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert inspected(str(tmp_path / "run"))["run"]["step"] == 0


@pytest.mark.parametrize(
    ("path", "code", "message"),
    [
        ("./v4", 4, "v4: no such file or directory; did you mean runs/v4?"),
        ("data", 4, "data: is no recipe"),
        ("data/tokenizer.json", 4, "data/tokenizer.json: is no recipe"),
        ("none.yaml", 2, "none.yaml: no such file"),
    ],
)
def test_what_is_nothing_of_ours_is_refused(inl: Callable[..., Result], path: str, code: int, message: str) -> None:
    result = inl("inspect", path)
    assert (result.exit_code, result.stdout) == (code, "")
    assert result.stderr.startswith(message)


def test_an_unfinished_data_set_is_refused_as_one(inl: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "data" / ".prepare").mkdir(parents=True)
    result = inl("inspect", str(tmp_path / "data"))
    assert result.exit_code == 4
    assert "preparation was not finished" in result.stderr


def test_a_sparkline_falls_with_its_values_and_has_its_width() -> None:
    bars = [chr(0x2581 + level) for level in range(8)]
    assert sparkline([float(value) for value in range(8)]) == "".join(bars)
    assert sparkline([float(-value) for value in range(800)], width=8) == "".join(reversed(bars))
    assert sparkline([2.0, 2.0]) == bars[0] * 2
    assert sparkline([]) == ""


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("recipe.yaml", b"- a\n", "recipe.yaml"),
        ("metrics.jsonl", None, "metrics.jsonl: a FIFO"),
        ("environment.json", b"[]", "environment.json: holds a JSON list"),
        ("environment.json", b'{"a": {"b": {"c": 1}}}', "environment.json: damaged: a"),
        ("environment.json", b'{"a":' * 100_000, "environment.json: nested too deeply"),
        ("preempted.json", b'{"signal": 15}', "preempted.json: damaged: signal"),
        ("preempted.json", None, "preempted.json: a FIFO"),
    ],
)
def test_what_can_be_read_of_a_damaged_run_is_shown(
    inl: Callable[..., Result], workplace: Path, tmp_path: Path, file: str, content: bytes | None, problem: str
) -> None:
    run = Path(shutil.copytree(workplace / "runs" / "v4", tmp_path / "run"))
    (run / "metrics.jsonl").write_text('{"step": 9, "loss": 1.5}\n[]\n{"step": 10, "loss": Infinity}\n')
    (run / file).unlink(missing_ok=True)
    (run / file).write_bytes(content) if content else os.mkfifo(run / file)
    result = inl("inspect", str(run), "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 4, result.output
    assert problem in data["problem"] == result.stderr.strip()
    assert [row["intact"] for row in data["checkpoints"]] == [True]
    if file != "metrics.jsonl":
        assert (data["run"]["step"], data["loss"]["last"]) == (10, None)
        assert "no row of metrics: 1 line(s)" in data["run"]["note"]


def test_a_quarantine_of_any_shape_is_counted(inl: Callable[..., Result], workplace: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(workplace / "data" / "tiny", tmp_path / "tiny"))
    put(data / "manifest.json", "quarantined", 5)
    lines = [b'{"reason": "bad"}', b"[]", b"\xff", b'{"reason": 5}', b"[" * 100_000]
    (data / "quarantine.jsonl").write_bytes(b"\n".join(lines))
    result = inl("inspect", str(data), "--json")
    assert json.loads(result.stdout)["quarantine"] == [
        {"reason": "(a damaged row)", "rows": 4},
        {"reason": "bad", "rows": 1},
    ]
