"""A process of its own for each candidate and mode, kept alive: its memory is its own, its turns are asked for.

    with Worker(candidate, mode, settings) as worker:
        facts = worker.start()                    # build, warm up, compile
        seconds = worker.turn()                   # of one repetition, the mean of a turn
        peak, parts = worker.peak_memory(), worker.profile()

- Spawned, not forked: nothing of the parent is in its memory, and OpenMP starts clean.
- What the worker's libraries write to stderr goes to a file and is shown only if the worker dies.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from inl_core.analysis.bench.settings import BenchSettings, Candidate, Mode
from inl_core.errors import InlError, RecipeError

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
    """The parent's side; `candidate` None is the worker that measures the ceiling."""

    def __init__(self, candidate: Candidate | None, mode: Mode, settings: BenchSettings) -> None:
        self.candidate, self.settings = candidate, settings
        self.mode: Mode = mode
        self.name = f"{candidate.name}, {mode}" if candidate else "matrix product"
        context = multiprocessing.get_context("spawn")
        self._log = Path(tempfile.mkstemp(prefix="inl-bench-", suffix=".log")[1])
        self._connection, theirs = context.Pipe()
        # A daemon ends with its parent, whatever ends the parent.
        self._process = context.Process(target=_serve, args=(theirs, candidate, mode, settings, self._log), daemon=True)
        self._begin = time.perf_counter()
        self._process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self._connection.close()  # the worker's recv ends
        self._process.join(_SECONDS_TO_LEAVE)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._log.unlink(missing_ok=True)

    def start(self) -> Facts:
        """Build and warm up; InlError when the model cannot be built or does not run in this mode."""
        return Facts(self._ask("start"), time.perf_counter() - self._begin)

    def turn(self) -> float:
        """Seconds of one repetition, the mean over the turn's; of the ceiling, FLOPs a second."""
        return self._ask("turn")

    def peak_memory(self) -> int:
        """Bytes above the bare import since the warm-up."""
        return self._ask("peak_memory")

    def profile(self) -> Any:
        """PartTimes of one repetition."""
        return self._ask("profile")

    def _ask(self, what: str) -> Any:
        try:
            self._connection.send(what)
            kind, value = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self._process.join(_SECONDS_TO_LEAVE)
            raise InlError(self._death()) from None
        if kind == "done":
            return value
        if kind == "bug":
            raise RuntimeError(f"the worker of {self.name} failed:\n{value}")
        raise (RecipeError if kind == "recipe" else InlError)(f"{self.name}: {value}")

    def _death(self) -> str:
        code = self._process.exitcode
        if code == -signal.SIGKILL:
            return f"{self.name}: the worker was killed, probably for want of memory; try a smaller --batch-size"
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{self.name}: the worker ended with code {code}{': ' + lines[-1] if lines else ''}"


def _serve(connection: Connection, candidate: Candidate | None, mode: Mode, settings: BenchSettings, log: Path) -> None:
    """The worker's side: do what is asked until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C too, and hangs up
    with log.open("wb") as file:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    job = None
    while True:
        try:
            what = connection.recv()
        except (EOFError, OSError):
            return
        try:
            if job is None:
                job = _Job(candidate, mode, settings)
            answer = ("done", getattr(job, what)())
        except RecipeError as error:
            answer = ("recipe", str(error))
        except Exception as error:
            answer = _described(error, mode)
        connection.send(answer)


def _described(error: Exception, mode: Mode) -> tuple[str, str]:
    """A user's error in a line, anything else with its traceback."""
    import torch

    if isinstance(error, InlError):
        return "failed", str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        return "failed", "not enough memory; try a smaller --batch-size"
    if mode == "compiled" and type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return "failed", f"does not compile here ({reason[0]}); try --mode eager"
    return "bug", traceback.format_exc()


class _Job:
    """The work, its clock and its memory, inside the worker."""

    def __init__(self, candidate: Candidate | None, mode: Mode, settings: BenchSettings) -> None:
        import torch

        from inl_core.analysis.bench import inl_work, llama_work, measuring

        torch.set_num_threads(settings.threads)
        self.candidate, self.mode, self.settings = candidate, mode, settings
        self.device, self.measuring = torch.device(settings.device), measuring
        is_llama = candidate is not None and candidate.kind == "llama"
        if is_llama:
            llama_work.import_llama()
        import torch._dynamo  # torch imports it at the first optimizer step; code is not the model's memory

        if mode == "compiled":
            import torch._inductor.compile_fx
        self.memory = measuring.PeakMemory(self.device)
        self.build: Any = llama_work.build_llama_work if is_llama else inl_work.build_inl_work
        self.work: Any = None

    def start(self) -> int:
        """Build, warm up; the number of parameters."""
        if self.candidate is None:
            from inl_core.analysis.bench.ceiling import Gemm

            self.work = Gemm(self.settings)
            return 0
        self.work = self.build(self.candidate, self.settings, compiled=self.mode == "compiled")
        for _ in range(self.settings.warmup):
            self.work.run()
        self.measuring.synchronize(self.device)
        self.memory.reset()
        return self.work.num_parameters

    def turn(self) -> float:
        """One turn; in training and prefill one repetition that does not count comes first, after the pause."""
        if self.candidate is None:
            return self.work.rate(self.settings.steps)
        if self.settings.task != "decode":
            self.work.run()
        self.measuring.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.settings.steps):
            self.work.run()
        self.measuring.synchronize(self.device)
        return (time.perf_counter() - start) / self.settings.steps

    def peak_memory(self) -> int:
        """Since the warm-up."""
        return self.memory.read()

    def profile(self) -> Any:
        """Parts of a repetition, after two under the same ranges."""
        from inl_core.analysis.bench.parts import profile_parts, ranges

        repetitions = 1 if self.settings.task == "decode" else _PROFILED_REPETITIONS
        if self.settings.task == "decode":  # a whole generation is more events than can be read
            shorter = replace(self.settings, new_tokens=min(_PROFILED_TOKENS, self.settings.new_tokens))
            self.work = self.build(self.candidate, shorter, compiled=False)
        if self.mode == "compiled":
            self.work.compile_parts()
        with ranges(self.work.parts, self.work.functions):
            for _ in range(2):
                self.work.run()
            return profile_parts(self.work.run, self.device, repetitions=repetitions)
