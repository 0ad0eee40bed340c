"""The tables of docs/evidence.md and its picture from the lines that benchmarks/generations.py wrote.

    .venv/bin/python benchmarks/generations_tables.py FILE.jsonl [--picture docs/generations.png]

- An arm's best rate at a size is the one with the lowest mean over seeds, among the rates with the most seeds. A mean
  is given with its standard error.
- Differences are to the Transformer with transport, run by run of the same seed. Their standard error is that of their
  mean; with one seed there is none.
- Arms of the search are compared with the arm whose name theirs begins with, or else the Transformer, each at its own
  best rate, run by run of the same seed.
- Equal FLOPs and equal seconds: an arm that costs r times the Transformer's (FLOPs a token, or milliseconds a step) is
  read at 1/r of the tokens. Between the runs of the whole length and those of a share of it, each with a whole schedule
  of its own, bits per byte are taken to be linear in the logarithm of the tokens, and beyond the shorter ones, too.
  Without shorter runs there is no reading: a longer run that is stopped early has not yet lowered its rate.
"""

import argparse
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from generations import MAIN_ARMS, best_rate, is_settled, read_lines
from generations_run import study

BASELINE, REFERENCE = "transformer", "transport"
QUESTIONS = ("identifiers", "names", "attributes", "brackets")
Line = dict[str, Any]
Scores = dict[int, float]
"""Bits per byte by seed."""


class Results:
    """The lines of one size."""

    def __init__(self, size: str, lines: list[Line]) -> None:
        self.runs = [line for line in lines if line.get("size") == size and "seed" in line and is_settled(line)]
        self.times = [line for line in lines if line.get("size") == size and "timed" in line]
        found = {line["arm"] for line in self.runs}
        self.arms = [arm for arm in MAIN_ARMS if arm in found]
        self.search = [arm for arm in study()["arms"] if arm in found.difference(MAIN_ARMS)]
        self.rates = {arm: best_rate(self.of(arm)) for arm in found}

    def of(self, arm: str, **wanted: Any) -> list[Line]:
        """The runs of an arm with these values."""
        return [line for line in self.runs if line["arm"] == arm and all(line[key] == wanted[key] for key in wanted)]

    def scores(self, arm: str, *, share: float = 1.0, rate: float | None = None) -> Scores:
        """Of the arm's best rate, unless another is asked for."""
        runs = self.of(arm, share=share, rate=rate or self.rates[arm])
        return {line["seed"]: line.get("bits_per_byte", math.inf) for line in runs}

    def at_cost(self, arm: str, cost: float) -> Scores:
        """What the arm would score with 1/cost of the tokens, for the seeds of which there is a shorter run, too."""
        whole = self.scores(arm)
        if cost == 1.0:
            return whole
        shares = {line["share"] for line in self.of(arm)} - {1.0}
        found = {}
        for share in shares:
            short = self.scores(arm, share=share)
            way = math.log(cost) / -math.log(share)
            found |= {seed: whole[seed] + way * (short[seed] - whole[seed]) for seed in whole.keys() & short.keys()}
        return found


def mean_text(values: Iterable[float], digits: int = 4) -> str:
    """The mean, with its standard error where there are several values."""
    values = list(values)
    if not values:
        return ""
    error = f" +- {statistics.stdev(values) / math.sqrt(len(values)):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{error}"


def difference_text(arm: Scores, reference: Scores) -> str:
    """The mean paired difference, its standard error, and how many of them it is."""
    pairs = [arm[seed] - reference[seed] for seed in sorted(arm.keys() & reference.keys())]
    if not pairs:
        return ""
    text = f"{statistics.mean(pairs):+.4f}"
    if len(pairs) < 2:
        return text
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{text} +- {error:.4f}" + (f" ({abs(statistics.mean(pairs)) / error:.1f} standard errors)" if error else "")


def print_size(size: str, results: Results) -> None:
    """Every arm at its best rate, then every rate."""
    first = results.runs[0]
    reference = results.scores(REFERENCE) if REFERENCE in results.arms else {}
    print(f"\n## {size}: {first['tokens']:,} tokens, whole validation split ({first['validation_tokens']:,} tokens)\n")
    print("| arm | parameters | best rate | bits per byte | seeds | against transport | FLOPs a token |")
    print("|---|---|---|---|---|---|---|")
    for arm in results.arms:
        scores = results.scores(arm)
        run = results.of(arm, rate=results.rates[arm])[0]
        against = "" if arm == REFERENCE else difference_text(scores, reference)
        print(
            f"| {arm} | {run.get('parameters', 0):,} | {results.rates[arm]:g} | {mean_text(scores.values())} | "
            f"{', '.join(map(str, sorted(scores)))} | {against} | {run.get('flops_per_token', 0) / 1e6:.2f}M |"
        )
    rates = sorted({line["rate"] for arm in results.arms for line in results.of(arm)})
    print(f"\n| arm | {' | '.join(f'{rate:g}' for rate in rates)} |\n|---|{'---|' * len(rates)}")
    for arm in results.arms:
        row = [mean_text(results.scores(arm, rate=rate).values()) for rate in rates]
        print(f"| {arm} | {' | '.join(row)} |")


def print_search(results: Results) -> None:
    """Every arm of the search at every rate, and the main arms beside them."""
    if not results.search:
        return
    seeds = {line["seed"] for arm in results.search for line in results.of(arm)}
    rates = sorted({line["rate"] for arm in results.search for line in results.of(arm)})
    names, columns = ", ".join(map(str, sorted(seeds))), " | ".join(f"{rate:g}" for rate in rates)
    print(f"\n| search, seeds {names} | {columns} | against |")
    print(f"|---|{'---|' * len(rates)}---|")
    for arm in [*results.arms, *results.search]:
        row = [mean_text(results.scores(arm, rate=rate).values()) for rate in rates]
        reference = next((main for main in MAIN_ARMS if arm.startswith(f"{main}-")), BASELINE)
        difference = difference_text(results.scores(arm), results.scores(reference))
        print(f"| {arm} | {' | '.join(row)} | {f'{reference}: {difference}' if arm in results.search else ''} |")


def print_downstream(results: Results) -> None:
    """Shares of right answers of each arm's best rate (benchmarks/downstream.py), in percent."""
    kinds = {
        kind: run["downstream"][f"num_{kind}"] for run in results.runs if "downstream" in run for kind in QUESTIONS
    }
    if not kinds:
        return
    names = " | ".join(f"{kind} ({count:,})" for kind, count in kinds.items())
    print(f"\n| arm | seeds | {names} |\n|---|---|{'---|' * len(kinds)}")
    for arm in results.arms:
        runs = [run for run in results.of(arm, share=1.0, rate=results.rates[arm]) if "downstream" in run]
        shares = [mean_text((100 * run["downstream"][kind] for run in runs), digits=1) for kind in kinds]
        print(f"| {arm} | {', '.join(sorted(str(run['seed']) for run in runs))} | {' | '.join(shares)} |")


def print_costs(results: Results) -> None:
    """What a step costs, also against the Transformer's, and bits per byte at equal cost where they can be read."""
    if BASELINE not in results.arms:
        return
    flops = {arm: results.of(arm)[0].get("flops_per_token", math.nan) / 1e6 for arm in results.arms}
    tables = {"MFLOP a token": flops}
    for line in results.times:
        how = " ".join([line["device"], line["matmul"], *line["changes"]])
        for kind in ("ms", "fastest_ms"):
            tables.setdefault(f"{kind}, {how}", {})[line["timed"]] = line[kind]
    print(f"\n| a step, and its ratio | {' | '.join(results.arms)} |\n|---|{'---|' * len(results.arms)}")
    for title, costs in tables.items():
        row = [f"{costs[arm]:.1f} ({costs[arm] / costs[BASELINE]:.3f})" if arm in costs else "" for arm in results.arms]
        print(f"| {title} | {' | '.join(row)} |")
    for title, costs in tables.items():
        ratios = {arm: costs[arm] / costs[BASELINE] for arm in results.arms if arm in costs}
        readings = {arm: results.at_cost(arm, ratio) for arm, ratio in ratios.items() if ratio != 1.0}
        for arm in [arm for arm, scores in readings.items() if scores]:
            print(f"\nat equal {title}: {arm} {mean_text(readings[arm].values())}")


def draw(sizes: dict[str, Results], picture: Path) -> None:
    """Above, the curves of each size; below, how far each arm is from the Transformer at the same step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [size for size, results in sizes.items() if BASELINE in results.arms]
    figure, axes = pyplot.subplots(2, len(names), figsize=(4.5 * len(names), 7), sharex="col", squeeze=False)
    for column, size in enumerate(names):
        results = sizes[size]
        baseline = curve_of(results, BASELINE)
        for arm in results.arms:
            curve = curve_of(results, arm)
            label = f"{arm} ({results.rates[arm]:g})"
            axes[0][column].plot(curve.keys(), curve.values(), marker=".", label=label)
            steps = [step for step in curve if step in baseline]
            axes[1][column].plot(steps, [curve[step] - baseline[step] for step in steps], marker=".")
        axes[0][column].set_title(f"{size}, each arm at its best rate")
        axes[0][column].legend()
        axes[1][column].set_xlabel("step")
        axes[1][column].grid(alpha=0.3)
    axes[0][0].set_ylabel("bits per byte, first validation tokens")
    axes[1][0].set_ylabel("difference to the Transformer")
    figure.tight_layout()
    figure.savefig(picture, dpi=80)
    print(f"\n{picture} drawn")


def curve_of(results: Results, arm: str) -> dict[int, float]:
    """Step -> bits per byte, the mean over the seeds of the arm's best rate."""
    curves = [dict(line["curve"]) for line in results.of(arm, share=1.0, rate=results.rates[arm]) if "curve" in line]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    return {step: statistics.mean(curve[step] for curve in curves) for step in steps}


def print_curves(results: Results) -> None:
    """How far each arm is from the Transformer on the way: the numbers of the picture's lower half."""
    if BASELINE not in results.arms:
        return
    curves = {arm: curve_of(results, arm) for arm in results.arms}
    steps = sorted(set.intersection(*map(set, curves.values())))
    print(f"\n| less the Transformer at step | {' | '.join(map(str, steps))} |\n|---|{'---|' * len(steps)}")
    for arm in [arm for arm in results.arms if arm != BASELINE]:
        row = [f"{curves[arm][step] - curves[BASELINE][step]:+.4f}" for step in steps]
        print(f"| {arm} | {' | '.join(row)} |")


def main() -> None:
    """Print the tables, and draw the picture where one is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    lines = [line for path in arguments.results for line in read_lines(path)]
    sizes = {size: results for size in study()["sizes"] if (results := Results(size, lines)).runs}
    for size, results in sizes.items():
        print_size(size, results)
        print_search(results)
        print_downstream(results)
        print_curves(results)
        print_costs(results)
    failed = [line for line in lines if "error" in line]
    for line in failed:
        print(
            f"\nfailed: {line['size']} {line['arm']} rate {line['rate']:g} seed {line['seed']}: {line['error'][:200]}"
        )
    if arguments.picture:
        draw(sizes, arguments.picture)


if __name__ == "__main__":
    main()
