"""Small pieces, and the parts of a data set."""

import random
from pathlib import Path

import pytest

from inl_core.corpus.preparation import Part, prepare_part, shards, text_chunks
from inl_core.recipe.data import DataSettings, TokenizerSettings
from tests.corpus.texts import settings


def make_small(patch: pytest.MonkeyPatch) -> None:
    """A part has several chunks, and a shard several batches."""
    patch.setattr(text_chunks, "CHUNK_BYTES", 4000)
    patch.setattr(shards, "_BUFFERED_TOKENS", 4000)


def chosen_settings(source: Path, tokenizer_file: Path | None) -> DataSettings:
    tokenizer = TokenizerSettings(vocab_size=300, file=tokenizer_file)
    return settings(source, tokenizer=tokenizer, num_shards=2, max_bad_ratio=0.5, validation_fraction=0.1)


def prepare_parts(chosen: DataSettings, directory: Path, num_parts: int, **options: object) -> None:
    for number in random.Random(num_parts).sample(range(1, num_parts + 1), num_parts):  # in any order
        prepare_part(chosen, directory, Part(number, num_parts), **options)  # pyright: ignore
