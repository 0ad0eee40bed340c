"""Run commands through the forking server, and what holds for every one of them, whatever was broken."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.faults.inject import Fault

DOCUMENTED = (0, 1, 2, 3, 4, 75)
TIMEOUT = 30.0  # seconds
MEMORY = 3 << 30  # bytes
MOST_OUTPUT = 1 << 20  # bytes of each stream; a command that writes more hangs
PROJECT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """How a command ended. `code` is minus the signal's number when one killed it."""

    command: str
    code: int
    stdout: str
    stderr: str
    memory: int
    is_late: bool

    @property
    def told(self) -> str:
        """Everything, for a failure's message."""
        ending = f"`inl {self.command}` ended with {self.code}"
        return f"{ending}; stdout:\n{self.stdout[-1500:]}\nstderr:\n{self.stderr[-6000:]}"

    def result(self) -> dict[str, Any]:
        """The JSON object on stdout."""
        return json.loads(self.stdout)


def check_manners(outcome: Outcome, *, codes: Sequence[int] = DOCUMENTED) -> None:
    """No traceback, no hang, no flood of memory, one of `codes`, and a failure that says something short."""
    assert not outcome.is_late, f"a hang over {TIMEOUT:.0f} s: {outcome.told}"
    for word in ("Traceback", "Exception ignored", "Fatal Python error", "terminate called"):
        assert word not in outcome.stderr, outcome.told
    assert outcome.code in codes, f"expected one of {tuple(codes)}: {outcome.told}"
    assert outcome.memory < MEMORY, f"{outcome.memory / 1e9:.1f} GB: {outcome.told}"
    if outcome.code:
        assert outcome.stderr.strip(), f"failed without a word: {outcome.told}"
        assert len(outcome.stderr) < 20_000, f"a flood of words: {outcome.told}"


class Server:
    """The client of server.py: starts it, and runs commands in `directory`."""

    def __init__(self, directory: Path, scratch: Path) -> None:
        self.directory, self.scratch, self.number = directory, scratch, 0
        ours, theirs = socket.socketpair()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT)}
        command = [sys.executable, "-m", "tests.faults.server", str(theirs.fileno())]
        self.process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
        theirs.close()
        self.stream = ours.makefile("rw", encoding="utf-8")
        ours.close()

    def close(self) -> None:
        """End the server; it has no children then."""
        self.stream.close()
        self.process.wait(timeout=30)

    def start(
        self,
        *arguments: object,
        faults: Sequence[Fault] = (),
        log: Path | None = None,
        stdout: str | None = None,
        stderr: str | None = None,
        **environment: str,
    ) -> "Started":
        """Begin a command; `stdout` and `stderr` are files to write to instead, or "" for a closed stream."""
        self.number += 1
        names = [str(self.scratch / f"{self.number}.{name}") for name in ("out", "err")]
        pipes = [_open_pipe(name) for name in names]
        streams = ["/dev/null", names[0] if stdout is None else stdout, names[1] if stderr is None else stderr]
        words = [str(argument) for argument in arguments]
        child = self._ask(
            start={
                "arguments": words,
                "directory": str(self.directory),
                "streams": streams,
                "environment": environment,
                "faults": [asdict(fault) for fault in faults],
                "log": str(log) if log else None,
            }
        )
        return Started(self, child, " ".join(words), pipes)

    def run(self, *arguments: object, timeout: float = TIMEOUT, **options: Any) -> Outcome:
        """A command from its start to its end."""
        return self.start(*arguments, **options).wait(timeout)

    def _ask(self, **request: Any) -> Any:
        self.stream.write(json.dumps(request) + "\n")
        self.stream.flush()
        return json.loads(self.stream.readline())


@dataclass(frozen=True)
class Started:
    """A command that runs."""

    server: Server
    process: int
    command: str
    pipes: list[int]

    def wait(self, timeout: float = TIMEOUT) -> Outcome:
        """Its end; it is aborted when that takes longer than `timeout` seconds."""
        end = self.server._ask(wait=self.process, timeout=timeout)
        texts = [_drain(pipe).decode(errors="replace") for pipe in self.pipes]
        return Outcome(self.command, end["code"], *texts, memory=end["memory"], is_late=end["is_late"])


def _open_pipe(name: str) -> int:
    """A named pipe that holds all that a command says: a limit on the size of files does not apply to it."""
    os.mkfifo(name)
    pipe = os.open(name, os.O_RDWR | os.O_NONBLOCK)
    fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, MOST_OUTPUT)
    return pipe


def _drain(pipe: int) -> bytes:
    """Everything in a pipe, which is closed then."""
    text = b""
    with suppress(BlockingIOError):
        while True:
            text += os.read(pipe, MOST_OUTPUT)
    os.close(pipe)
    return text
