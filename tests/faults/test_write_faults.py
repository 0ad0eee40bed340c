"""A disk that is full, broken or read-only at any write: one clear line, nothing lost that was saved, no half files."""

import errno
import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from typing import Any

import pytest

from tests.faults.commands import check_manners
from tests.faults.inject import Fault
from tests.faults.subject import Stage, Whole, check_checkpoints, check_is_whole, rows, tensors

pytestmark = pytest.mark.slow

SAVE = r"run/checkpoints/step-00000012\.tmp"
LAST_SAVE = r"run/checkpoints/step-00000040\.tmp"
STOPPED = Fault("^step$", 9, signal=signal.SIGTERM)  # saves step 9
TRAIN = ("train", "recipe.yaml", "--run-dir", "run", "--json")
RESUME = ("resume", "run", "--json")


@dataclass(frozen=True)
class Case:
    """A command, the write that fails, and how the command must end."""

    name: str
    state: str
    command: tuple[str, ...]
    faults: tuple[Fault, ...]
    codes: tuple[int, ...]
    """Exit codes that are right; after 0 the run must be whole but for what the fault took from its records."""
    says: str = ""
    """What stderr must hold; the system's own words for the error if nothing else is given."""

    def __str__(self) -> str:
        return self.name


def _fails(event: str, number: int, error: int) -> tuple[Fault, ...]:
    return (Fault(event, number, errno=error),)


def _saving() -> list[Case]:
    """A save in the middle costs a warning; one at the end, or at a signal, is made up for by a resume."""
    moments = {
        "its directory": (f"^mkdir {SAVE}$", errno.EROFS),
        "its weights": (f"^open {SAVE}/model", errno.ENOSPC),
        "its weights on the disk": (f"^fsync {SAVE}/model", errno.EIO),
        "its optimizer": (f"^open {SAVE}/training_state/", errno.EDQUOT),
        "its configuration": (f"^open {SAVE}/config.json", errno.ENOSPC),
        "its progress": (f"^open {SAVE}/training_state/progress.json", errno.ENOSPC),
        "its manifest": (f"^open {SAVE}/manifest.json", errno.ENOSPC),
        "its manifest on the disk": (f"^fsync {SAVE}/manifest.json", errno.EIO),
        "its last rename": (f"^rename {SAVE} ->", errno.ENOSPC),
    }
    cases = [
        Case(f"a checkpoint: {what}", "prepared", TRAIN, _fails(event, 1, error), (0,), "step 12 not saved")
        for what, (event, error) in moments.items()
    ]
    last = _fails(f"^open {LAST_SAVE}/model", 1, errno.ENOSPC)
    cases.append(Case("the last checkpoint", "prepared", TRAIN, last, (1,), "could not be saved"))
    stopped = (STOPPED, Fault(r"^open run/checkpoints/step-000000(09|10)\.tmp/model", 1, errno=errno.ENOSPC))
    cases.append(Case("the checkpoint of a signal", "prepared", TRAIN, stopped, (1,), "could not be saved"))
    word = (STOPPED, Fault("^open run/.*preempted", 1, errno=errno.ENOSPC))
    cases.append(Case("word of a signal", "prepared", TRAIN, word, (75,), "inl resume run"))
    full = (Fault(f"^mkdir {SAVE}$", 1, file_size=20_000),)
    cases.append(Case("every write from a moment on", "prepared", TRAIN, full, (1,), "step 12 not saved"))
    return cases


def _starting() -> list[Case]:
    trial = "run/checkpoints.trial/.*model"
    return [
        Case("the trial checkpoint", "prepared", TRAIN, _fails(f"^open {trial}", 1, errno.ENOSPC), (1,)),
        Case("the trial on the disk", "prepared", TRAIN, _fails(f"^fsync {trial}", 1, errno.EIO), (1,)),
        Case("the run's directory", "prepared", TRAIN, _fails("^mkdir run", 0, errno.EROFS), (1, 4)),
        Case("the run's recipe", "prepared", TRAIN, _fails(r"^open run/\.?recipe", 1, errno.ENOSPC), (1, 4)),
        Case("the environment", "prepared", TRAIN, _fails(r"^open run/\.?environment", 1, errno.EDQUOT), (1, 4)),
        Case("the recipe of a resume", "halfway", RESUME, _fails(r"^open run/\.?recipe", 1, errno.ENOSPC), (0, 1, 4)),
        Case("metrics cut by a resume", "halfway", RESUME, _fails(r"^open run/\.?metrics", 1, errno.ENOSPC), (1, 4)),
    ]


def _recording() -> list[Case]:
    """Records are not worth a run: it goes on with a warning."""
    return [
        Case("a row of metrics", "prepared", TRAIN, _fails(r"^open run/metrics", 7, errno.ENOSPC), (0,)),
        Case("every row of metrics", "prepared", TRAIN, _fails(r"^open run/metrics", 0, errno.EROFS), (0,)),
        Case("metrics torn in a row", "prepared", TRAIN, (Fault("^step$", 8, file_size=2_000),), (1,), "metrics"),
        Case("a record of the dynamics", "prepared", TRAIN, _fails("^rename run/dynamics", 2, errno.ENOSPC), (0,)),
        Case("the dynamics' directory", "prepared", TRAIN, _fails("^mkdir run/dynamics", 0, errno.EACCES), (0,)),
    ]


def _preparing() -> list[Case]:
    """A preparation fails before there is a manifest, and goes on later."""
    moments = {
        "the data's directory": ("^mkdir data", errno.EROFS),
        "the plan": (r"^open data/\.prepare/.*plan", errno.ENOSPC),
        "a chunk of text": (r"^open data/\.prepare/text", errno.ENOSPC),
        "a chunk of tokens": (r"^rename data/\.prepare/tokens", errno.EIO),
        "a shard": ("^open data/train-00001", errno.EDQUOT),
        "a shard on the disk": ("^fsync data/validation", errno.EIO),
        "the tokenizer": (r"^open data/\.?tokenizer", errno.ENOSPC),
        "the data's manifest": (r"^rename data/\S*manifest", errno.ENOSPC),
    }
    cases = [
        Case(what, "start", TRAIN, _fails(event, 0 if "mkdir" in event else 1, error), (1, 4))
        for what, (event, error) in moments.items()
    ]
    full = (Fault(r"^open data/\.prepare/text", 1, file_size=3_000),)
    return [*cases, Case("every write of a preparation", "start", TRAIN, full, (1, 4), "data")]


CASES = [*_saving(), *_starting(), *_recording(), *_preparing()]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_write_that_fails_costs_nothing_that_was_saved(stage: Stage, whole: Whole, case: Case):
    stage.set(case.state)
    outcome = stage.server.run(*case.command, faults=case.faults)
    check_manners(outcome, codes=case.codes)
    words = case.says or os.strerror(case.faults[0].errno)
    assert words in outcome.stderr or (outcome.code == 0 and case.state == "halfway"), outcome.told
    check_checkpoints(stage)
    assert not list(stage.path.rglob("checkpoints/*.tmp")), outcome.told
    if outcome.code == 0:
        check_only_records_are_lost(stage, whole)
    else:
        check_manners(stage.go_on(), codes=[0])
        if case.name == "metrics torn in a row":
            check_only_records_are_lost(stage, whole)
        else:
            check_is_whole(stage, whole)


def check_only_records_are_lost(stage: Stage, whole: Whole) -> None:
    """The weights are right, and so is every row of metrics that is there, once."""
    assert tensors(stage.run) == whole.tensors
    found = rows(stage.run) if (stage.run / "metrics.jsonl").exists() else []
    assert [row for row in whole.rows if row in found] == found


def test_a_report_of_bad_numbers_that_cannot_be_written_still_exits_with_3(stage: Stage):
    stage.set("prepared")
    wild = ("--set", "training.optimizer.learning_rate=1e30", "--set", "training.schedule.name=constant")
    faults = [Fault("^(mkdir|open) run/reports", 0, errno=errno.ENOSPC)]
    check_manners(stage.server.run(*TRAIN, *wild, faults=faults), codes=[3])


OUTPUTS = {
    "generate": ("generate", "run", "--max-new-tokens", "4"),
    "generate --json": ("generate", "run", "--max-new-tokens", "4", "--json"),
    "eval --json": ("eval", "run", "--json"),
    "inspect": ("inspect", "run"),
    "inspect-params": ("inspect-params", "run"),
    "plan --json": ("plan", "recipe.yaml", "--json"),
    "prepare-data --json": ("prepare-data", "text.jsonl", "--vocab-size", "300", "--output", "out", "--json"),
}


@pytest.mark.parametrize("stream", ["/dev/full", ""], ids=["a full disk", "a closed stream"])
@pytest.mark.parametrize("command", OUTPUTS.values(), ids=OUTPUTS)
def test_results_that_cannot_be_written_are_a_failure(stage: Stage, command, stream: str):
    stage.set("finished")
    outcome = stage.server.run(*command, stdout=stream)
    check_manners(outcome, codes=[1] if stream else [0, 1])


@pytest.mark.parametrize("stream", ["/dev/full", ""], ids=["a full disk", "a closed stream"])
def test_a_run_survives_the_loss_of_the_stream_it_talks_to(stage: Stage, whole: Whole, stream: str):
    stage.set("prepared")
    outcome = stage.server.run(*TRAIN[:-1], stderr=stream, stdout=stream)
    assert not outcome.is_late
    assert outcome.code in (0, 1)
    check_is_whole(stage, whole)


def test_a_report_that_cannot_be_written_is_a_failure(stage: Stage):
    stage.set("finished")
    command = ("convergence-report", "run", "--output", "report")
    outcome = stage.server.run(*command, faults=[Fault("^open report/", 2, errno=errno.ENOSPC)])
    check_manners(outcome, codes=[1, 4])
    assert os.strerror(errno.ENOSPC) in outcome.stderr


def test_a_cache_that_cannot_be_written_costs_no_more_than_compiling_again(stage: Stage, whole: Whole):
    if not shutil.which("g++"):
        pytest.skip("no compiler here, so no library to keep")
    stage.set("prepared")
    (stage.path / "cache").mkdir()
    faults = [Fault("^(open|mkdir|rename) cache/", 0, errno=errno.ENOSPC)]
    outcome = stage.train(faults=faults, timeout=120, XDG_CACHE_HOME=str(stage.path / "cache"))
    check_manners(outcome, codes=[0])
    assert list((stage.path / "cache").rglob("*.so")) == []
    shutil.rmtree(stage.path / "cache")
    check_is_whole(stage, whole)


def test_a_small_disk_that_really_fills_up(stage: Stage, whole: Whole):
    stage.set("prepared")
    stage.run.mkdir()
    mount: list[Any] = ["mount", "-t", "tmpfs", "-o", "size=1400k", "tmpfs", stage.run]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk, and not everywhere")
    try:
        outcome = stage.train()
        check_manners(outcome, codes=[1])
        assert "not saved" in outcome.stderr
        check_checkpoints(stage)
        assert not list(stage.run.rglob("*.tmp"))
        subprocess.run([*mount[:4], "remount,size=100m", *mount[5:]], check=True)
        check_manners(stage.go_on(), codes=[0])
        check_is_whole(stage, whole)
    finally:
        subprocess.run(["umount", stage.run], check=True)


def count() -> int:
    """Write faults that are tried on every machine."""
    return len(CASES) + 2 * len(OUTPUTS) + 2 + 2
