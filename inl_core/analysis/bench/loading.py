"""What the data loader delivers: tokens a second of training batches, on prepared data or on generated text."""

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch

from inl_core.analysis.bench.measuring import Spread, spread
from inl_core.corpus.dataset import TokenDataset
from inl_core.corpus.loader import BatchLoader
from inl_core.corpus.manifest import MANIFEST, verify
from inl_core.corpus.preparation import prepare
from inl_core.recipe import DataSettings, Recipe, TokenizerSettings
from inl_core.training.loss_module import micro_batches
from inl_core.training.run_data import data_directory

_SYNTHETIC_DOCUMENTS, _WORDS = 1_200, 200
_TURN_SECONDS = 0.3


@dataclass(frozen=True)
class LoaderSpeed:
    """Tokens a second of the loader alone."""

    data: str
    """The data set's directory, or `synthetic`."""
    num_tokens: int
    """Of its training split."""
    document_mask: bool
    tokens_per_second: Spread


def measure_loader(
    recipe: Recipe, *, rounds: int, device: str = "cpu", progress: Callable[[str, int, int], None]
) -> LoaderSpeed:
    """Batches of the recipe's shape from its data, to tensors on the device, one process; the page cache is warm."""
    settings = recipe.training
    progress("opening the data", 0, rounds)
    with _data(recipe) as (name, directory):
        data = recipe.data
        dataset = TokenDataset.open(directory, "train", document_mask=data.document_mask, loss_on=data.loss_on)
        length, rows = settings.sequence_length, settings.batch_size
        loader = BatchLoader(dataset, sequence_length=length, batch_size=rows, seed=settings.seed)
        steps, speeds = count(), []
        for number in range(rounds + 1):
            progress("measuring", max(0, number - 1), rounds)
            speeds.append(_turn(loader, steps, torch.device(device)) * settings.batch_tokens)
        # The first turn only brings the data into the page cache.
        return LoaderSpeed(name, dataset.num_tokens, recipe.data.document_mask, spread(speeds[1:]))


def _turn(loader: BatchLoader, steps: Iterator[int], device: torch.device) -> float:
    """Batches a second over one turn; it goes on with the next of `steps`."""
    start, done = time.perf_counter(), 0
    while (seconds := time.perf_counter() - start) < _TURN_SECONDS:
        micro_batches(loader.batch(next(steps)), loader.batch_size, device)
        done += 1
    return done / seconds


@contextmanager
def _data(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """The recipe's prepared data where it is, else generated text prepared in a temporary directory."""
    directory = data_directory(recipe)
    if (directory / MANIFEST).is_file():
        verify(directory)
        yield str(directory), directory
        return
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]
    texts = [" ".join(draw.choices(words, k=_WORDS)) for _ in range(_SYNTHETIC_DOCUMENTS)]
    with tempfile.TemporaryDirectory(prefix="inl-bench-") as temporary:
        source, prepared = Path(temporary) / "text.jsonl", Path(temporary) / "data"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        prepare(DataSettings(sources=(str(source),), tokenizer=TokenizerSettings(vocab_size=512)), prepared)
        yield "synthetic", prepared
