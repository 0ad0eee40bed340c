"""The working files that hold the documents: they make a preparation restartable, and bound its memory.

    .prepare/plan.json  text-00000.arrow ...  tokenizer.json  tokens-00000.arrow ...

- A chunk is about CHUNK_BYTES of documents. Its file appears by one rename, with everything that a restart needs: the
  documents, their hashes, and where in the sources the next chunk begins.
- tokens-K replaces text-K, so which of the two is there tells how far the work has come.
- Of the files that a stopped run left, each is checked by its digest before it is used.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ValidationError

from inl_core.corpus.preparation.sealed import DamagedWork, check_seal, remove_sealed, sealed_aside
from inl_core.corpus.reading.rows import BadRow, Document

CHUNK_BYTES = 8 << 20
"""Text of one chunk. This much is held in memory, and is the most that a killed run has to do again."""
CHUNK_ROWS = 100_000

_TEXT_SCHEMA = pa.schema(
    {"texts": pa.list_(pa.large_string()), "roles": pa.string(), "hash": pa.uint64(), "num_bytes": pa.int32()}
)


class ChunkInfo(BaseModel):
    """What happened to the rows that a chunk covers; kept in the metadata of the chunk's file.

    Where the next chunk begins: `next_item` rows of the file number `next_file` are done; `last` when nothing follows.
    """

    next_file: int = 0
    next_item: int = 0
    last: bool = False
    num_rows: int = 0
    num_empty: int = 0
    num_duplicates: int = 0
    bad_rows: list[BadRow] = []
    found: dict[str, str] = {}
    """Number of a file -> the format and columns that were recognised in it."""


@dataclass(frozen=True)
class HashedDocuments:
    """N documents in order, with their hashes and sizes."""

    documents: list[Document]
    hashes: np.ndarray  # (N,) uint64
    num_bytes: np.ndarray  # (N,) int32


@dataclass(frozen=True)
class EncodedDocuments:
    """N documents as tokens: one flat array, and the length of each document.

    The length is 0 where a foreign tokenizer leaves nothing of a document.
    """

    tokens: np.ndarray  # (sum of lengths,) uint16 or uint32
    lengths: np.ndarray  # (N,) int64
    prompt_lengths: np.ndarray  # (N,) int32
    num_bytes: np.ndarray  # (N,) int32
    hashes: np.ndarray  # (N,) uint64


class Chunks:
    """Reads and writes the chunk files of one working directory; chunks are numbered from 0 without gaps.

    Reading raises DamagedWork when a file is not as it was written.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._trusted: set[Path] = set()
        """Files that this process wrote or checked."""

    def count(self) -> int:
        """How many chunks there are, encoded or not."""
        number = 0
        while self._text(number).exists() or self._tokens(number).exists():
            number += 1
        return number

    def is_encoded(self, number: int) -> bool:
        """Whether the tokens of a chunk are complete."""
        return self._tokens(number).exists()

    def info(self, number: int) -> ChunkInfo:
        """What happened to the rows of a chunk."""
        path = self._current(number)
        try:
            return ChunkInfo.model_validate_json((self._open(path).schema.metadata or {}).get(b"inl", b""))
        except ValidationError:  # another version of this code wrote it
            raise DamagedWork(path) from None

    def infos(self) -> Iterator[ChunkInfo]:
        """`info` of each chunk, one at a time, since there may be many bad rows."""
        return (self.info(number) for number in range(self.count()))

    def hashes(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(hashes, num_bytes) of the documents of a chunk."""
        table = self._open(self._current(number)).read_all()
        return table["hash"].to_numpy(), table["num_bytes"].to_numpy()

    def write_text(self, number: int, chunk: HashedDocuments, info: ChunkInfo) -> None:
        """Write text-K."""
        columns = [
            pa.array([document.texts for document in chunk.documents], _TEXT_SCHEMA.field("texts").type),
            pa.array([document.roles for document in chunk.documents], pa.string()),
            pa.array(chunk.hashes, pa.uint64()),
            pa.array(chunk.num_bytes, pa.int32()),
        ]
        self._write(self._text(number), pa.record_batch(columns, schema=_TEXT_SCHEMA), info)

    def read_text(self, number: int) -> HashedDocuments:
        """Read text-K; where each document came from is not kept."""
        table = self._open(self._text(number)).read_all()
        pairs = zip(table["texts"].to_pylist(), table["roles"].to_pylist(), strict=True)
        documents = [Document("", tuple(texts), roles) for texts, roles in pairs]
        return HashedDocuments(documents, table["hash"].to_numpy(), table["num_bytes"].to_numpy())

    def write_tokens(self, number: int, chunk: EncodedDocuments) -> None:
        """Write tokens-K with the information of text-K, then remove text-K."""
        info = self.info(number)
        batch = pa.record_batch(
            {
                "tokens": token_lists(chunk.tokens, chunk.lengths),
                "prompt_length": chunk.prompt_lengths,
                "num_bytes": chunk.num_bytes,
                "hash": chunk.hashes,
            }
        )
        self._write(self._tokens(number), batch, info)
        remove_sealed(self._text(number))

    def read_tokens(self, number: int) -> pa.RecordBatch:
        """The documents of tokens-K, mapped into memory."""
        return self._open(self._tokens(number)).get_batch(0)

    def _write(self, path: Path, batch: pa.RecordBatch, info: ChunkInfo) -> None:
        batch = batch.replace_schema_metadata({"inl": info.model_dump_json()})
        with sealed_aside(path) as aside, aside.open("wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
            writer.write_batch(batch)
        self._trusted.add(path)

    def _open(self, path: Path) -> pa.ipc.RecordBatchFileReader:
        if path not in self._trusted:
            check_seal(path)
            self._trusted.add(path)
        try:
            return pa.ipc.open_file(pa.memory_map(os.fsencode(path)))
        except (pa.ArrowException, OSError):
            raise DamagedWork(path) from None

    def _current(self, number: int) -> Path:
        return self._tokens(number) if self.is_encoded(number) else self._text(number)

    def _text(self, number: int) -> Path:
        return self.directory / f"text-{number:05d}.arrow"

    def _tokens(self, number: int) -> Path:
        return self.directory / f"tokens-{number:05d}.arrow"


def token_lists(tokens: np.ndarray, lengths: np.ndarray) -> pa.LargeListArray:
    """An Arrow column of lists, from the flat tokens and the length of each list."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(tokens))
