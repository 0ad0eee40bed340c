"""Chunks of tokens -> shards: the hash of each document sends it to a training shard or to the validation shard.

What a shard holds, byte for byte, depends on the documents and their order alone, not on where a chunk ended.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from inl_core.corpus.manifest import Shard, SplitInfo, sha256_of, shard_name
from inl_core.corpus.preparation.chunks import ChunkInfo, Chunks, token_lists
from inl_core.corpus.preparation.validation_split import Split, shard_of
from inl_core.files import written_aside

_BUFFERED_TOKENS = 1 << 25  # over all shards together


class _ShardWriter:
    """Collects the documents of one shard, and writes them in record batches.

    A batch ends with the document that brings it to `batch_tokens`.
    """

    def __init__(self, file: pa.ipc.RecordBatchFileWriter, schema: pa.Schema, batch_tokens: int) -> None:
        self._file, self._schema, self._batch_tokens = file, schema, batch_tokens
        self._held: list[pa.RecordBatch] = []
        self._held_tokens = 0
        self.documents = self.tokens = self.bytes = 0

    def add(self, rows: pa.RecordBatch) -> None:
        """Add documents; they are written once there are enough of them."""
        lengths = _lengths(rows)
        ends, start = np.cumsum(lengths), 0
        self.documents += rows.num_rows
        self.tokens += int(lengths.sum())
        self.bytes += int(rows["num_bytes"].to_numpy().sum(dtype=np.int64))
        while start < rows.num_rows:
            before = int(ends[start - 1]) if start else 0
            stop = min(int(np.searchsorted(ends, before + self._batch_tokens - self._held_tokens)) + 1, rows.num_rows)
            self._held.append(rows.slice(start, stop - start))
            self._held_tokens += int(ends[stop - 1]) - before
            start = stop
            if self._held_tokens >= self._batch_tokens:
                self.flush()

    def flush(self) -> None:
        """Write what is still held."""
        if self._held:
            # Copied: of a slice, Arrow would write buffers of another size, and the file's bytes would tell of chunks.
            tokens = np.concatenate([rows["tokens"].flatten().to_numpy() for rows in self._held])
            lengths = np.concatenate([_lengths(rows) for rows in self._held])
            others = (np.concatenate([rows[name].to_numpy() for rows in self._held]) for name in self._schema.names[1:])
            self._file.write_batch(pa.record_batch([token_lists(tokens, lengths), *others], self._schema))
        self._held, self._held_tokens = [], 0

    def describe(self, path: Path) -> Shard:
        """The manifest's entry of the finished file."""
        size, sha256 = path.stat().st_size, sha256_of(path)
        return Shard(
            file=path.name, documents=self.documents, tokens=self.tokens, bytes=self.bytes, size=size, sha256=sha256
        )


@contextmanager
def _new_shard(path: Path, schema: pa.Schema, batch_tokens: int) -> Iterator[_ShardWriter]:
    with written_aside(path) as aside, aside.open("wb") as raw, pa.ipc.new_file(raw, schema) as file:
        writer = _ShardWriter(file, schema, batch_tokens)
        yield writer
        writer.flush()


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
    hashes = np.concatenate([_with_tokens(chunks.read_tokens(number))["hash"].to_numpy() for number in numbers])
    is_validation = split.is_validation(hashes)
    num_shards = _without_empty(hashes[~is_validation], num_shards)
    schema = pa.schema(
        {"tokens": pa.large_list(pa.from_numpy_dtype(token_type)), "prompt_length": pa.int32(), "num_bytes": pa.int32()}
    )
    paths = [directory / shard_name("train", shard, num_shards) for shard in range(num_shards)]
    if is_validation.any():
        paths.append(directory / shard_name("validation", 0, 1))
    has_prompts = False
    with ExitStack() as open_shards:
        writers = [
            open_shards.enter_context(_new_shard(path, schema, _BUFFERED_TOKENS // len(paths))) for path in paths
        ]
        for number in numbers:
            batch = _with_tokens(chunks.read_tokens(number))
            has_prompts |= bool(batch["prompt_length"].to_numpy().any())
            keys = batch["hash"].to_numpy()
            target = np.where(split.is_validation(keys), num_shards, shard_of(keys, max(1, num_shards)))
            rows = batch.select(schema.names).cast(schema)
            for shard in np.unique(target).tolist():
                writers[shard].add(rows.filter(pa.array(target == shard)))
            on_chunk(number + 1, len(numbers))
    shards = [writer.describe(path) for writer, path in zip(writers, paths, strict=True)]
    train, validation = shards[:num_shards], shards[num_shards:]
    return {"train": _total(train), "validation": _total(validation)}, has_prompts


def write_quarantine(path: Path, infos: Iterable[ChunkInfo]) -> int:
    """Write a line of JSON for each bad row: where it stands, why it was left out, how it begins; returns how many."""
    num_bad = 0
    with written_aside(path) as aside, aside.open("w", encoding="utf-8", newline="\n") as file:
        for info in infos:
            num_bad += len(info.bad_rows)
            file.writelines(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in info.bad_rows)
    return num_bad


def _with_tokens(batch: pa.RecordBatch) -> pa.RecordBatch:
    """The documents of which a foreign tokenizer leaves something."""
    has_tokens = _lengths(batch) > 0
    return batch if has_tokens.all() else batch.filter(pa.array(has_tokens))


def _lengths(batch: pa.RecordBatch) -> np.ndarray:
    """(N,) int64: how many tokens each document has."""
    return pc.call_function("list_value_length", [batch["tokens"]]).to_numpy(zero_copy_only=False).astype(np.int64)


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
