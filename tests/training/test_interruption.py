"""What signals do to a run: in the loop a request, elsewhere an interruption, twice an end; and orphans end."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from inl_core.errors import Interrupted
from inl_core.training import interruption
from inl_core.training.interruption import StopSignal

SIGNALS = [getattr(signal, name) for name in interruption.SIGNALS if hasattr(signal, name)]


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """No signal is ignored, as SIGHUP is under `nohup` and SIGINT in the background of a script."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_in_the_loop_a_signal_is_a_request_and_elsewhere_it_interrupts(number):
    before = signal.getsignal(number)
    with StopSignal() as stop, stop.deferred():
        os.kill(os.getpid(), number)
        assert stop.requested
        assert stop.name == number.name
        os.kill(os.getpid(), number)  # at once: `timeout` signals a process and its group
    assert signal.getsignal(number) == before
    with pytest.raises(Interrupted, match=number.name), StopSignal():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_a_signal_that_was_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def impatient(monkeypatch):
    """impatient(end) -> a StopSignal for which even a signal that follows at once is a second one."""

    def make(end=None):
        stop = StopSignal(end)
        monkeypatch.setattr(stop, "_same_request", -1.0)
        return stop

    return make


@pytest.fixture
def restored():
    """The signals do after the test what they did before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_in_a_process_that_is_not_ours_a_second_signal_is_a_keyboard_interrupt(impatient):
    def stopped_twice():
        with impatient() as stop, stop.deferred():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        stopped_twice()


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGTERM, [128 + signal.SIGTERM]), (signal.SIGXCPU, [])])
def test_the_system_may_repeat_that_the_processor_time_is_up(impatient, restored, number, codes):
    ended = []
    with impatient(ended.append) as stop, stop.deferred():
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
    assert ended == codes


def test_a_command_that_was_stopped_keeps_its_exit_code_whatever_comes(restored):
    ended = []
    with pytest.raises(Interrupted, match="SIGTERM"), StopSignal(ended.append):
        os.kill(os.getpid(), signal.SIGTERM)
    for number in SIGNALS:
        os.kill(os.getpid(), number)
    assert not ended


def test_a_rank_learns_the_name_of_a_signal_that_another_one_got():
    ranks = [StopSignal(), StopSignal()]
    ranks[1].name = "SIGUSR1"
    given = []
    ranks[1].share(lambda *numbers: given.append(numbers) or list(numbers))
    ranks[0].share(lambda *numbers: [a + b for a, b in zip(numbers, given[0], strict=True)])
    assert [rank.name for rank in ranks] == ["SIGUSR1", "SIGUSR1"]


# As `impatient`; `for_ever` stands for a long call into a library.
_PROCESS = """
import os, sys, threading
from inl_core.training import interruption
from inl_core.training.interruption import StopSignal
interruption._PATIENCE = 0.1
for_ever = threading.Event().wait
with StopSignal(os._exit) as stop:
    stop._same_request = -1.0
    stop.leave_word = lambda: print("word", flush=True)
    {body}
"""
_TWICE = "with stop.deferred(): os.kill(os.getpid(), 15); os.kill(os.getpid(), 10); for_ever()"
_BUSY = """
    try: os.kill(os.getpid(), 15); for_ever()
    except KeyboardInterrupt: for_ever()
"""


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [(_TWICE, 128 + 10, ""), (_BUSY, 75, "word\n")],
    ids=["second signal", "busy elsewhere"],
)
def test_a_process_that_does_not_leave_is_ended(body, code, said):
    command = [sys.executable, "-c", _PROCESS.format(body=body)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=50)
    assert (done.returncode, done.stdout) == (code, said)


def test_a_worker_without_its_launcher_is_asked_to_leave():
    worker = _PROCESS.format(body="print('up', flush=True); sys.stdin.read(1); for_ever()")
    launcher = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {worker!r}], stderr=subprocess.STDOUT)\n"
        "child.wait()"
    )
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "test"}
    pipe, command = subprocess.PIPE, [sys.executable, "-c", launcher]
    process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout
    assert process.stdout.readline() == "up\n"
    process.kill()
    said, _ = process.communicate(timeout=50)  # ends when the worker has closed its output too
    assert "Interrupted: stopped by SIGTERM" in said


ORPHAN = """
import os, sys, threading, time
os.environ["TORCHELASTIC_RUN_ID"] = "x"
from inl_core.training import interruption
from inl_core.training.interruption import StopSignal
interruption._ORPHAN_PATIENCE = 0.5
parent, gone = os.getppid(), threading.Event()
interruption.os.getppid = lambda: 1 if gone.is_set() else parent
with StopSignal(os._exit) as stop, stop.deferred():
    saving = {saving}
    stop.is_saving = lambda: saving
    gone.set()
    time.sleep(4)  # a save that takes longer than the patience
    print("saved", flush=True)
    saving = False
    threading.Event().wait()
"""


@pytest.mark.parametrize(("saving", "said"), [(True, "saved\n"), (False, "")])
def test_a_worker_without_its_launcher_may_save_for_as_long_as_it_takes(saving, said):
    outcome = subprocess.run(
        [sys.executable, "-c", ORPHAN.format(saving=saving)], capture_output=True, text=True, timeout=60
    )
    assert (outcome.returncode, outcome.stdout) == (75, said), outcome.stderr
