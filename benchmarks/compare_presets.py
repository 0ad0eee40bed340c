"""Presets against each other: same data, order, tokenizer and tokens, each at the learning rate of its recipe.

Runs of one seed are compared with that of the preset named last.

    .venv/bin/python benchmarks/compare_presets.py --seeds 0 1 2 --output /tmp/compare
    .venv/bin/python benchmarks/compare_presets.py --presets v1 v2 v3 transformer v4 --seeds 0 \
        --set training.steps=200 --set training.tokens=null --output /tmp/presets

Each arm is an ordinary `inl train` on one thread, two at a time; runs already finished in the output directory are
read, not repeated. Prints the tables of docs/evidence.md.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).parent.parent
RECIPES = {preset: f"tiny-{preset}.yaml" for preset in ("v1", "v2", "v3", "v4", "transformer", "transport")}
RECIPES["v5"] = "tiny.yaml"


def train(arm: str, seed: int, output: Path, overrides: list[str]) -> Path:
    """One run, unless it is there."""
    run = output / f"{arm}-{seed}"
    if not finished(run):
        command = [
            sys.executable,
            "-m",
            "inl_cli",
            "train",
            str(ROOT / "recipes" / RECIPES[arm]),
            "--run-dir",
            str(run),
        ]
        command += ["--quiet", "--set", f"training.seed={seed}", "--set", "training.evaluation.final_tokens=null"]
        command += [word for override in overrides for word in ("--set", override)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, env=environment, cwd=ROOT, stdout=subprocess.DEVNULL)
    return run


def rows_of(run: Path) -> list[dict]:
    """The run's metrics."""
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def finished(run: Path) -> bool:
    """Whether the last row is the evaluation after the recipe's last step."""
    rows = rows_of(run)
    if not rows or "validation_loss" not in rows[-1]:
        return False
    training = yaml.safe_load((run / "recipe.yaml").read_text(encoding="utf-8"))["training"]
    return rows[-1]["step"] == (training["steps"] or math.ceil(training["tokens"] / training["batch_tokens"]))


def parameters(run: Path) -> int:
    """Parameters of the trained model, counted in its checkpoint."""
    from safetensors import safe_open

    checkpoint = max((run / "checkpoints").glob("step-*"))
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if name != "excitation_amplitude"]  # noqa: SIM118
    return sum(math.prod(shape) for shape in shapes)


def dynamics(run: Path) -> str:
    """Means over layers at the end of the run."""
    files = sorted((run / "dynamics").glob("*.parquet"))
    if not files:
        return ""
    table = pq.read_table(files[-1]).to_pylist()
    means = {
        name: [row["mean"] for row in table if row["quantity"] == name]
        for name in ("alpha", "beta", "gate", "velocity")
    }
    return ", ".join(f"{name} {statistics.mean(values):.3f}" for name, values in means.items() if values)


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=list(RECIPES), default=["v5", "transport", "transformer"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--set", dest="overrides", action="append", default=[], help="for every arm")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    jobs = [(arm, seed) for seed in arguments.seeds for arm in arguments.presets]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = list(pool.map(lambda job: train(*job, arguments.output, arguments.overrides), jobs))
    scores = {job: rows_of(run)[-1]["validation_bits_per_byte"] for job, run in zip(jobs, runs, strict=True)}
    print("| arm | seed | parameters | bits per byte | accuracy | tokens/s (median) | at the end |")
    print("|---|---|---|---|---|---|---|")
    for (arm, seed), run in zip(jobs, runs, strict=True):
        rows = rows_of(run)
        speed = statistics.median(row["tokens_per_second"] for row in rows if "tokens_per_second" in row)
        print(
            f"| {arm} | {seed} | {parameters(run):,} | {scores[arm, seed]:.4f} | "
            f"{rows[-1]['validation_accuracy']:.4f} | {speed:,.0f} | {dynamics(run)} |"
        )
    *others, reference = arguments.presets
    for arm in arguments.presets:
        print(f"\nmean {arm}: {statistics.mean(scores[arm, seed] for seed in arguments.seeds):.4f}")
    for arm in others:
        differences = [scores[arm, seed] - scores[reference, seed] for seed in arguments.seeds]
        spread = statistics.stdev(differences) if len(differences) > 1 else float("nan")
        print(f"\n{arm} - {reference}, paired: {statistics.mean(differences):+.4f}, standard deviation {spread:.4f}")
        print("per seed: " + ", ".join(f"{difference:+.4f}" for difference in differences))


if __name__ == "__main__":
    main()
