"""Faults inside a command's own process: what it does is counted, and at a chosen count something breaks.

- An event is one line of text: `open PATH`, `read PATH`, `rename PATH -> PATH`, `mkdir PATH`, `remove PATH`,
  `rmdir PATH`, `fsync PATH`, `step` (an optimizer step begins) or `forward` (the model runs). Paths are relative to the
  working directory; files elsewhere are not watched.
- A fault names the event it waits for by a regular expression, which of them it is, and what happens then, before the
  event: a signal, an OSError, or a limit on the size of files (which makes writes stop short, in native code too).
- The project's code has no part in this: what it does to files is heard from Python's audit hooks.
"""

import os
import re
import resource
import select
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NEVER_MIND = (".git", "__pycache__")


@dataclass(frozen=True)
class Fault:
    """What happens at the `number`-th event that `event` matches (searched for, not anchored); 0 is every one."""

    event: str
    number: int
    signal: int = 0
    """Sent to the process itself, or to its parent."""
    to_parent: bool = False
    errno: int = 0
    """Raised in place of what the event would have done."""
    file_size: int = -1
    """No file may grow beyond this from then on; -1 does nothing."""
    meet: str = ""
    """Wait here until another process comes to a FIFO of this name too, three seconds at most."""


class Faults:
    """Sees the events of this process and lets the faults happen."""

    def __init__(self, faults: list[Fault], log: Path | None) -> None:
        self.faults = [(fault, re.compile(fault.event)) for fault in faults]
        self.counts = [0] * len(faults)
        self.log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None
        self.base = str(Path.cwd()) + os.sep
        self.lock, self.busy = threading.Lock(), threading.local()  # a checkpoint is written by a thread of its own

    def install(self) -> None:
        """Begin to watch; there is no end to it but the process's own."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a limit on the size of files is an error, not an end
        sys.addaudithook(self._audit)
        os.fsync = self._before(os.fsync, lambda descriptor: f"fsync {self._named(descriptor)}")
        from inl_core.model.language_model import IntegratorLanguageModel
        from inl_core.training.optimizers import Optimizers

        Optimizers.step = self._before(Optimizers.step, lambda *_: "step")
        IntegratorLanguageModel.forward = self._before(IntegratorLanguageModel.forward, lambda *_: "forward")

    def happen(self, event: str) -> None:
        """An event is about to take place."""
        if getattr(self.busy, "now", False):
            return
        self.busy.now = True  # what a fault itself does is no event
        try:
            with self.lock:
                if self.log is not None:
                    os.write(self.log, f"{event}\n".encode())
                due = [fault for fault, index in self._matching(event) if fault.number in (0, self.counts[index])]
            for fault in due:
                _break(fault, event)
        finally:
            self.busy.now = False

    def _matching(self, event: str) -> list[tuple[Fault, int]]:
        """The faults that wait for such an event, each with its place; the event is counted."""
        found = [(fault, index) for index, (fault, pattern) in enumerate(self.faults) if pattern.search(event)]
        for _, index in found:
            self.counts[index] += 1
        return found

    def _before(self, function: Callable, describe: Callable[..., str]) -> Callable:
        def call(*arguments, **options):
            self.happen(describe(*arguments))
            return function(*arguments, **options)

        return call

    def _audit(self, name: str, arguments: tuple) -> None:
        event = None
        if name == "open":
            path = self._ours(arguments[0])
            event = path and f"{'open' if arguments[2] & _WRITING else 'read'} {path}"
        elif name == "os.rename":
            old, new = self._ours(arguments[0]), self._ours(arguments[1])
            event = old and f"rename {old} -> {new}"
        elif name in ("os.mkdir", "os.remove", "os.rmdir"):
            path = self._ours(arguments[0], directory=arguments[-1])
            event = path and f"{name.removeprefix('os.')} {path}"
        if event:
            self.happen(event)

    def _named(self, descriptor: int) -> str:
        return _name_of(descriptor).removeprefix(self.base)

    def _ours(self, path: object, directory: int = -1) -> str | None:
        """The path below the working directory, or None for any other file; it may begin at an open directory."""
        if not isinstance(path, str | bytes | os.PathLike):
            return None
        start = self.base if directory == -1 else _name_of(directory)
        name = os.path.normpath(os.path.join(start, os.fsdecode(path)))  # noqa: PTH118 - a Path costs more
        if not name.startswith(self.base) or any(part in name for part in _NEVER_MIND):
            return None
        return name.removeprefix(self.base)


def _name_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _break(fault: Fault, event: str) -> None:
    if fault.meet:
        _meet(fault.meet)
    if fault.signal:
        os.kill(os.getppid() if fault.to_parent else os.getpid(), fault.signal)
    if fault.file_size >= 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_size, resource.RLIM_INFINITY))
    if fault.errno:
        raise OSError(fault.errno, os.strerror(fault.errno), event.split()[1])


def _meet(name: str) -> None:
    """Wait until two processes are here, so that they go on at the same moment."""
    try:
        os.mkfifo(name)
        is_second = False
    except FileExistsError:
        is_second = True
    meeting = os.open(name, os.O_RDWR)  # never closed: what is in a FIFO is lost with the last one who has it open
    if is_second:
        os.write(meeting, b"x")
    else:
        select.select([meeting], [], [], 3)  # the other one may have been refused before it came here
