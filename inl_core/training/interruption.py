"""Signals, or a time limit, that ask a run to end, and what it does about them.

- Every one of SIGNALS asks for the same: save and leave. A signal that was ignored when the process started (nohup
  ignores SIGHUP) stays ignored.
- In the training loop the first signal is a request, which is honoured between two steps. Elsewhere nothing needs to be
  saved, and the signal interrupts at once.
- A second signal does not wait for the saving. A command's process ends there and then, with 128 + the signal's number;
  a process that is not ours to end (a notebook, say) gets a KeyboardInterrupt.
- A time limit (time_limit.py) is a request, too, but no signal: the first signal after it is still the first one.
- A worker whose torchrun is gone is asked to leave too, because nobody else would end it, and a resumed run would find
  the directory still in use.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Self

from inl_core.errors import Interrupted
from inl_core.training.time_limit import MAX_HOURS, SLURM, TimeLimit

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGPWR")
"""The signals that are listened to, where the system has them. SIGXCPU says that the processor time is used up, SIGPWR
that the power fails."""
_REPEATED = "SIGXCPU"
"""The system sends this one again every second, so it never counts as a second signal."""
_LAUNCHED = "TORCHELASTIC_RUN_ID"
"""What torchrun puts into the environment of each worker."""
_PATIENCE = 10.0
"""Seconds that the work outside the training loop is given to be interrupted; a long call into a library cannot be."""
_ORPHAN_PATIENCE = 60.0
"""Seconds that a worker without its launcher is given until it saves, and after that; it may be waiting for another
worker that is gone. How long a save itself takes does not count."""


class StopSignal:
    """While this is entered, the process leaves in good order when a signal asks it to.

    The first signal sets `requested`, and raises KeyboardInterrupt unless it is `deferred`. On leaving, a
    KeyboardInterrupt that a first signal raised becomes Interrupted.

    Args:
        end: ends the process at once with an exit code, where the process is a command's own. Signals that come after
            such a command was stopped are ignored, so that it still ends with the exit code that says so. With None
            the process is never ended.
    """

    def __init__(self, end: Callable[[int], object] | None = None) -> None:
        self.started = time.monotonic()
        self.requested, self.name = False, "another process"
        self.limit: TimeLimit | None = None
        """When the run must have saved, where somebody has said so."""
        self.leave_word: Callable[[], None] | None = None
        """Is called before the process is ended because it was busy for too long outside of the loop."""
        self.is_saving: Callable[[], bool] = lambda: False
        """Whether the state is being saved just now."""
        self._end = end
        self._defers = self._is_second = False
        self._first = 0.0
        # One request may come as two signals: `timeout`, cluster managers and torchrun signal a process and its group.
        self._same_request = 5.0 if _LAUNCHED in os.environ else 0.5
        self._previous: dict[int, object] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_pipe = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread listen
        self._pipe = os.pipe()
        for descriptor in self._pipe:
            os.set_blocking(descriptor, False)
        # The system writes the number of each signal here at once, whatever the main thread is waiting for.
        self._previous_pipe = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, args=(self._pipe[0],), daemon=True, name="signals")
        self._thread.start()
        for number in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        is_ending = self.requested and self._end is not None
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if is_ending else handler)  # type: ignore[arg-type]
        if self._pipe is not None and self._thread is not None:
            signal.set_wakeup_fd(self._previous_pipe)
            os.write(self._pipe[1], b"\0")  # no signal has this number: the thread ends
            self._thread.join()
            for descriptor in self._pipe:
                os.close(descriptor)
        if kind is KeyboardInterrupt and self.requested and not self._is_second:
            raise Interrupted(f"stopped by {self.name}; the same command goes on") from None

    def is_asking(self) -> bool:
        """Whether a signal came, or the time is up; the training loop asks this between its steps."""
        if not self.requested and self.limit is not None and self.limit.is_near():
            self.requested, self.name = True, self.limit.name
        return self.requested

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """In this context a signal only sets `requested`. Once one came, later ones are requests after it too."""
        self._defers = True
        try:
            yield
        finally:
            self._defers = self.requested

    def share(self, sum_numbers: Callable[..., list[float]]) -> None:
        """Learn who asked, from the rank that knows it; every rank calls this, with World.sum_numbers."""
        names = (*SIGNALS, MAX_HOURS, SLURM)
        counts = sum_numbers(*(float(self.name == name) for name in names))
        self.name = next((name for name, count in zip(names, counts, strict=True) if count), self.name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if not self._first:
            self.requested, self.name, self._first = True, name, now
            if not self._defers:
                raise KeyboardInterrupt
        # Where the process may be ended, the watching thread does that: this handler waits for the main thread.
        elif self._end is None and name != _REPEATED and now - self._first > self._same_request:
            self._is_second = True
            raise KeyboardInterrupt

    def _watch(self, descriptor: int) -> None:
        """The watching thread: it does what must happen even while the main thread is busy."""
        launcher = os.getppid() if _LAUNCHED in os.environ else None
        first = orphaned = 0.0
        while True:
            select.select([descriptor], [], [], 1.0 if launcher or (first and not self._defers) else None)
            now = time.monotonic()
            for number in _read(descriptor):
                if number == 0:
                    return
                if number in self._previous:
                    is_second = first and now - first > self._same_request
                    first = first or now
                    if self._end and is_second and signal.Signals(number).name != _REPEATED:
                        self._end(128 + number)
            if orphaned and self.is_saving():
                orphaned = now
            is_busy = first and not self._defers and now - first > _PATIENCE
            if self._end and (is_busy or (orphaned and now - orphaned > _ORPHAN_PATIENCE)):
                self._end_unsaved(self._end)
            if launcher and not orphaned and os.getppid() != launcher:
                orphaned = now
                if not first:
                    os.kill(os.getpid(), signal.SIGTERM)

    def _end_unsaved(self, end: Callable[[int], object]) -> None:
        with suppress(Exception):
            if self.leave_word:
                self.leave_word()
        end(75)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 64)
    except BlockingIOError:  # nothing there: the wait was over
        return b""
