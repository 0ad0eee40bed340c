"""The working directory of a preparation: numbered chunk files that make it restartable and its memory bounded.

    .prepare/plan.json  text-00000.arrow ...  tokenizer.json  tokens-00000.arrow ...

- A chunk is about CHUNK_BYTES of documents. Its file appears by one rename with everything a restart needs: the
  documents, their hashes, and where in the sources the next chunk begins.
- tokens-K replaces text-K, so whichever exists tells how far the work has come.
- What a stopped run left is read once to check its digest (sealed.py) before anything in it is used.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter, ValidationError

from inl_core.corpus.rows import BadRow, Document
from inl_core.corpus.sealed import DamagedWork, check_seal, remove_sealed, sealed_aside
from inl_core.files import written_aside

CHUNK_BYTES = 8 << 20
"""Text of one chunk: what a killed run does again at most, and what is held in memory."""
CHUNK_ROWS = 100_000

_TEXT_SCHEMA = pa.schema(
    {"texts": pa.list_(pa.large_string()), "roles": pa.string(), "hash": pa.uint64(), "num_bytes": pa.int32()}
)


@dataclass
class ChunkInfo:
    """What a chunk says about the rows it covers, kept in the file's own metadata."""

    next_file: int = 0
    next_item: int = 0
    last: bool = False
    num_rows: int = 0
    num_empty: int = 0
    num_duplicates: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    found: dict[str, str] = field(default_factory=dict)
    """File number -> the format and columns that were recognised."""

    def to_metadata(self) -> dict[bytes, bytes]:
        """As Arrow schema metadata."""
        return {b"inl": json.dumps(asdict(self), sort_keys=True).encode()}

    @classmethod
    def from_metadata(cls, metadata: dict[bytes, bytes] | None) -> "ChunkInfo":
        """The inverse of to_metadata; ValidationError when it is anything else."""
        return TypeAdapter(cls).validate_json((metadata or {}).get(b"inl", b""))


@dataclass(frozen=True)
class HashedDocuments:
    """Documents with their hashes and sizes, in order."""

    documents: list[Document]
    hashes: np.ndarray  # (N,) uint64
    num_bytes: np.ndarray  # (N,) int32


@dataclass(frozen=True)
class TokenChunk:
    """Tokenised documents: one flat array and its row lengths."""

    tokens: np.ndarray  # (sum of lengths,) uint16 or uint32
    lengths: np.ndarray  # (N,) int64
    prompt_lengths: np.ndarray  # (N,) int32
    num_bytes: np.ndarray  # (N,) int32
    hashes: np.ndarray  # (N,) uint64


class Spool:
    """Reads and writes the chunk files of one working directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._trusted: set[Path] = set()
        """Files that this process wrote or checked."""

    def num_chunks(self) -> int:
        """Chunks whose text has been read, tokenised or not; they are numbered without gaps."""
        number = 0
        while self._text(number).exists() or self._tokens(number).exists():
            number += 1
        return number

    def is_tokenised(self, number: int) -> bool:
        """Whether a chunk's tokens are complete."""
        return self._tokens(number).exists()

    def info(self, number: int) -> ChunkInfo:
        """What chunk `number` covered."""
        path = self._tokens(number) if self.is_tokenised(number) else self._text(number)
        try:
            return ChunkInfo.from_metadata(self._open(path).schema.metadata)
        except ValidationError:  # written by another version
            raise DamagedWork(path) from None

    def infos(self) -> Iterator[ChunkInfo]:
        """What each chunk covered; not all held at once, since bad rows may be many."""
        return (self.info(number) for number in range(self.num_chunks()))

    def hashes(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(hashes, num_bytes) of a chunk's documents."""
        path = self._tokens(number) if self.is_tokenised(number) else self._text(number)
        table = self._open(path).read_all()
        return table["hash"].to_numpy(), table["num_bytes"].to_numpy()

    def write_text(self, number: int, chunk: HashedDocuments, info: ChunkInfo) -> None:
        """Write text-K."""
        columns = [
            pa.array([document.texts for document in chunk.documents], _TEXT_SCHEMA.field("texts").type),
            pa.array([document.roles for document in chunk.documents], pa.string()),
            pa.array(chunk.hashes, pa.uint64()),
            pa.array(chunk.num_bytes, pa.int32()),
        ]
        batch = pa.record_batch(columns, schema=_TEXT_SCHEMA.with_metadata(info.to_metadata()))
        self._write(self._text(number), batch)

    def read_text(self, number: int) -> HashedDocuments:
        """Read text-K; the documents' origins are not kept."""
        table = self._open(self._text(number)).read_all()
        pairs = zip(table["texts"].to_pylist(), table["roles"].to_pylist(), strict=True)
        documents = [Document("", tuple(texts), roles) for texts, roles in pairs]
        return HashedDocuments(documents, table["hash"].to_numpy(), table["num_bytes"].to_numpy())

    def write_tokens(self, number: int, chunk: TokenChunk) -> None:
        """Write tokens-K with text-K's information, then drop text-K."""
        info = self.info(number)
        batch = pa.record_batch(
            {
                "tokens": token_lists(chunk.tokens, chunk.lengths),
                "prompt_length": chunk.prompt_lengths,
                "num_bytes": chunk.num_bytes,
                "hash": chunk.hashes,
            }
        ).replace_schema_metadata(info.to_metadata())
        self._write(self._tokens(number), batch)
        remove_sealed(self._text(number))

    def read_tokens(self, number: int) -> Iterator[pa.RecordBatch]:
        """The record batches of tokens-K, memory-mapped."""
        reader = self._open(self._tokens(number))
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)

    def _write(self, path: Path, batch: pa.RecordBatch) -> None:
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

    def _text(self, number: int) -> Path:
        return self.directory / f"text-{number:05d}.arrow"

    def _tokens(self, number: int) -> Path:
        return self.directory / f"tokens-{number:05d}.arrow"


def token_lists(tokens: np.ndarray, lengths: np.ndarray) -> pa.LargeListArray:
    """A large_list column from flat tokens and row lengths."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(tokens))


def write_text_aside(path: Path, text: str) -> None:
    """Write a text file under another name, then rename: it is there whole or not at all."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")
