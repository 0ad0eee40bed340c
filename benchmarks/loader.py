"""Tokens a second that one core of the loader delivers: `python benchmarks/loader.py [DATA]`.

Without DATA, builtin:python is prepared into a temporary directory first.
"""

import os
import sys
import tempfile
import time
from pathlib import Path

# One core, before numpy or pyarrow start threads.
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

from inl_core.corpus.dataset import TokenDataset
from inl_core.corpus.loader import BatchLoader
from inl_core.corpus.preparation import prepare
from inl_core.recipe.data import DataSettings

SHAPES = ((128, 16), (128, 64), (256, 64), (512, 32), (1024, 16))  # sequence length, sequences a batch
MEASURED_TOKENS = 8_000_000
REQUIRED = 20e6


def tokens_per_second(dataset: TokenDataset, sequence_length: int, batch_size: int) -> float:
    """The best of three passes over MEASURED_TOKENS, the page cache warm; CPU seconds, so that others do not count."""
    batches = BatchLoader(dataset, sequence_length=sequence_length, batch_size=batch_size, seed=0)
    num_steps = MEASURED_TOKENS // (sequence_length * batch_size)
    best = 0.0
    for _ in range(3):
        begin = time.process_time()
        for step in range(num_steps):
            batches.batch(step)
        best = max(best, num_steps * sequence_length * batch_size / (time.process_time() - begin))
    return best


def main(directory: Path) -> None:
    """Print a line for each shape, and fail when one is too slow."""
    rates = []
    for mask in (True, False):
        dataset = TokenDataset.open(directory, "train", document_mask=mask)
        for sequence_length, batch_size in SHAPES:
            rates.append(tokens_per_second(dataset, sequence_length, batch_size))
            name = "with document mask" if mask else "without mask"
            print(f"S={sequence_length:5} batch={batch_size:3} {name:19} {rates[-1] / 1e6:7.1f} M tokens/s")
    print(f"slowest {min(rates) / 1e6:.1f} M tokens/s, required {REQUIRED / 1e6:.0f}")
    if min(rates) < REQUIRED:
        sys.exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            prepare(DataSettings(), Path(temporary) / "data")
            main(Path(temporary) / "data")
