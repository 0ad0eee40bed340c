"""Every requirement on speed and memory, measured with `inl bench` and printed as a Markdown table.

    .venv/bin/python benchmarks/against_llama.py --threads 2
    .venv/bin/python benchmarks/against_llama.py --only memory decode --rounds 5

- Sizes: d_model 512, 6 layers, 8 heads, 2 key-value heads, V 16384, feed-forward 2048, B 4, S 256 unless a row says so.
- Each row is one run of `inl bench`, whose command stands beside it; `--output` keeps the runs' JSON, and runs already
  there are read, not repeated.
- Exits with 1 when a measured row misses its requirement.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DIMENSIONS = "--d-model 512 --layers 6 --heads 8 --kv-heads 2 --feedforward-dim 2048"
SIZE = f"{DIMENSIONS} --vocab-size 16384 --batch-size 4 --sequence-length 256"
LARGE = f"{DIMENSIONS} --vocab-size 50304 --batch-size 4 --sequence-length 512"
MANY = f"{DIMENSIONS} --vocab-size 16384 --batch-size 16 --sequence-length 256"
"""Four times the tokens: of fewer, the difference of two processes' memory is no larger than its scatter."""
DECODE = f"{DIMENSIONS} --vocab-size 16384 --prompt-tokens 32 --new-tokens 256"
EIGHT = "--against v4 --against-set model.integrator.num_iterations=8"
NARROW = "model.integrator.controller.width=32"
RECOMPUTED = "training.recomputation=block"
ONCE = "--no-parts --steps 1 --rounds 3"
MEMORY = "--mode eager --no-parts --steps 1 --rounds 3"

RUNS = {
    "train-v4-llama": f"train --preset v4 --iterations 2 {SIZE} --against llama",
    "train-v3-llama": f"train --preset v3 --iterations 5 {SIZE} --against llama --no-parts",
    "train-v4-transformer": f"train --preset v4 --iterations 2 {SIZE} --against transformer --no-parts",
    "train-v4-narrow": f"train --preset v4 --iterations 2 --set {NARROW} {SIZE} --against transformer",
    "memory-v4-llama": f"train --preset v4 --iterations 2 {LARGE} --against llama {ONCE}",
    "memory-v4-recomputed": f"train --preset v4 --iterations 2 --set {RECOMPUTED} {LARGE} --against llama {ONCE}",
    "memory-iterations": f"train --preset v4 --iterations 2 {MANY} {EIGHT} {MEMORY}",
    "memory-no-integrator": f"train --preset transformer --set model.feedforward_hidden=1344 {MANY} {MEMORY}",
    "decode-1": f"decode --preset v4 --iterations 2 {DECODE} --batch-size 1 --against llama",
    "decode-8": f"decode --preset v4 --iterations 2 {DECODE} --batch-size 8 --against llama --no-parts",
    "decode-uncached": f"decode --preset v4 --iterations 2 {DECODE} --batch-size 1 --against uncached --no-parts",
}


@dataclass(frozen=True)
class Row:
    """One requirement: a figure of one run, or of several, and the bound it must keep."""

    name: str
    runs: tuple[str, ...]
    figure: Callable[..., float | None]
    bound: float
    at_least: bool = True
    form: str = "{:.2f}"

    def holds(self, value: float) -> bool:
        """Whether the requirement is met."""
        return value >= self.bound if self.at_least else value <= self.bound


def speed_ratio(run: dict[str, Any]) -> float:
    """Tokens a second of the first over the second."""
    return run["ratio"]["tokens_per_second"]["median"]


def memory_ratio(run: dict[str, Any]) -> float | None:
    """Peak memory of the first over the second."""
    return run["ratio"]["peak_memory"]


def least_memory_ratio(run: dict[str, Any]) -> float:
    """Peak memory of the first over the second, each in the mode that needs least."""
    ours, theirs = (
        min(mode["peak_memory_bytes"] for mode in candidate["modes"].values()) for candidate in run["candidates"]
    )
    return ours / theirs


def integrator_memory(run: dict[str, Any], without: dict[str, Any]) -> float | None:
    """What the integrator adds to the Transformer's peak: at T = 8 over at T = 2."""
    two, eight = (peak(candidate) - peak(without["candidates"][0]) for candidate in run["candidates"])
    return eight / two if two > 0 else None


def integrator_share(run: dict[str, Any]) -> float:
    """The integrator's share of the first candidate's step, in the mode that was taken."""
    return best(run["candidates"][0])["parts"]["shares"]["integrator"]


def utilisation(run: dict[str, Any]) -> float:
    """FLOPs a second of the first candidate over the ceiling's."""
    return best(run["candidates"][0])["utilisation"]["median"]


def best(candidate: dict[str, Any]) -> dict[str, Any]:
    """The mode that was taken."""
    return candidate["modes"][candidate["best_mode"]]


def peak(candidate: dict[str, Any]) -> int:
    """Peak bytes above the bare import."""
    return best(candidate)["peak_memory_bytes"]


ROWS = (
    Row("training tokens/s, v4 T=2 / Llama", ("train-v4-llama",), speed_ratio, 0.95),
    Row("training tokens/s, v3 T=5 / Llama", ("train-v3-llama",), speed_ratio, 0.80),
    Row("training tokens/s, v4 T=2 / our Transformer", ("train-v4-transformer",), speed_ratio, 0.88),
    Row("the same, controller of width 32", ("train-v4-narrow",), speed_ratio, 0.88),
    Row(
        "peak training memory, v4 / Llama, V=50304, S=512, faster modes",
        ("memory-v4-llama",),
        memory_ratio,
        0.60,
        at_least=False,
    ),
    Row("the same, each in its mode of least memory", ("memory-v4-llama",), least_memory_ratio, 0.60, at_least=False),
    Row("training tokens/s of that run, v4 / Llama", ("memory-v4-llama",), speed_ratio, 0.95),
    Row("peak memory with recomputation: block", ("memory-v4-recomputed",), memory_ratio, 0.60, at_least=False),
    Row("training tokens/s of that, v4 / Llama", ("memory-v4-recomputed",), speed_ratio, 0.95),
    Row(
        "memory the integrator adds, T=8 / T=2",
        ("memory-iterations", "memory-no-integrator"),
        integrator_memory,
        1.1,
        at_least=False,
    ),
    Row("decode tokens/s, 32 + 256, batch 1, v4 / Llama", ("decode-1",), speed_ratio, 1.8),
    Row("decode tokens/s, 32 + 256, batch 8, v4 / Llama", ("decode-8",), speed_ratio, 1.3),
    Row("decode tokens/s, cached / uncached, 256 new", ("decode-uncached",), speed_ratio, 6.0),
    Row("integrator's share of a v4 training step", ("train-v4-llama",), integrator_share, 0.15, False, "{:.1%}"),
    Row("the same, controller of width 32", ("train-v4-narrow",), integrator_share, 0.15, False, "{:.1%}"),
    Row("GEMM utilisation of a v4 training step", ("train-v4-llama",), utilisation, 0.65, form="{:.1%}"),
)


def measure(name: str, more: list[str], output: Path | None) -> dict[str, Any]:
    """The JSON of one run, from the output directory where it is there."""
    path = output / f"{name}.json" if output else None
    if path and path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    command = [sys.executable, "-m", "inl_cli", "bench", *command_of(name, more), "--json"]
    print(f"running {shlex.join(command[3:])}", file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8")
    if done.returncode:
        raise SystemExit(f"{name}: `inl bench` ended with code {done.returncode}")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(done.stdout, encoding="utf-8")
    return json.loads(done.stdout)


def command_of(name: str, more: list[str]) -> list[str]:
    """The run's words after `inl bench`; `more` gives way to what the run says itself."""
    return [RUNS[name].split()[0], *more, *RUNS[name].split()[1:]]


def modes_of(run: dict[str, Any]) -> str:
    """Which mode of each candidate counted, and the speeds."""
    found = []
    for candidate in run["candidates"]:
        speed = best(candidate)["tokens_per_second"]
        found.append(f"{candidate['name']} {candidate['best_mode']} {speed['median']:,.0f}")
    return "; ".join(found)


def main() -> None:
    """Run what is needed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7, help="of the runs that measure speed")
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose names begin with one of these")
    parser.add_argument("--output", type=Path, help="directory of the runs' JSON")
    arguments = parser.parse_args()
    more = ["--threads", str(arguments.threads), "--rounds", str(arguments.rounds)]
    rows = [row for row in ROWS if row.runs[0].startswith(tuple(arguments.only))]
    names = dict.fromkeys(name for row in rows for name in row.runs)
    runs = {name: measure(name, more, arguments.output) for name in names}
    if not runs:
        raise SystemExit(f"no run begins with {' or '.join(arguments.only)}: there are {', '.join(RUNS)}")
    machine, versions = next(iter(runs.values()))["machine"], next(iter(runs.values()))["versions"]
    print(f"{machine['cpu']}, {machine['threads']} threads, {machine['device']}; ", end="")
    print(", ".join(f"{package} {version}" for package, version in versions.items()) + "\n")
    print("| what | required | measured | holds | modes and tokens/s | command |\n|---|---|---|---|---|---|")
    missed = False
    for row in rows:
        value = row.figure(*(runs[name] for name in row.runs))
        holds = value is not None and row.holds(value)
        missed |= not holds
        bound = f"{'>=' if row.at_least else '<='} {row.form.format(row.bound)}"
        shown = row.form.format(value) if value is not None else "not measurable"
        commands = "; ".join(f"`inl bench {shlex.join(command_of(name, more))}`" for name in row.runs)
        answer = "yes" if holds else "no"
        print(f"| {row.name} | {bound} | {shown} | {answer} | {modes_of(runs[row.runs[0]])} | {commands} |")
    sys.exit(missed)


if __name__ == "__main__":
    main()
