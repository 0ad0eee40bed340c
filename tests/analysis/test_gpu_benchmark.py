"""benchmarks/gpu.py runs, on a CPU with tiny models; what it measures there means nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def run(*words: str, output: Path) -> tuple[subprocess.CompletedProcess, list[dict]]:
    command = [sys.executable, str(BENCHMARK), "--quick", "--output", str(output), *words]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=400)
    return done, json.loads(output.read_text(encoding="utf-8"))


@pytest.mark.slow  # 40 seconds on an idle machine
def test_every_job_measures_its_rows(tmp_path):
    done, rows = run(output=tmp_path / "gpu.json")
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert not [row for row in rows if "failed" in row]
    for job in dict.fromkeys(row["job"] for row in rows):
        assert f"## {job}\n" in done.stdout
    losses = {row["row"]: row for row in rows if row["job"] == "loss"}
    assert losses["ours, bfloat16, 16 rows"]["error of the loss"] < 1e-3
    assert {row["row"] for row in rows if row["job"] == "waits"} >= {"v5", "v5, Muon", "v4, learned budget"}


def test_a_job_without_time_says_so_and_loses_no_other(tmp_path):
    done, rows = run("--only", "machine", "loss", "--seconds", "0", output=tmp_path / "gpu.json")
    assert done.returncode == 1
    assert [(row["job"], row["failed"]) for row in rows] == [(job, "no time was left") for job in ("machine", "loss")]
    assert "| all | no time was left |" in done.stdout
