"""Two processes give the single process's run."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from inl_core.training.distributed import start_world
from inl_core.training.metrics import read_metrics

LOSSES = {
    "training": {
        "micro_batch_size": 2,
        "losses": {"lambda_mean": 0.5, "lambda_speed": 0.1, "lambda_energy": 0.1},
        "evaluation": {"every": 6, "tokens": 1024},
    },
    "model": {"preset": "v4", "integrator": {"mu": {"adaptation_rate": 0.01}}},
}
EXPERTS = {
    "training": {"micro_batch_size": 2, "evaluation": {"every": 6, "tokens": 1024}},
    "model": {
        "preset": "v4",
        "integrator": {"num_iterations": 3, "controller": {"experts": 3}, "budget": {"strategy": "hybrid"}},
    },
}


NAMES = (
    "loss",
    "gradient_norm",
    "validation_loss",
    *(f"loss_{term}" for term in ("mean", "speed", "energy", "balance")),
)
"""The numbers of a row of metrics in which two runs must agree."""


def torchrun(recipe, run: str, cwd, *, program=("-m", "inl_cli")) -> subprocess.CompletedProcess:
    """`inl train` on two ranks."""
    return run_torchrun(2, [*program, "train", str(recipe), "--run-dir", run, "--json"], cwd)


def run_torchrun(num_ranks: int, program: list[str], cwd) -> subprocess.CompletedProcess:
    """A Python program on several ranks; one that does not end says where each of its threads stands."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(num_ranks)]
    command = [*launcher, *program]
    here = str(Path(__file__).parents[2])  # a module of the tests is not installed
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PYTHONPATH": here}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=cwd, env=environment, start_new_session=True, **pipes)
    try:
        stdout, stderr = process.communicate(timeout=180)
    except subprocess.TimeoutExpired:
        for pid in _family(process.pid):
            os.kill(pid, signal.SIGABRT)
        stdout, stderr = process.communicate()
        pytest.fail(f"still running after 180 s; stdout:\n{stdout}\nstderr:\n{stderr}")
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)


def _family(leader: int) -> list[int]:
    """torchrun gives each worker a session of its own: the leader and its descendants, youngest first."""
    children = [int(pid) for pid in Path(f"/proc/{leader}/task/{leader}/children").read_text(encoding="utf-8").split()]
    return [pid for child in children for pid in _family(child)] + [leader]


# A token near the border between two experts takes another one after a rounding difference, hence the wider tolerance.
CASES = {
    "task alone": ({}, 1e-5),
    "every loss, accumulation, moving mu": (LOSSES, 1e-5),
    "experts, balance, budgets": (EXPERTS, 1e-4),
}
_QUICK = "every loss, accumulation, moving mu"


@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        pytest.param(*case, id=name, marks=() if name == _QUICK else pytest.mark.slow)  # 20 seconds each
        for name, case in CASES.items()
    ],
)
def test_two_ranks_give_the_loss_curve_of_one_process(recipe_file, inl, tmp_path, changes, tolerance):
    recipe = recipe_file(**changes)
    single = inl("train", recipe, "--run-dir", "one", "--json")
    assert single.exit_code == 0, single.stderr
    double = torchrun(recipe, "two", tmp_path)
    assert double.returncode == 0, double.stderr
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for first, second in zip(one, two, strict=True):
        for name in NAMES:
            if name in first:
                assert second[name] == pytest.approx(first[name], rel=tolerance), (first["step"], name)
    assert json.loads(double.stdout)["step"] == 12


# The command line, in which the fourth and the eighth step overflow, on the sequences of rank 1 alone.
OVERFLOWS_ON_ONE_RANK = """
import math
from inl_cli.app import main
from inl_core.launcher import place_or_alone
from inl_core.training.step import Stepper
take = Stepper.take
def take_and_overflow(self, step, stop):
    spoil = lambda module, given, output: output * math.inf if step in (3, 7) else None
    hook = self.model.blocks[1].feed_forward.down.register_forward_hook(spoil) if place_or_alone().rank else None
    try:
        return take(self, step, stop)
    finally:
        if hook:
            hook.remove()
Stepper.take = take_and_overflow
main()
"""


@pytest.mark.slow
def test_all_ranks_skip_and_stop_together_where_one_overflows(recipe_file, inl, tmp_path):
    program = tmp_path / "overflows.py"
    program.write_text(OVERFLOWS_ON_ONE_RANK)
    recipe = recipe_file(training={"nonfinite": {"skip": 1}})
    done = torchrun(recipe, "two", tmp_path, program=[str(program)])
    assert done.returncode == 1
    assert done.stderr.count("step 4: loss nan, gradient norm nan; skipped, 1 of the 1") == 1
    assert done.stderr.count("step 8: loss nan, gradient norm nan; stopped before the update") == 1
    assert done.stderr.count("first of all in the output of blocks.1.feed_forward.down (4,096 of 4,096") == 2
    assert done.stderr.count("on rank 1") == 2
    rows = [row for row in read_metrics(tmp_path / "two") if "learning_rate" in row]
    assert [(row["step"], row["loss"] is None) for row in rows] == [(step, step == 4) for step in range(1, 8)]
    for step in (4, 8):
        paths = [tmp_path / "two" / "reports" / f"nonfinite-step-{step}-rank-{rank}.json" for rank in (0, 1)]
        windows = [row["window"] for path in paths for row in json.loads(path.read_text())["batch"]]
        assert len(set(windows)) == 8
        replayed = inl("replay", paths[1], "--json")  # without the hook, on the sequences of both
        assert replayed.exit_code == 0, replayed.stderr
        assert json.loads(replayed.stdout)["is_finite"]


def test_one_of_several_processes_keeps_its_exit_code_and_its_message(inl, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = inl("train", "missing.yaml")
    assert outcome.exit_code == 2
    assert "missing.yaml" in outcome.stderr


def test_processes_that_cannot_meet_are_one_line(recipe_file, inl, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        found = {"PROCID": "0", "STEP_NUM_TASKS": "2", "JOB_ID": "7", "JOB_NODELIST": "localhost"}
        for name, value in found.items():
            monkeypatch.setenv(f"SLURM_{name}", value)
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        outcome = inl("train", recipe_file())
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith("rank 0 of 2 did not find the others: ")
    assert outcome.stderr.count("\n") == 1


def test_on_gpus_the_host_s_messages_go_over_a_group_of_their_own(monkeypatch):
    """NCCL is told its device; what takes long is waited for in gloo, for as long as it takes."""
    started, groups, used = [], [], []
    place = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    for name, value in {"is_available": True, "device_count": 2, "set_device": None}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **how: started.append((backend, how["device_id"])))
    monkeypatch.setattr(dist, "new_group", lambda **how: groups.append(how) or "control")
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box, **how: used.append(how["group"]))
    monkeypatch.setattr(dist, "all_reduce", lambda values, group=None: used.append(group))
    monkeypatch.setattr(dist, "barrier", lambda group=None: used.append(group))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with start_world("auto") as world:
        world.on_main(lambda: "data")
        world.sum_numbers(1.0)
    assert started == [("nccl", torch.device("cuda", 1))]
    assert groups[0]["backend"] == "gloo"
    assert groups[0]["timeout"].days >= 1
    assert used == ["control"] * 3


SILENT = """
import sys, threading
from datetime import timedelta
from inl_core.training import distributed
distributed.STEP_WAIT = timedelta(seconds=2)
with distributed.start_world("cpu") as world:
    world.on_main(lambda: None)
    if world.rank:
        threading.Event().wait(30)  # a rank that hangs in the middle of a step
        sys.exit()
    try:
        world.sum_numbers(1.0)
    except ConnectionError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(7)
"""


def test_a_rank_that_hangs_in_a_step_is_not_waited_for_longer_than_the_steps_timeout(tmp_path):
    script = tmp_path / "silent.py"
    script.write_text(SILENT)
    outcome = run_torchrun(2, [str(script)], tmp_path)
    assert outcome.returncode != 0
    assert "another process of this run is gone, or does not answer" in outcome.stderr
    assert "exitcode  : 7" in outcome.stderr.replace("exitcode: 7", "exitcode  : 7")
