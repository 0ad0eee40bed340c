"""A command killed at any moment goes on to the same run, bit for bit: weights, optimizer, metrics, data."""

import random
import re
import signal
from dataclasses import dataclass

import pytest

from tests.faults.commands import Outcome, check_manners
from tests.faults.conftest import SEED, chosen
from tests.faults.inject import Fault
from tests.faults.subject import Stage, Whole, check_checkpoints, check_is_whole

pytestmark = pytest.mark.slow

PHASES = {
    "preparing data": (r" data\b", "start"),
    "before the first step": (r" run/\.?(checkpoints\.trial|recipe|environment|checkpoints$)", "prepared"),
    "steps": (r"^step$", "prepared"),
    "passes": (r"^forward$", "prepared"),  # of training and of evaluation
    "saving": (r"^(open|fsync|rename|mkdir) run/checkpoints/", "prepared"),
    "sealing": (r"rename run/checkpoints/\S+ -> run/checkpoints/step-\d+$", "prepared"),
    "retention": (r"^(remove|rmdir) run/checkpoints/", "prepared"),
    "records": (r" run/(metrics|dynamics)", "prepared"),
}
"""The events of a moment, and the state that the command begins in."""

GRACEFUL = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@dataclass(frozen=True)
class Kill:
    """A signal at a share of a phase's events."""

    phase: str
    signal: signal.Signals
    moment: float
    again: bool = False
    """Whether the command that goes on is killed too, at the same share of what it does."""

    def __str__(self) -> str:
        return f"{self.signal.name} {self.phase} at {self.moment:.2f}{' twice' if self.again else ''}"

    def fault(self, events: list[str]) -> Fault:
        """The fault in a command that does `events`."""
        pattern = PHASES[self.phase][0]
        found = sum(bool(re.search(pattern, event)) for event in events)
        assert found, f"nothing in the run is {pattern!r}"
        return Fault(pattern, 1 + int(self.moment * found), signal=self.signal)


def kills() -> list[Kill]:
    """Moments spread over each phase, each at a random place of its share."""
    dice = random.Random(SEED)
    spread = {"preparing data": 8, "before the first step": 6, "saving": 10, "retention": 4, "sealing": 4, "records": 6}
    spread |= {"steps": 3, "passes": 4}
    hard = [
        Kill(phase, signal.SIGKILL, (part + dice.random()) / parts)
        for phase, parts in spread.items()
        for part in range(parts)
    ]
    twice = [Kill(phase, signal.SIGKILL, dice.random(), again=True) for phase in spread]
    soft = [Kill(phase, number, dice.random()) for number in GRACEFUL for phase in PHASES if phase != "sealing"]
    return hard + twice + soft


KILLS = kills()


@pytest.mark.parametrize("kill", chosen(KILLS), ids=str)
def test_a_killed_run_goes_on_to_the_same_end(stage: Stage, whole: Whole, kill: Kill):
    stage.set(PHASES[kill.phase][1])
    fault = kill.fault(whole.events)
    killed = stage.go_on(faults=[fault])
    if kill.signal == signal.SIGKILL:
        assert killed.code == -signal.SIGKILL, killed.told
    else:
        check_stopped(killed, kill)
    check_checkpoints(stage)
    if kill.again:
        assert stage.go_on(faults=[fault]).code in (-signal.SIGKILL, 0)
        check_checkpoints(stage)
    done = stage.go_on()
    check_manners(done, codes=[0])
    check_is_whole(stage, whole)


def check_stopped(killed: Outcome, kill: Kill) -> None:
    """A signal that can be handled: the training loop saves; outside of it there is nothing to save."""
    check_manners(killed, codes=[75, 0])  # 0: it came in the last step, and the run was done
    if kill.phase in ("steps", "records", "retention") and killed.code:
        assert "saved" in killed.stderr.splitlines()[-1], killed.told


@pytest.mark.parametrize("moment", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_second_signal_loses_nothing_that_was_saved(
    stage: Stage, whole: Whole, second: signal.Signals, moment: float
):
    """At once it may be the first one's echo, and the save is finished; later it ends the process there and then."""
    stage.set("halfway")
    killed = stage.resume(
        faults=[
            Fault("^step$", 3, signal=signal.SIGTERM),
            Fault("^(open|fsync|rename|mkdir) run/checkpoints/", 1 + int(moment * 20), signal=second),
        ]
    )
    check_manners(killed, codes=[75, 128 + second])
    check_checkpoints(stage)
    check_manners(stage.go_on(), codes=[0])
    check_is_whole(stage, whole)
