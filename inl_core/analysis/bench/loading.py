"""What the data loader delivers: tokens a second of training batches, on prepared data or on generated text."""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from inl_core.analysis.bench.measuring import Spread, spread
from inl_core.corpus.loader import BatchLoader, TokenDataset
from inl_core.corpus.manifest import MANIFEST
from inl_core.corpus.preparation import prepare, verify
from inl_core.recipe import DataSettings, Recipe, TokenizerSettings
from inl_core.training.launch import data_directory
from inl_core.training.step import micro_batches

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
        dataset = TokenDataset.open(directory, "train", document_mask=recipe.data.document_mask)
        loader = BatchLoader(
            dataset, sequence_length=settings.sequence_length, batch_size=settings.batch_size, seed=settings.seed
        )
        turn = _Turns(loader, torch.device(device), settings.batch_tokens)
        turn.run()  # warms the page cache
        speeds = []
        for number in range(rounds):
            progress("measuring", number, rounds)
            speeds.append(turn.run())
        return LoaderSpeed(name, dataset.num_tokens, recipe.data.document_mask, spread(speeds))


class _Turns:
    """The loader's steps, one turn after another."""

    def __init__(self, loader: BatchLoader, device: torch.device, batch_tokens: int) -> None:
        self.loader, self.device, self.batch_tokens, self.step = loader, device, batch_tokens, 0

    def run(self) -> float:
        """Tokens a second over one turn."""
        start, first = time.perf_counter(), self.step
        while (seconds := time.perf_counter() - start) < _TURN_SECONDS:
            micro_batches(self.loader.batch(self.step), self.loader.batch_size, self.device)
            self.step += 1
        return (self.step - first) * self.batch_tokens / seconds


@contextmanager
def _data(recipe: Recipe) -> Iterator[tuple[str, Path]]:
    """The recipe's prepared data where it is, else generated text prepared in a temporary directory."""
    directory = data_directory(recipe)
    if (directory / MANIFEST).is_file():
        verify(directory)
        yield str(directory), directory
        return
    with tempfile.TemporaryDirectory(prefix="inl-bench-") as temporary:
        source = Path(temporary) / "text"
        source.mkdir()
        draw = random.Random(0)
        words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(2000)]
        for number in range(8):
            texts = (" ".join(draw.choices(words, k=_WORDS)) for _ in range(_SYNTHETIC_DOCUMENTS // 8))
            (source / f"{number}.jsonl").write_text(
                "".join(f'{{"text": "{text}"}}\n' for text in texts), encoding="utf-8"
            )
        prepared = Path(temporary) / "data"
        prepare(DataSettings(sources=(str(source),), tokenizer=TokenizerSettings(vocab_size=512)), prepared)
        yield "synthetic", prepared
