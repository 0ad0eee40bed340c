"""Train the generations side by side, many small runs at once: the evidence of docs/evidence.md.

    .venv/bin/python benchmarks/corpus.py                                                # the larger corpus, once
    .venv/bin/python benchmarks/generations.py --stages 1M --jobs 2 --results /tmp/generations.jsonl
    .venv/bin/python benchmarks/generations.py --time --results /tmp/generations.jsonl   # a step of each arm, by turns
    .venv/bin/python benchmarks/generations_tables.py /tmp/generations.jsonl             # the tables and the curves

- generations.yaml says what is trained: arms, sizes, and stages in the order in which they are run.
- Each run is one line of the results file when it has ended. What the file has already is not run again, but for runs
  that failed otherwise than by becoming infinite.
- A run has one thread and a process of its own, which the next run takes over unless this one failed.
- All arms of a size have the Transformer's number of parameters, to within one percent, or the run fails.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from generations_run import Job, study, time_arms, train

MAIN_ARMS = ["transformer", "transport", "v4", "v5"]


class Grid:
    """The jobs that are wanted, and what is known of them; used by several threads, one for each process."""

    train = staticmethod(train)

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.changed, self.begin = arguments, threading.Condition(), time.monotonic()
        self.lines = read_lines(arguments.results)
        self.started = {job_of(line) for line in self.lines if is_settled(line)}
        self.running: set[Job] = set()

    def next(self) -> Job | None:
        """The next job to run, when there is one or will be one; None when there is none, or no time for it."""
        with self.changed:
            while True:
                job = next((job for job in self.wanted() if job not in self.started and self.has_time(job)), None)
                if job is not None:
                    self.started.add(job)
                    self.running.add(job)
                    return job
                if not self.running:
                    return None
                self.changed.wait()

    def end(self, job: Job, line: dict[str, Any]) -> None:
        """Write the line of a run that has ended."""
        with self.changed:
            self.running.discard(job)
            self.lines.append(line)
            append_line(self.arguments.results, line)
            score = line.get("bits_per_byte", line.get("error", ""))
            took = time.monotonic() - self.begin
            print(f"{took:6.0f} s  {job.name:42} {score}  {line['seconds_in_all']:.0f} s", flush=True)
            self.changed.notify_all()

    def wanted(self) -> Iterator[Job]:
        """The jobs that were asked for by name and number."""
        return islice((job for job in self.jobs() if self.arguments.only in job.name), self.arguments.limit)

    def jobs(self) -> Iterator[Job]:
        """All jobs whose rate is known, the first stage's first and the same seed and rate of all arms side by side."""
        for stage in study()["stages"]:
            if self.arguments.stages and stage["name"] not in self.arguments.stages:
                continue
            rates = stage["rates"]
            for seed in stage["seeds"]:
                for place in range(1 if rates == "best" else len(rates)):
                    for arm in stage["arms"]:
                        rate = self.best_rate(stage["size"], arm) if rates == "best" else rates[place]
                        if rate is not None:
                            yield Job(stage["size"], arm, rate, seed, stage.get("share", 1.0))

    def best_rate(self, size: str, arm: str) -> float | None:
        """The best rate of an arm; None until all runs that decide it have ended."""
        wanted = {
            (rate, seed)
            for stage in study()["stages"]
            if stage["size"] == size and arm in stage["arms"] and stage["rates"] != "best"
            for rate in stage["rates"]
            for seed in stage["seeds"]
        }
        found = [line for line in self.lines if line.get("size") == size and line.get("arm") == arm]
        return best_rate(found) if wanted <= {(line["rate"], line["seed"]) for line in found} else None

    def has_time(self, job: Job) -> bool:
        """Whether the job would end before the deadline if it took as long as the longest of its size here so far."""
        took = [line["seconds_in_all"] for line in self.lines if line.get("size") == job.size and "seed" in line]
        return time.monotonic() - self.begin + max(took, default=0.0) <= self.arguments.deadline


def best_rate(lines: list[dict[str, Any]]) -> float | None:
    """Of the rates with the most seeds, the one with the lowest mean over the runs of one arm and size at full length.

    A run that became infinite counts as infinitely bad.
    """
    scores: dict[float, dict[int, float]] = {}
    for line in lines:
        if line["share"] == 1.0:
            scores.setdefault(line["rate"], {})[line["seed"]] = line.get("bits_per_byte", math.inf)
    return min(scores, key=lambda rate: (-len(scores[rate]), sum(scores[rate].values())), default=None)


def job_of(line: dict[str, Any]) -> Job | None:
    """The job of a line; None for one of a step's time."""
    names = [field.name for field in dataclasses.fields(Job)]
    return Job(**{name: line[name] for name in names}) if "seed" in line else None


def is_settled(line: dict[str, Any]) -> bool:
    """Whether a line is a result: also that a run became infinite is one."""
    return "bits_per_byte" in line or line.get("error", "").startswith("NonFiniteError")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line to a results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def work(grid: Grid) -> None:
    """Run one job after another in a process beside this one."""
    arguments, pool = grid.arguments, None
    while job := grid.next():
        start = time.monotonic()
        pool = pool or ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        try:
            line = pool.submit(grid.train, job, arguments.runs, arguments.changes, arguments.matmul).result()
        except Exception as error:  # whatever it is, the other runs go on, and the next one here gets a new process
            pool.shutdown(wait=False)
            pool = None
            line = dataclasses.asdict(job) | {"error": f"{type(error).__name__}: {error}"[:1000]}
            line["seconds_in_all"] = round(time.monotonic() - start, 2)
        grid.end(job, line)
    if pool is not None:
        pool.shutdown()


def run_all(grid: Grid) -> None:
    """Run what the grid wants, until its deadline at the latest."""
    arguments = grid.arguments
    os.environ["OMP_NUM_THREADS"] = "1"
    threads = [threading.Thread(target=work, args=(grid,), daemon=True) for _ in range(arguments.jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(
            max(0.0, grid.begin + arguments.deadline - time.monotonic()) if arguments.deadline < math.inf else None
        )
    if grid.running:
        print(f"{len(grid.running)} runs were still at work at the deadline and are given up", flush=True)
        for process in multiprocessing.active_children():
            process.kill()
        os._exit(0)


def options_of_runs() -> argparse.ArgumentParser:
    """The options of every script that runs a grid, but for the results file."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--runs", type=Path, default=Path("runs/generations"), help="where the runs go")
    parser.add_argument("--only", default="", help="only runs with this text in their names")
    parser.add_argument("--limit", type=int, default=10**9, help="only so many of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs at once (default: %(default)s)")
    parser.add_argument("--deadline", type=float, default=math.inf, help="seconds after which no run is at work")
    parser.add_argument("--matmul", choices=["highest", "high"], help="instead of what generations.yaml says")
    parser.add_argument("--set", dest="changes", action="append", default=[], help="a key of every recipe")
    return parser


def main() -> None:
    """Run what the results file has not."""
    stages = [stage["name"] for stage in study()["stages"]]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, parents=[options_of_runs()]
    )
    parser.add_argument("--results", type=Path, required=True, help="the file of lines, which is added to")
    parser.add_argument("--stages", nargs="+", choices=stages, help="of generations.yaml (default: all)")
    parser.add_argument("--time", action="store_true", help="time a step of each arm instead")
    parser.add_argument("--sizes", nargs="+", default=list(study()["sizes"]), help="with --time: of generations.yaml")
    parser.add_argument("--arms", nargs="+", default=MAIN_ARMS, help="with --time: of generations.yaml")
    arguments = parser.parse_args()
    if not arguments.time:
        run_all(Grid(arguments))
        return
    os.environ["OMP_NUM_THREADS"] = "1"
    for size in arguments.sizes:
        for line in time_arms(size, arguments.arms, arguments.changes, arguments.matmul, arguments.runs):
            append_line(arguments.results, line)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
