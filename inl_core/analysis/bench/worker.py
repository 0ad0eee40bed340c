"""A process for each candidate and mode, kept alive: its memory is its own, and it takes a turn whenever it is asked.

    with Worker(candidate, mode, settings) as worker:
        facts = worker.start()                    # build, warm up, compile
        seconds = worker.turn()                   # of one repetition, the mean of a turn
        peak, parts = worker.peak_memory(), worker.profile()

- Spawned, not forked: nothing of the parent is in its memory, and OpenMP starts clean.
- What its libraries write to stderr goes to a file, whose last line is shown if the worker dies.
"""

import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import torch

from inl_core.analysis.bench.ceiling import build_ceiling
from inl_core.analysis.bench.inl_work import build_inl_work
from inl_core.analysis.bench.llama_work import build_llama_work, import_llama
from inl_core.analysis.bench.measuring import PeakMemory, synchronize
from inl_core.analysis.bench.parts import PartTimes, profile_parts, ranges
from inl_core.analysis.bench.settings import BenchSettings, Candidate, Mode
from inl_core.errors import InlError

_SECONDS_TO_LEAVE = 5.0
_PROFILED_TOKENS = 16
_PROFILED_REPETITIONS = 3


@dataclass(frozen=True)
class Facts:
    """What a started worker says of itself."""

    num_parameters: int
    seconds_to_ready: float
    """From the process's start to the end of the warm-up."""


class Worker:
    """The parent's side; without a candidate the worker repeats the matrix product that is the ceiling."""

    def __init__(self, candidate: Candidate | None, mode: Mode, settings: BenchSettings) -> None:
        self.candidate, self.settings = candidate, settings
        self.mode: Mode = mode
        self.name = f"{candidate.name}, {mode}" if candidate else "matrix product"
        context = multiprocessing.get_context("spawn")
        self._log = Path(tempfile.mkstemp(prefix="inl-bench-", suffix=".log")[1])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, candidate, mode, settings, self._log), daemon=True)
        self._begin = time.perf_counter()
        self._process.start()
        theirs.close()  # so that only the worker holds it, and its death is the end of the connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._connection.close()  # the worker stops waiting for the next question, and ends
        self._process.join(_SECONDS_TO_LEAVE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._log.unlink(missing_ok=True)

    def start(self) -> Facts:
        """Build and warm up; InlError when the model cannot be built or does not run in this mode."""
        return Facts(self._ask("start"), time.perf_counter() - self._begin)

    def turn(self) -> float:
        """Seconds of one repetition, the mean over the turn's."""
        return self._ask("turn")

    def peak_memory(self) -> int:
        """The most bytes held since the warm-up, above what the bare imports hold."""
        return self._ask("peak_memory")

    def profile(self) -> PartTimes:
        """The time of one repetition by part."""
        return self._ask("profile")

    def _ask(self, what: str) -> Any:
        try:
            self._connection.send(what)
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(_SECONDS_TO_LEAVE)
            raise InlError(self._death()) from None
        if isinstance(answer, InlError):
            raise type(answer)(f"{self.name}: {answer}")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _death(self) -> str:
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return f"{self.name}: the worker was killed, probably for want of memory; try a smaller --batch-size"
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{self.name}: the worker ended with code {code}{': ' + lines[-1] if lines else ''}"


def _serve(connection: Connection, candidate: Candidate | None, mode: Mode, settings: BenchSettings, log: Path) -> None:
    """The worker's side: do what is asked until the parent closes the connection or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and closes the connection
    with log.open("wb") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    job = None
    while True:
        try:
            what = connection.recv()
        except (EOFError, OSError):
            return
        try:
            job = job or _Job(candidate, mode, settings)
            answer = getattr(job, what)()
        except Exception as error:
            answer = _as_sent(error, mode)
        connection.send(answer)


def _as_sent(error: Exception, mode: Mode) -> Exception:
    """What the parent is to raise: an InlError where the user can do something, else one with the traceback."""
    if isinstance(error, InlError):
        return error
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return InlError("not enough memory; try a smaller --batch-size")
    if mode == "compiled" and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return InlError(f"does not compile here ({reason[0]}); try --mode eager")
    return RuntimeError(f"the worker failed:\n{traceback.format_exc()}")


class _Job:
    """The work, its clock and its memory, inside the worker."""

    def __init__(self, candidate: Candidate | None, mode: Mode, settings: BenchSettings) -> None:
        torch.set_num_threads(settings.threads)
        self.candidate: Any = candidate
        self.mode, self.settings, self.device = mode, settings, torch.device(settings.device)
        self.build: Any = build_inl_work if candidate else build_ceiling
        if candidate and candidate.kind == "llama":
            self.build = build_llama_work
            import_llama()
        # Memory counts from here, so all code is imported first: torch imports this at the first optimizer step.
        import_module("torch._dynamo")
        if mode == "compiled":
            import_module("torch._inductor.compile_fx")
        self.memory = PeakMemory(self.device)

    def start(self) -> int:
        """Build, warm up; the number of parameters."""
        self.work = self.build(self.candidate, self.settings, compiled=self.mode == "compiled")
        for _ in range(self.settings.warmup):
            self.work.run()
        synchronize(self.device)
        self.memory.reset()
        return self.work.num_parameters

    def turn(self) -> float:
        """Seconds of one repetition, the mean over the turn's.

        One that does not count comes first, since the worker has been idle; not in decoding, where each takes long.
        """
        if self.candidate is None or self.settings.task != "decode":
            self.work.run()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.settings.steps):
            self.work.run()
        synchronize(self.device)
        return (time.perf_counter() - start) / self.settings.steps

    def peak_memory(self) -> int:
        """Since the warm-up."""
        return self.memory.read()

    def profile(self) -> PartTimes:
        """Parts of a repetition, after two more to warm up."""
        repetitions = _PROFILED_REPETITIONS
        if self.settings.task == "decode":  # a whole generation is more events than can be read
            repetitions = 1
            shorter = replace(self.settings, new_tokens=min(_PROFILED_TOKENS, self.settings.new_tokens))
            self.work = self.build(self.candidate, shorter, compiled=False)
        if self.mode == "compiled":
            self.work.compile_parts()
        with ranges(self.work.timed):
            for _ in range(2):
                self.work.run()
            return profile_parts(self.work.run, self.device, repetitions=repetitions)
