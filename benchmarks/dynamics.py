"""What the records of the dynamics cost a run, as a share of its training time.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/dynamics.py recipes/tiny.yaml recipes/tiny-v4.yaml --rounds 15

By turns, in one process, of the run's own trainer: a training step, and a record with its alarms and its file. A record
is made once in training.logging.dynamics_every steps, so its share is record / (dynamics_every step). Medians with
quartiles; those of the share are of the rounds' own ratios.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from inl_core.recipe.load import load_recipe
from inl_core.training.interruption import StopSignal
from inl_core.training.observer import Observer
from inl_core.training.session import open_session


def measure(recipe_file: Path, overrides: list[str], rounds: int) -> tuple[list[float], list[float], int]:
    """Seconds of each round's step and record, and the steps between two records."""
    recipe = load_recipe(recipe_file, overrides)
    steps, records = [], []
    with (
        tempfile.TemporaryDirectory() as folder,
        open_session(recipe, Path(folder) / "run", observer=Observer(), stop=StopSignal()) as session,
    ):
        trainer = session.build_trainer(session.open_data())
        trainer.model.train()
        for step in range(rounds + 2):
            start = time.perf_counter()
            part = trainer.stepper.take(step, StopSignal()).first_part
            _wait()
            middle = time.perf_counter()
            trainer.log.record_dynamics(step + 1, part)
            _wait()
            steps.append(middle - start)
            records.append(time.perf_counter() - middle)
        trainer.stepper.close()
    return steps[2:], records[2:], recipe.training.logging.dynamics_every


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    """Print a row for each recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of inl train")
    arguments = parser.parse_args()
    print("recipe, step, record, record / step, share of training time")
    for recipe in arguments.recipes:
        steps, records, every = measure(recipe, arguments.set, arguments.rounds)
        ratios = [record / step for step, record in zip(steps, records, strict=True)]
        low, middle, high = (100 * share / every for share in statistics.quantiles(ratios, n=4))
        step, record = 1000 * statistics.median(steps), 1000 * statistics.median(records)
        ratio = statistics.median(ratios)
        print(f"{recipe}, {step:.0f} ms, {record:.0f} ms, {ratio:.2f}, {middle:.2f}% ({low:.2f} - {high:.2f})")


if __name__ == "__main__":
    main()
