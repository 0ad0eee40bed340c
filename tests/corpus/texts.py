"""Helpers: random text with awkward characters, settings, and what sources and data sets hold."""

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from inl_core.corpus.manifest import load_manifest
from inl_core.corpus.reading.rows import BadRow, Document, Item, Note
from inl_core.corpus.reading.sources import read_source, resolve_sources
from inl_core.corpus.shard_check import VERIFIED
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.recipe.data import DataSettings, TokenizerSettings

_PLAIN = "alpha beta gamma delta naïve 東京 🙂 the of and if else return def class 12 345 <|bos|>"
WORDS = [*_PLAIN.split(), "", "\t"]


def random_text(generator: random.Random, num_words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(num_words)) + "\n"


def settings(*sources: object, vocab_size: int = 300, **changes: object) -> DataSettings:
    changes.setdefault("tokenizer", TokenizerSettings(vocab_size=vocab_size))
    return DataSettings(sources=tuple(map(str, sources)), **changes)  # pyright: ignore


def documents(*sources: object, note: Note = lambda message: None) -> Iterator[Item]:
    """What the sources hold, in order: documents and bad rows."""
    for file in resolve_sources([str(source) for source in sources], note=note):
        yield from read_source(file, note=lambda found, file=file: note(f"{file.name}: {found}"))


def texts(*sources: object, note: Note = lambda message: None) -> list[str]:
    return [item.texts[0] for item in documents(*sources, note=note) if isinstance(item, Document)]


def bad_rows(path: Path) -> list[str]:
    return [item.reason for item in documents(path) if isinstance(item, BadRow)]


def lines_of(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def write_rows(path: Path, rows: list[dict]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines[:30]) + gzip.compress(lines[30:]))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(lines[:30]) + zstandard.compress(lines[30:]))
    else:
        path.write_bytes(lines)


def texts_of(directory: Path, split: str) -> list[str]:
    tokenizer = Tokenizer.load(directory / "tokenizer.json")
    found = []
    for shard in load_manifest(directory).splits[split].shards:
        for row in pa.ipc.open_file(directory / shard.file).read_all().to_pylist():
            assert row["tokens"][0] == tokenizer.bos_id
            assert row["tokens"][-1] == tokenizer.eos_id
            text = tokenizer.decode(row["tokens"])
            assert len(text.encode()) == row["num_bytes"]
            found.append(text)
    return found


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a data set, but for the one that remembers the inodes and times of the others."""
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.name != VERIFIED}
