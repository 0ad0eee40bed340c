"""Two ranks that divide a model and save it together: whatever ends or fails on one of them, no damaged checkpoint is
taken, and the run goes on to the same end."""

import errno
import signal
from dataclasses import dataclass

import pytest

from inl_core.training.run_status import read_status
from tests.faults.commands import check_manners
from tests.faults.inject import Fault
from tests.faults.subject import RUN, Stage, check_checkpoints, names, rows, tensors
from tests.faults.test_ranks import run_both, torchrun

pytestmark = pytest.mark.slow

FSDP = ("--set", "training.distributed.strategy=fsdp")
SAVE, LAST_SAVE, TRIAL = "step-00000012.tmp", "step-00000040.tmp", "step-00000000.tmp"


@pytest.fixture(scope="module")
def divided(opened):
    """The undisturbed run: its tensors, its rows, its files."""
    stage = opened[0]
    stage.set("prepared")
    for outcome in run_both(stage, options=FSDP):
        check_manners(outcome, codes=[0])
    found = tensors(stage.run), rows(stage.run), names(stage.path)
    assert any("shard-00002" in name for name in found[0])
    return found


def check_goes_on(stage: Stage, divided) -> None:
    """The same command ends as the undisturbed run, bit for bit, from whole checkpoints alone."""
    check_checkpoints(stage)
    for outcome in run_both(stage, options=FSDP):
        check_manners(outcome, codes=[0])
    assert (tensors(stage.run), rows(stage.run), names(stage.path)) == divided


@dataclass(frozen=True)
class Case:
    """Something happens on one rank as it comes to an event of a save."""

    rank: int
    event: str
    signal: int = 0
    errno: int = 0
    codes: tuple[int, ...] = ()
    """Of both ranks, where nothing kills one."""

    @property
    def fault(self) -> Fault:
        return Fault(self.event, 1, signal=self.signal, errno=self.errno)

    def __str__(self) -> str:
        what = signal.Signals(self.signal).name if self.signal else errno.errorcode[self.errno]
        return f"{what} on rank {self.rank}, {self.event}"


KILLS = [
    Case(1, f"^open .*{TRIAL}/shard-00002", signal.SIGKILL),
    Case(1, f"^open .*{SAVE}/shard-00002", signal.SIGKILL),
    Case(1, f"^read .*{SAVE}/training_state/shard-00002", signal.SIGKILL),
    Case(0, f"^fsync .*{SAVE}/training_state/shard-00001", signal.SIGKILL),
    Case(0, f"^open .*{SAVE}/manifest.json", signal.SIGKILL),
    Case(0, f"^rename .*{SAVE} ->", signal.SIGKILL),
    Case(1, f"^open .*{SAVE}/shard-00002", signal.SIGTERM),
    Case(0, f"^fsync .*{SAVE}/shard-00001", signal.SIGUSR1),
]
ERRORS = [
    Case(1, f"^open .*{SAVE}/shard-00002", errno=errno.ENOSPC, codes=(0,)),
    Case(1, f"^fsync .*{SAVE}/training_state/shard-00002", errno=errno.EIO, codes=(0,)),
    Case(0, f"^open .*{SAVE}/manifest.json", errno=errno.EDQUOT, codes=(0,)),
    Case(0, f"^mkdir .*{SAVE}$", errno=errno.EROFS, codes=(0,)),
    Case(1, f"^open .*{LAST_SAVE}/shard-00002", errno=errno.ENOSPC, codes=(1,)),
    Case(1, f"^open .*{TRIAL}/shard-00002", errno=errno.ENOSPC, codes=(1,)),
]


@pytest.mark.parametrize("kill", KILLS, ids=str)
def test_a_rank_that_ends_during_a_save_costs_no_more_than_that_save(stage: Stage, divided, kill: Case):
    stage.set("prepared")
    outcomes = run_both(stage, {kill.rank: kill.fault}, FSDP)
    for outcome in outcomes:
        assert not outcome.is_late, f"the other rank waits for ever: {outcome.told}"
    codes = [outcome.code for outcome in outcomes]
    if kill.signal == signal.SIGKILL:
        assert codes[kill.rank] == -signal.SIGKILL
        assert codes[1 - kill.rank] != 0
    else:
        assert codes == [75, 75], outcomes[0].told
    check_goes_on(stage, divided)


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_a_write_that_fails_on_one_rank_fails_on_all(stage: Stage, divided, error: Case):
    stage.set("prepared")
    outcomes = run_both(stage, {error.rank: error.fault}, FSDP)
    check_manners(outcomes[0], codes=error.codes)
    assert outcomes[1].code == outcomes[0].code
    assert "Traceback" not in outcomes[1].stderr, outcomes[1].told
    said = outcomes[0].stderr  # rank 0 speaks for both
    assert any(words in said for words in ("not saved", "could not be saved", "cannot be saved")), said
    check_goes_on(stage, divided)


def test_a_launcher_that_is_killed_during_a_save(stage: Stage, divided):
    stage.set("prepared")
    fault = Fault(f"^open .*{SAVE}/shard-00002", 1, signal=signal.SIGKILL, to_parent=True)
    stopped = torchrun(stage, ["train", "recipe.yaml", "--run-dir", RUN, "--resume-or-start", *FSDP], {1: fault})
    assert stopped.returncode != 0, stopped.stderr
    assert read_status(stage.run).state in ("preempted", "resumable", "failed")
    check_goes_on(stage, divided)
