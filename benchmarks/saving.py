"""How long a save of a large model takes, and how much of that training waits for.

    .venv/bin/python benchmarks/saving.py --rounds 7 --threads 2

By turns, of a v5 of 97M parameters with AdamW's moments, on the disk of --directory:

- file: the same tensors in one file by safetensors, flushed to the disk: the least that a save can take.
- save: a whole checkpoint, from the copy to the name that it ends with.
- stall: what training waits for: the look for NaN and infinity, and the copy. The rest is done by a thread beside it.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from inl_core.inference.tensor_files import first_nonfinite
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe.load import recipe_from_mapping
from inl_core.training.checkpoint import TrainState
from inl_core.training.checkpoint_writing import take_snapshot, write_snapshot
from inl_core.training.optimizers import build_optimizers

MODEL = {"preset": "v5", "d_model": 768, "num_layers": 12, "num_heads": 12, "vocab_size": 16384}


def write_file(tensors: dict[str, Tensor], directory: Path) -> float:
    """The seconds that it takes to write the tensors into one file, and to have it on the disk."""
    start, path = time.perf_counter(), directory / "plain.safetensors"
    save_file(tensors, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds


def main() -> None:
    """Measure, and print medians with quartiles."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--directory", type=Path, default=Path(), help="on the disk to be measured")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    recipe = recipe_from_mapping({"name": "saving", "model": MODEL, "training": {"steps": 1}})
    model = IntegratorLanguageModel(recipe.model)
    model.initialise(0)
    optimizers = build_optimizers(model, recipe.training.optimizer, torch.device("cpu"))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.step()
    optimizers.zero_grad()
    stager, taken = StateDictStager(), {"file": [], "save": [], "stall": []}
    with tempfile.TemporaryDirectory(dir=arguments.directory) as place:
        for number in range(arguments.rounds + 1):
            tensors, start = model.state_dict() | optimizers.moments(), time.perf_counter()
            first_nonfinite(tensors)
            snapshot = take_snapshot(TrainState(step=number), model, optimizers, {}, stager)
            stall = time.perf_counter() - start
            saved, save = write_snapshot(Path(place), snapshot), time.perf_counter() - start
            shutil.rmtree(saved)
            found = {"save": save, "stall": stall, "file": write_file(tensors, Path(place))}
            if number:  # the first round makes the memory of the copies
                for name, value in found.items():
                    taken[name].append(value)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{size:,} parameters, {arguments.threads} threads, {arguments.rounds} rounds")
    for name, values in taken.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"{name:6} {middle:.2f} s ({low:.2f} - {high:.2f})")
    for name, over in (("save", "file"), ("stall", "file"), ("stall", "save")):
        ratios = [a / b for a, b in zip(taken[name], taken[over], strict=True)]
        print(f"{name} / {over}: {statistics.median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})")


if __name__ == "__main__":
    main()
