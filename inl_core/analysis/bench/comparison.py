"""Candidates by turns: every round gives each worker one turn, and figures of one round are compared with each other.

- A slow moment of the machine falls on neighbours of one round; every second round goes backwards, so that a drift
  falls on all alike. The ratio is the median of the rounds' ratios.
- `best` measures both modes of each candidate in the same rounds and takes the one with the higher median.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from inl_core.analysis.bench.ceiling import flops_per_token
from inl_core.analysis.bench.measuring import Spread, spread
from inl_core.analysis.bench.parts import PartTimes
from inl_core.analysis.bench.settings import COMPILED_GENERATION, BenchSettings, Candidate, Mode
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
    """Bytes above the bare import."""
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
            for mode in modes_of(candidate, settings):
                worker = stack.enter_context(Worker(candidate, mode, settings))
                progress(f"warming up {worker.name}", 0, settings.rounds)
                try:
                    workers[worker] = worker.start()
                except InlError as error:
                    if mode == "eager" or settings.mode != "best":
                        raise
                    failures[candidate.name, mode] = str(error)
        ceiling = stack.enter_context(Worker(None, "eager", settings)) if settings.gemm_size else None
        if ceiling:
            ceiling.start()
        turns, rates = _rounds([*workers, *([ceiling] if ceiling else [])], settings.rounds, progress), None
        if ceiling:
            rates = turns.pop(ceiling)
        found = []
        for candidate in candidates:
            own = {worker: facts for worker, facts in workers.items() if worker.candidate is candidate}
            found.append(_outcome(candidate, own, turns, rates, failures, settings, progress))
    return Comparison(settings, found, spread(rates) if rates else None)


def modes_of(candidate: Candidate, settings: BenchSettings) -> tuple[Mode, ...]:
    """The modes asked for that the candidate has."""
    is_eager_only = candidate.kind == "uncached" or (candidate.kind == "inl" and not COMPILED_GENERATION)
    if settings.task == "decode" and is_eager_only:
        return ("eager",)
    return settings.modes


def _rounds(workers: list[Worker], rounds: int, progress: Progress) -> dict[Worker, list[float]]:
    turns: dict[Worker, list[float]] = {worker: [] for worker in workers}
    for number in range(rounds):
        progress("measuring", number, rounds)
        for worker in workers if number % 2 == 0 else reversed(workers):
            turns[worker].append(worker.turn())
    return turns


def _outcome(
    candidate: Candidate,
    workers: dict[Worker, Facts],
    turns: dict[Worker, list[float]],
    rates: list[float] | None,
    failures: dict[tuple[str, Mode], str],
    settings: BenchSettings,
    progress: Progress,
) -> Outcome:
    flops, modes = flops_per_token(candidate, settings), dict[Mode, Measured]()
    for worker, facts in workers.items():
        seconds = turns[worker]
        speeds = [settings.tokens / second for second in seconds]
        shares = [flops * speed / rate for speed, rate in zip(speeds, rates, strict=True)] if flops and rates else None
        peak, parts = worker.peak_memory(), None
        # A compiled generation cannot be taken apart: the library compiles it itself.
        if settings.parts and not (settings.task == "decode" and worker.mode == "compiled"):
            progress(f"profiling {worker.name}", settings.rounds, settings.rounds)
            parts = worker.profile()
        modes[worker.mode] = Measured(
            worker.mode, spread(speeds), spread(seconds), peak, spread(shares) if shares else None, parts, facts
        )
    own: dict[Mode, str] = {mode: why for (name, mode), why in failures.items() if name == candidate.name}
    return Outcome(candidate, flops, modes, own)
