"""How long the start takes: of the command line, of the imports, and of a run until its first training step is done.

- Every command runs in a fresh interpreter, by turns. The first round does not count: it only brings the files into the
  page cache.
- The first training step is timed from the start of a process until one eager step is done: imports, building and
  initialising the model, the step.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from inl_core.analysis.bench.measuring import Spread, spread
from inl_core.analysis.bench.settings import BenchSettings, Candidate
from inl_core.analysis.bench.worker import Worker
from inl_core.errors import InlError

COMMANDS: dict[str, tuple[str, ...]] = {
    "python": ("-c", "pass"),
    "inl --help": ("-m", "inl_cli", "--help"),
    "import inl_core": ("-c", "import inl_core"),
    "import torch": ("-c", "import torch"),
    "import inl_core.model": ("-c", "import inl_core.model"),
}


def measure_startup(
    candidates: Sequence[Candidate], settings: BenchSettings, progress: Callable[[str, int, int], None]
) -> dict[str, Spread]:
    """Seconds of each thing started, in `settings.rounds` rounds after one that does not count."""
    seconds: dict[str, list[float]] = {}
    for number in range(settings.rounds + 1):
        progress("measuring", number, settings.rounds + 1)
        for name, arguments in COMMANDS.items():
            seconds.setdefault(name, []).append(_run(name, arguments))
        for candidate in candidates:
            seconds.setdefault(f"first training step, {candidate.name}", []).append(_first_step(candidate, settings))
    return {name: spread(values[1:]) for name, values in seconds.items()}


def _run(name: str, arguments: Sequence[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, encoding="utf-8", errors="replace")
    seconds = time.perf_counter() - start
    if done.returncode:
        raise InlError(f"{name}: {(done.stderr.strip() or f'exit code {done.returncode}').splitlines()[-1]}")
    return seconds


def _first_step(candidate: Candidate, settings: BenchSettings) -> float:
    once = replace(settings, task="train", warmup=1)
    with Worker(candidate, "eager", once) as worker:
        return worker.start().seconds_to_ready
