"""Signals that ask a run to end, and what it does about them.

- SIGINT, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 all ask the same: save and leave. One that was ignored when the process
  started (nohup does that to SIGHUP) stays ignored.
- In the training loop the first signal is a request, honoured between two steps; elsewhere nothing needs saving, and it
  interrupts at once. A second signal ends the process there and then, with 128 + its number.
- A worker whose torchrun is gone is asked to leave too: nobody else would end it, and a resume must not meet it.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from inl_core.errors import Interrupted

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
_LAUNCHED = "TORCHELASTIC_RUN_ID"
"""What torchrun puts into the environment of each worker."""
_PATIENCE = 10.0
"""Seconds that the work outside the training loop may take to be interrupted: a long call into a library may not be."""
_ORPHAN_PATIENCE = 60.0
"""Seconds that a worker without its launcher has to save; it may wait for a peer that is gone."""


class StopSignal:
    """While entered, the process leaves in good order when it is asked to.

    The first signal sets `requested`, and raises KeyboardInterrupt unless the loop `defers` it. On leaving, a
    KeyboardInterrupt that came of a signal becomes Interrupted.
    """

    def __init__(self) -> None:
        self.requested, self.name = False, "another process"
        self._defers = False
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
        for number in (getattr(signal, name) for name in _NAMES if hasattr(signal, name)):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._pipe is not None and self._thread is not None:
            signal.set_wakeup_fd(self._previous_pipe)
            os.write(self._pipe[1], b"\0")  # no signal has this number: the thread ends
            self._thread.join()
            for descriptor in self._pipe:
                os.close(descriptor)
        if kind is KeyboardInterrupt and self.requested:
            raise Interrupted(f"stopped by {self.name}; the same command goes on") from None

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Signals are requests in here: look at `requested`. One that came is not forgotten on leaving."""
        self._defers = True
        try:
            yield
        finally:
            self._defers = self.requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            return  # the watching thread counts
        self.requested, self.name = True, signal.Signals(number).name
        if not self._defers:
            raise KeyboardInterrupt

    def _watch(self, descriptor: int) -> None:
        """What must happen even while the main thread is busy; a thread of its own."""
        launcher = os.getppid() if _LAUNCHED in os.environ else None
        # The same request may come twice: `timeout` and cluster managers signal a process and its group, torchrun too.
        same_request = 5.0 if launcher else 0.5
        first = orphaned = 0.0
        while True:
            select.select([descriptor], [], [], 1.0 if launcher or (first and not self._defers) else None)
            now = time.monotonic()
            for number in _read(descriptor):
                if number == 0:
                    return
                if number in self._previous:
                    first = first or now
                    if now - first > same_request:
                        os._exit(128 + number)
            if (first and not self._defers and now - first > _PATIENCE) or (
                orphaned and now - orphaned > _ORPHAN_PATIENCE
            ):
                os._exit(75)
            if launcher and not orphaned and os.getppid() != launcher:
                orphaned = now
                if not first:
                    os.kill(os.getpid(), signal.SIGTERM)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 64)
    except BlockingIOError:  # nothing there: the wait was over
        return b""
