"""Two processes give the single process's run."""

import json
import os
import subprocess
import sys

import pytest

from inl_core.training.metrics import read_metrics
from tests.training.conftest import run_inl

LOSSES = {
    "training": {
        "micro_batch_size": 2,
        "losses": {"lambda_mean": 0.5, "lambda_speed": 0.1, "lambda_energy": 0.1},
        "evaluation": {"every": 6, "tokens": 1024},
    },
    "model": {"integrator": {"mu": {"adaptation_rate": 0.01}}},
}


def torchrun(recipe, run: str, cwd) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "inl_cli", "train", str(recipe), "--run-dir", run, "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("changes", [{}, LOSSES], ids=["task alone", "every loss, accumulation, moving mu"])
def test_two_ranks_give_the_loss_curve_of_one_process(recipe_file, tmp_path, changes):
    recipe = recipe_file(**changes)
    single = run_inl("train", recipe, "--run-dir", "one", "--json", cwd=tmp_path)
    assert single.returncode == 0, single.stderr
    double = torchrun(recipe, "two", tmp_path)
    assert double.returncode == 0, double.stderr
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for first, second in zip(one, two, strict=True):
        for name in ("loss", "loss_mean", "loss_speed", "loss_energy", "gradient_norm", "validation_loss"):
            if name in first:
                assert second[name] == pytest.approx(first[name], rel=1e-5), (first["step"], name)
    assert json.loads(double.stdout)["step"] == 12
