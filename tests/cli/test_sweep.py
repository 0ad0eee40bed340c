"""`inl sweep`: which runs there are, what they come to, and how a sweep that was stopped goes on."""

import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from inl_cli.app import app
from inl_core.analysis.sweep import PlannedRun, plan_runs, summarise
from inl_core.recipe.load import load_recipe
from inl_core.training.run_status import Ending, RunStatus

ROOT = Path(__file__).parents[2]
RATE = "training.optimizer.learning_rate"
SMALL = """\
name: subject
model: {preset: v4, d_model: 32, num_layers: 2, num_heads: 2, num_kv_heads: 1, max_seq_len: 64}
data: {sources: [text.md], directory: data, tokenizer: {vocab_size: 300}, validation_fraction: 0.2}
training:
  device: cpu
  steps: 12
  sequence_length: 32
  batch_tokens: 128
  evaluation: {every: 6, tokens: 256, final_tokens: 512}
  checkpoint: {every: 3}
  logging: {every: 1, dynamics_every: 6}
"""


@pytest.fixture
def inl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """`inl sweep` in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["sweep", *arguments])


def test_every_value_is_combined_with_every_seed_and_nothing_is_written(
    inl: Callable[..., Result], tmp_path: Path
) -> None:
    grid = ("--grid", f"{RATE}=1e-3,3e-3", "--grid", "training.optimizer.betas=[0.9, 0.95],[0.8, 0.9]")
    result = inl("--seeds", "0", "7", "tiny", *grid, "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout)["runs"]
    expected = [
        ({RATE: rate, "training.optimizer.betas": betas}, seed)
        for rate in (0.001, 0.003)
        for betas in ([0.9, 0.95], [0.8, 0.9])
        for seed in (0, 7)
    ]
    assert [(run["values"], run["seed"]) for run in runs] == expected
    assert runs[0]["run"] == "runs/tiny-sweep/learning_rate=0.001_betas=-0.9-0.95-_seed=0"
    assert {run["state"] for run in runs} == {"empty"}
    assert list(tmp_path.iterdir()) == []


def test_a_run_is_the_recipe_with_its_values() -> None:
    (run,) = plan_runs(Path("tiny"), ["model.preset=v4"], [3], ["training.steps=5"], None)
    given = ["training.steps=5", "model.preset=v4", "training.seed=3"]
    assert run.recipe == load_recipe("tiny", given) == load_recipe("tiny", run.overrides)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "inl sweep: nothing to sweep"),
        (("--grid", RATE), f"--grid {RATE}: expected KEY=VALUE,VALUE"),
        (("--grid", f"{RATE}=1e-3,0.001"), f"--grid {RATE}=1e-3,0.001: the same value twice"),
        (("--grid", f"{RATE}=1", "--grid", f"{RATE}=2"), "--grid: the same key twice"),
        (("--grid", "training.seed=1,2", "--seeds", "3"), "--grid training.seed: the seeds are given by --seeds"),
        (("--seeds", "1", "1"), "--seeds: the same seed twice"),
        (("--grid", "training.optimizer.learning_rat=1"), "--grid training.optimizer.learning_rat=1: unknown key"),
        (("--seeds", "1", "--slurm"), "--slurm: needs --time"),
        (("--seeds", "1", "--time", "1:00:00"), "--time: only with --slurm"),
        (("--seeds", "1", "--gpus", "0", "--lead", "9", "--dry-run"), "--gpus, --lead: only with --slurm"),
        (("--seeds", "1", "--container", "a.sqsh"), "--container: only with --slurm"),
        (("--seeds", "1", "--dry-run", "--output", "page.html"), "--output: is written when the runs are done"),
    ],
)
def test_what_cannot_be_swept_is_told_in_one_line(
    inl: Callable[..., Result], arguments: tuple[str, ...], message: str
) -> None:
    result = inl("tiny", *arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1), result.output
    assert result.stderr.startswith(message)


def finished(planned: PlannedRun, score: dict[str, float] | None) -> tuple[PlannedRun, RunStatus]:
    """A run with its final scores, or one that has none yet."""
    ending = Ending(planned.path, 1, 1, score) if score else None
    return planned, RunStatus(planned.path, "done" if score else "failed", ending=ending)


def test_the_best_point_has_the_lowest_mean_of_those_with_all_their_runs() -> None:
    runs = plan_runs(Path("tiny"), [f"{RATE}=1e-3,2e-3,3e-3"], [0, 1, 2], [], None)
    bits = (
        2.0,
        2.5,
        2.1,
        1.9,
        2.2,
        1.8,
        1.0,
        1.1,
        None,
    )  # the last point would be the best, but one of its runs failed
    found = [
        finished(run, {"loss": 10 - value, "bits_per_byte": value} if value else None)
        for run, value in zip(runs, bits, strict=True)
    ]
    points = summarise(found)
    assert [point.is_best for point in points] == [False, True, False]
    assert [len(point.losses) for point in points] == [3, 3, 2]
    assert points[1].bits_per_byte == (1.9, 2.2, 1.8)
    no_bits = [finished(run, {"loss": 10 - value} if value else None) for run, value in zip(runs, bits, strict=True)]
    assert [point.is_best for point in summarise(no_bits)] == [True, False, False]


def test_a_task_of_the_array_trains_its_own_run(inl: Callable[..., Result], tmp_path: Path) -> None:
    size = ("--slurm", "--time", "1:00:00", "--gpus", "0", "--partition", "cpu", "--runs-dir", "a b", "--logs", "l g")
    result = inl("tiny", "--grid", "name=one,two", "--seeds", "4", "5", *size)
    assert result.exit_code == 0, result.output
    script = tmp_path / "job.sh"
    script.write_text(result.stdout)
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck
    assert subprocess.run([shellcheck, "--severity=style", str(script)], capture_output=True).stdout == b""
    assert {"--array=1-4", "--requeue", "--partition=cpu"} <= set(re.findall("^#SBATCH (.*)$", result.stdout, re.M))
    inside = inl("tiny", "--seeds", "4", *size, "--lead", "9", "--container", "a.sqsh", "--mount", "/data:/data").stdout
    assert {"--array=1-1", "--signal=TERM@9"} <= set(re.findall("^#SBATCH (.*)$", inside, re.M))
    assert inside.count("--container-image=a.sqsh --container-mounts=/data:/data") == 2  # training, and its state
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text('#!/bin/sh\nprintf "%s\\n" "$@" >asked\n')
    (tmp_path / "bin" / "srun").chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    for task, (name, seed) in enumerate([("one", 4), ("one", 5), ("two", 4), ("two", 5)], 1):
        said = {"SLURM_JOB_ID": "9", "SLURM_ARRAY_TASK_ID": str(task), "PATH": path}
        subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=os.environ | said, check=True)
        run = f"a b/name={name}_seed={seed}"
        expected = ["inl", "train", "tiny", "--set", f'name="{name}"', "--set", f"training.seed={seed}"]
        assert (tmp_path / "asked").read_text().splitlines()[-10:] == [*expected, "--run-dir", run, "--resume-or-start"]
    assert (tmp_path / "l g" / "9" / "0").is_dir()


def sweep(base: Path, *arguments: str) -> subprocess.Popen[str]:
    """A sweep in a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "inl_cli", "sweep", "recipe.yaml", "--json", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=base, env=environment, stdout=pipe, stderr=pipe, text=True, encoding="utf-8")


def scores(found: dict[str, Any]) -> list[tuple[str, float]]:
    return [(Path(run["run"]).name, run["evaluation"]["loss"]) for run in found["runs"]]


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_and_trains_no_run_twice(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(SMALL)
    shutil.copy(ROOT / "docs" / "commands.md", tmp_path / "text.md")
    grid = ("--grid", f"{RATE}=1e-3,1e-2", "--seeds", "0", "1")
    whole = sweep(tmp_path, *grid, "--runs-dir", "whole", "--output", "page.html")
    printed, told = whole.communicate()
    assert whole.returncode == 0, told
    undisturbed = json.loads(printed)
    page = (tmp_path / "page.html").read_text()
    assert "vega" in page
    assert "The points of the grid" in page
    for number, point in enumerate(undisturbed["points"]):
        losses = [loss for _, loss in scores(undisturbed)[2 * number : 2 * number + 2]]
        assert point["loss"] == pytest.approx(sum(losses) / 2)
        assert point["loss_deviation"] == pytest.approx(statistics.stdev(losses))
    assert sum(point["best"] for point in undisturbed["points"]) == 1

    stopped = sweep(tmp_path, *grid, "--runs-dir", "parts")
    assert stopped.stderr is not None
    for line in stopped.stderr:
        if line.startswith("run 2 of 4"):
            break
    stopped.send_signal(signal.SIGTERM)
    _, told = stopped.communicate()
    assert stopped.returncode == 75, told
    assert told.splitlines()[-1] == "the sweep was stopped; the same command goes on"
    first = tmp_path / "parts" / "learning_rate=0.001_seed=0" / "metrics.jsonl"
    before = first.stat().st_mtime_ns

    again = sweep(tmp_path, *grid, "--runs-dir", "parts")
    printed, told = again.communicate()
    assert again.returncode == 0, told
    assert "run 1 of 4, parts/learning_rate=0.001_seed=0: done already" in told
    assert first.stat().st_mtime_ns == before
    assert scores(json.loads(printed)) == scores(undisturbed)

    other = sweep(tmp_path, *grid, "--runs-dir", "parts", "--set", "training.gradient_clip=0.5")
    assert "was begun with another recipe (training.gradient_clip" in other.communicate()[1]
    assert other.returncode == 2


@pytest.mark.slow
def test_a_run_that_fails_does_not_keep_the_others_from_training(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(SMALL)
    shutil.copy(ROOT / "docs" / "commands.md", tmp_path / "text.md")
    process = sweep(tmp_path, "--grid", f"{RATE}=1e30,1e-3")
    printed, told = process.communicate()
    assert process.returncode == 1, told
    assert told.splitlines()[-1].startswith("1 of 2 runs failed: learning_rate=1e+30_seed=0")
    points = json.loads(printed)["points"]
    assert [point["done"] for point in points] == [0, 1]
    assert [point["loss"] is None for point in points] == [True, False]
