"""Chunks of tokens -> shards: the hash of each document sends it to a training shard or to the validation shard."""

import json
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from inl_core.corpus.manifest import Shard, SplitInfo, sha256_of, shard_name
from inl_core.corpus.preparation.chunks import ChunkInfo, Chunks
from inl_core.corpus.preparation.validation_split import Split, shard_of
from inl_core.files import ASIDE, named_errors, written_aside

_BUFFERED_TOKENS = 1 << 25  # over all shards together


class _ShardWriter:
    """One shard, written in record batches of a few million tokens. It gets its name when it is whole."""

    def __init__(self, path: Path, schema: pa.Schema, batch_tokens: int) -> None:
        self.path, self._batch_tokens, self._schema = path, batch_tokens, schema
        self._aside = path.with_name(path.name + ASIDE)
        self._aside.unlink(missing_ok=True)  # if a link stood there, the file that it leads to would be written
        self._file = self._aside.open("wb")
        self._writer = pa.ipc.new_file(self._file, schema)
        self._held: list[pa.RecordBatch] = []
        self._held_tokens = 0
        self.documents = self.tokens = self.bytes = 0

    def add(self, rows: pa.RecordBatch) -> None:
        """Add documents; they are written as one record batch once there are enough of them."""
        num_tokens = len(rows["tokens"].flatten())
        self._held.append(rows)
        self._held_tokens += num_tokens
        self.documents += rows.num_rows
        self.tokens += num_tokens
        self.bytes += int(rows["num_bytes"].to_numpy().sum(dtype=np.int64))
        if self._held_tokens >= self._batch_tokens:
            self._flush()

    def _flush(self) -> None:
        if self._held:
            with named_errors(self.path):
                for batch in pa.Table.from_batches(self._held, self._schema).combine_chunks().to_batches():
                    self._writer.write_batch(batch)
        self._held, self._held_tokens = [], 0

    def finish(self) -> Shard:
        """Bring the file to the disk, give it its name, and describe it."""
        self._flush()
        with named_errors(self.path):
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._aside.replace(self.path)
        return Shard(
            file=self.path.name,
            documents=self.documents,
            tokens=self.tokens,
            bytes=self.bytes,
            size=self.path.stat().st_size,
            sha256=sha256_of(self.path),
        )

    def discard(self) -> None:
        """Close the file, and remove it unless it was finished."""
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._aside.unlink(missing_ok=True)


def write_shards(
    chunks: Chunks,
    directory: Path,
    split: Split,
    *,
    num_shards: int,
    token_type: np.dtype,
    on_chunk: Callable[[int, int], None],
) -> tuple[dict, bool]:
    """Write all shards; returns ({split: SplitInfo}, whether any document has a prompt).

    Where there are few documents, there are fewer training shards than `num_shards`, so that none is empty.
    """
    numbers = range(chunks.count())
    hashes = np.concatenate([chunks.hashes(number)[0] for number in numbers])
    is_validation = split.is_validation(hashes)
    num_shards = _without_empty(hashes[~is_validation], num_shards)
    schema = pa.schema(
        {
            "tokens": pa.large_list(pa.from_numpy_dtype(token_type)),
            "prompt_length": pa.int32(),
            "num_bytes": pa.int32(),
        }
    )
    names = [shard_name("train", shard, num_shards) for shard in range(num_shards)]
    if is_validation.any():
        names.append(shard_name("validation", 0, 1))
    has_prompts = False
    with ExitStack() as unfinished:
        writers = []
        for name in names:
            writers.append(_ShardWriter(directory / name, schema, _BUFFERED_TOKENS // len(names)))
            unfinished.callback(writers[-1].discard)
        for number in numbers:
            for batch in chunks.read_tokens(number):
                has_prompts |= bool(batch["prompt_length"].to_numpy().any())
                keys = batch["hash"].to_numpy()
                target = np.where(split.is_validation(keys), num_shards, shard_of(keys, max(1, num_shards)))
                rows = batch.select(schema.names).cast(schema)
                for shard in np.unique(target).tolist():
                    writers[shard].add(rows.filter(pa.array(target == shard)))
            on_chunk(number + 1, len(numbers))
        shards = [writer.finish() for writer in writers]
    train, validation = shards[:num_shards], shards[num_shards:]
    return {"train": _total(train), "validation": _total(validation)}, has_prompts


def write_quarantine(path: Path, infos: Iterable[ChunkInfo]) -> None:
    """A line of JSON for each bad row: where it stands, why it was left out, how it begins."""
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        for info in infos:
            file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in info.bad_rows)


def _without_empty(hashes: np.ndarray, num_shards: int) -> int:
    """The largest number of shards, at most `num_shards`, of which none is empty."""
    num_shards = min(num_shards, len(hashes))
    while num_shards > 1 and len(np.unique(shard_of(hashes, num_shards))) < num_shards:
        num_shards -= 1
    return num_shards


def _total(shards: list[Shard]) -> SplitInfo:
    return SplitInfo(
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        shards=tuple(shards),
    )
