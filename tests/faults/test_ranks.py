"""Two ranks: whichever dies, and whoever started them, nobody waits for ever and the run goes on to the same end."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pytest

from tests.faults.commands import PROJECT, TIMEOUT, Outcome, check_manners
from tests.faults.inject import Fault
from tests.faults.subject import RUN, Stage, check_checkpoints, names, rows, tensors
from tests.faults.test_kills import PHASES

pytestmark = pytest.mark.slow


def run_both(stage: Stage, faults: dict[int, Fault] | None = None, options: Sequence[str] = ()) -> list[Outcome]:
    """Train, or go on, as two processes that know of each other; without a launcher, which would end them both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    arguments = ["train", "recipe.yaml", "--run-dir", RUN, "--resume-or-start", *options]
    ranks = [
        stage.server.start(
            *arguments,
            faults=[faults[rank]] if faults and rank in faults else [],
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            MASTER_ADDR="localhost",
            MASTER_PORT=str(port),
        )
        for rank in range(2)
    ]
    return [rank.wait(2 * TIMEOUT) for rank in ranks]


@pytest.fixture(scope="session")
def pair(opened):
    """The undisturbed run of two ranks: its tensors, its rows, its files."""
    stage = opened[0]
    stage.set("prepared")
    for outcome in run_both(stage):
        check_manners(outcome, codes=[0])
    return tensors(stage.run), rows(stage.run), names(stage.path)


def check_is_pair(stage: Stage, pair) -> None:
    """The run is the undisturbed one of two ranks, bit for bit."""
    assert (tensors(stage.run), rows(stage.run), names(stage.path)) == pair


@dataclass(frozen=True)
class Kill:
    """One of the two ranks gets a signal."""

    rank: int
    signal: signal.Signals
    phase: str
    number: int

    def __str__(self) -> str:
        return f"{self.signal.name} to rank {self.rank}, {self.phase} {self.number}"


KILLS = [
    Kill(0, signal.SIGKILL, "preparing data", 20),
    Kill(0, signal.SIGKILL, "before the first step", 4),
    Kill(0, signal.SIGKILL, "saving", 20),
    Kill(0, signal.SIGKILL, "records", 20),
    Kill(1, signal.SIGKILL, "steps", 3),
    Kill(1, signal.SIGKILL, "steps", 25),
    Kill(1, signal.SIGKILL, "passes", 32),
    Kill(0, signal.SIGTERM, "steps", 8),
    Kill(1, signal.SIGTERM, "steps", 20),
]


@pytest.mark.parametrize("kill", KILLS, ids=str)
def test_a_rank_that_dies_ends_the_other_and_the_run_goes_on(stage: Stage, pair, kill: Kill):
    pattern, state = PHASES[kill.phase]
    stage.set(state)
    outcomes = run_both(stage, {kill.rank: Fault(pattern, kill.number, signal=kill.signal)})
    for outcome in outcomes:
        assert not outcome.is_late, f"the other rank waits for ever: {outcome.told}"
    codes = [outcome.code for outcome in outcomes]
    if kill.signal == signal.SIGTERM:
        assert codes == [75, 75], outcomes[0].told
    else:
        assert codes[kill.rank] == -kill.signal
        assert codes[1 - kill.rank] != 0
    check_checkpoints(stage)
    for outcome in run_both(stage):
        check_manners(outcome, codes=[0])
    check_is_pair(stage, pair)


def torchrun(stage: Stage, command: list[str], faults: dict[int, Fault]) -> subprocess.CompletedProcess[str]:
    """The command under torchrun; comes back when the launcher and both ranks have ended."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    chosen = json.dumps({rank: [asdict(fault)] for rank, fault in faults.items()})
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), "INL_FAULTS": chosen}
    return subprocess.run(
        [*launcher, "-m", "tests.faults.rank", *command],
        cwd=stage.path,
        env=environment,
        capture_output=True,  # the ranks hold the pipes too, so this waits for them
        text=True,
        timeout=180,
    )


LAUNCHED = {
    "torchrun is killed": Fault("^step$", 15, signal=signal.SIGKILL, to_parent=True),
    "torchrun is told to stop": Fault("^step$", 15, signal=signal.SIGTERM, to_parent=True),
    "torchrun is interrupted": Fault("^step$", 15, signal=signal.SIGINT, to_parent=True),
    "torchrun gets a signal that it does not pass on": Fault("^step$", 15, signal=signal.SIGUSR1, to_parent=True),
    "a rank is killed": Fault("^step$", 15, signal=signal.SIGKILL),
    "a rank is told to stop": Fault("^step$", 15, signal=signal.SIGUSR1),
}


@pytest.mark.parametrize("fault", LAUNCHED.values(), ids=LAUNCHED)
def test_torchrun_and_its_ranks_end_together_and_the_run_goes_on(stage: Stage, pair, fault: Fault):
    stage.set("prepared")
    stopped = torchrun(stage, ["train", "recipe.yaml", "--run-dir", RUN], {1: fault})
    assert stopped.returncode != 0, stopped.stderr
    check_checkpoints(stage)
    assert len(rows(stage.run)) < len(pair[1]), "the ranks trained on"
    done = torchrun(stage, ["resume", RUN], {})
    assert done.returncode == 0, done.stderr
    check_is_pair(stage, pair)
