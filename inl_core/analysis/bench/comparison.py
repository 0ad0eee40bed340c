"""Candidates by turns: every round gives each worker one turn, and figures of one round are compared with each other.

- When the machine is slow for a moment, the neighbours in one round are slow together. Every second round goes
  backwards, so that a steady drift favours nobody. The ratio is the median of the rounds' ratios.
- `best` measures both modes of each candidate in the same rounds and takes the one with the higher median.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from inl_core.analysis.bench.ceiling import ceiling_flops, flops_per_token
from inl_core.analysis.bench.measuring import Spread, spread
from inl_core.analysis.bench.parts import PartTimes
from inl_core.analysis.bench.settings import BenchSettings, Candidate, Mode
from inl_core.analysis.bench.worker import Facts, Worker
from inl_core.errors import InlError

Progress = Callable[[str, int, int], None]
"""(what is being done, turns done, turns in all)"""


@dataclass(frozen=True)
class Measured:
    """One candidate in one mode."""

    mode: Mode
    tokens_per_second: Spread
    seconds: Spread
    """Of one repetition."""
    peak_memory: int
    """Bytes above what the bare imports hold."""
    utilisation: Spread | None
    """FLOPs a second over the ceiling's, round by round; None where either is unknown."""
    parts: PartTimes | None
    facts: Facts


@dataclass(frozen=True)
class Outcome:
    """One candidate: its modes, and the one that counts."""

    candidate: Candidate
    flops_per_token: float | None
    modes: dict[Mode, Measured]
    failures: dict[Mode, str]
    """Why a mode could not be measured."""

    @property
    def best(self) -> Measured:
        """The fastest mode."""
        return max(self.modes.values(), key=lambda measured: measured.tokens_per_second.median)


@dataclass(frozen=True)
class Comparison:
    """Everything one run measured."""

    settings: BenchSettings
    outcomes: list[Outcome]
    ceiling: Spread | None
    """FLOPs a second of the matrix product."""

    @property
    def ratio(self) -> Spread | None:
        """Tokens a second of the first over the second, round by round, each in its best mode."""
        if len(self.outcomes) < 2:
            return None
        first, second = (outcome.best.tokens_per_second.values for outcome in self.outcomes[:2])
        return spread([one / other for one, other in zip(first, second, strict=True)])

    @property
    def memory_ratio(self) -> float | None:
        """Peak memory of the first over the second, each in its best mode."""
        if len(self.outcomes) < 2:
            return None
        first, second = (outcome.best.peak_memory for outcome in self.outcomes[:2])
        return first / second if first > 0 and second > 0 else None


def compare(
    candidates: Sequence[Candidate], settings: BenchSettings, progress: Progress = lambda what, done, total: None
) -> Comparison:
    """Measure the candidates by turns; InlError when one runs in none of the modes asked for."""
    with ExitStack() as stack:
        workers: dict[Worker, Facts] = {}
        failures: dict[tuple[str, Mode], str] = {}
        for candidate in candidates:
            for mode in candidate.modes(settings):
                worker = stack.enter_context(Worker(candidate, mode, settings))
                progress(f"warming up {worker.name}", 0, settings.rounds)
                try:
                    workers[worker] = worker.start()
                except InlError as error:
                    if mode == "eager" or settings.mode != "best":
                        raise
                    failures[candidate.name, mode] = str(error)
        ceilings = [stack.enter_context(Worker(None, "eager", settings))] if settings.gemm_size else []
        for ceiling in ceilings:
            ceiling.start()
        turns = _rounds([*workers, *ceilings], settings.rounds, progress)
        rates = [ceiling_flops(settings) / seconds for ceiling in ceilings for seconds in turns[ceiling]]
        outcomes = []
        for candidate in candidates:
            flops, found = flops_per_token(candidate, settings), dict[Mode, Measured]()
            for worker in (worker for worker in workers if worker.candidate is candidate):
                progress(f"profiling {worker.name}", settings.rounds, settings.rounds)
                found[worker.mode] = _measured(worker, workers[worker], turns[worker], flops, rates)
            own: dict[Mode, str] = {mode: why for (name, mode), why in failures.items() if name == candidate.name}
            outcomes.append(Outcome(candidate, flops, found, own))
    return Comparison(settings, outcomes, spread(rates) if rates else None)


def _rounds(workers: list[Worker], rounds: int, progress: Progress) -> dict[Worker, list[float]]:
    turns: dict[Worker, list[float]] = {worker: [] for worker in workers}
    for number in range(rounds):
        progress("measuring", number, rounds)
        for worker in workers if number % 2 == 0 else reversed(workers):
            turns[worker].append(worker.turn())
    return turns


def _measured(worker: Worker, facts: Facts, seconds: list[float], flops: float | None, rates: list[float]) -> Measured:
    """The figures of one worker from the seconds of its turns; memory first, before the profiler needs some."""
    settings, peak = worker.settings, worker.peak_memory()
    speeds = [settings.tokens / second for second in seconds]
    use = spread([flops * speed / rate for speed, rate in zip(speeds, rates, strict=True)]) if flops and rates else None
    # A compiled generation cannot be taken apart: the library compiles it as a whole.
    is_whole = settings.task == "decode" and worker.mode == "compiled"
    parts = worker.profile() if settings.parts and not is_whole else None
    return Measured(worker.mode, spread(speeds), spread(seconds), peak, use, parts, facts)
