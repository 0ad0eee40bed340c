"""What signals do to a run: in the loop a request, elsewhere an interruption, twice an end; and orphans end."""

import os
import signal
import subprocess
import sys

import pytest

from inl_core.errors import Interrupted
from inl_core.training.interruption import StopSignal

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


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


_PROCESS = """
import os, signal, sys, threading, time
from inl_core.training import interruption
from inl_core.training.interruption import StopSignal
interruption._PATIENCE = 0.1
with StopSignal() as stop:
    {body}
"""
_TWICE = "with stop.deferred(): os.kill(os.getpid(), 15); time.sleep(0.7); os.kill(os.getpid(), 10); time.sleep(60)"
# A thread that the interruption does not reach stands for a long call into a library.
_BUSY = """
    try: os.kill(os.getpid(), 15); time.sleep(60)
    except KeyboardInterrupt: time.sleep(60)
"""


@pytest.mark.parametrize(("body", "code"), [(_TWICE, 128 + 10), (_BUSY, 75)], ids=["second signal", "busy elsewhere"])
def test_a_process_that_does_not_leave_is_ended(body, code):
    done = subprocess.run([sys.executable, "-c", _PROCESS.format(body=body)], timeout=50)
    assert done.returncode == code


def test_a_worker_without_its_launcher_is_asked_to_leave():
    worker = _PROCESS.format(body="print('up', flush=True); sys.stdin.read(1); time.sleep(60)")
    launcher = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {worker!r}], stderr=subprocess.STDOUT)\n"
        "child.wait()"
    )
    environment = os.environ | {"TORCHELASTIC_RUN_ID": "test"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", launcher], env=environment, **pipes)
    assert process.stdout.readline() == "up\n"
    process.kill()
    said, _ = process.communicate(timeout=50)  # ends when the worker has closed its output too
    assert "Interrupted: stopped by SIGTERM" in said
