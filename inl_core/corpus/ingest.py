"""Sources -> text chunks: hash, drop duplicates, set bad rows aside; continues after the last complete chunk."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from inl_core.corpus.rows import BadRow, Document
from inl_core.corpus.sources import SourceFile, read_source
from inl_core.corpus.split import SeenHashes, document_hash
from inl_core.corpus.spool import CHUNK_BYTES, CHUNK_ROWS, ChunkInfo, HashedDocuments, Spool
from inl_core.errors import ArtefactError

MAX_BAD_SHOWN = 5
_BAD_ROW_BYTES = 400  # what a bad row weighs in a chunk, so that a file of nothing else stays bounded too


class _OpenChunk:
    """The chunk being filled."""

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.hashes: list[int] = []
        self.num_bytes: list[int] = []
        self.weight = 0
        self.info = ChunkInfo()

    @property
    def full(self) -> bool:
        return self.weight >= CHUNK_BYTES or self.info.num_rows >= CHUNK_ROWS

    def add(self, item: Document | BadRow) -> None:
        self.info.num_rows += 1
        if isinstance(item, BadRow):
            self.info.bad_rows.append(item)
            self.weight += _BAD_ROW_BYTES
        elif all(not text or text.isspace() for text in item.texts):
            self.info.num_empty += 1
        else:
            self.documents.append(item)
            self.hashes.append(document_hash(item))
            self.num_bytes.append(sum(len(text) if text.isascii() else len(text.encode()) for text in item.texts))
            self.weight += self.num_bytes[-1]

    def close(self, seen: SeenHashes) -> HashedDocuments:
        """The documents not seen before."""
        hashes = np.array(self.hashes, dtype=np.uint64)
        new = seen.add(hashes)
        self.info.num_duplicates = int(len(new) - new.sum())
        kept = [document for document, is_new in zip(self.documents, new.tolist(), strict=True) if is_new]
        return HashedDocuments(kept, hashes[new], np.array(self.num_bytes, dtype=np.int32)[new])


def ingest(
    files: list[SourceFile], spool: Spool, *, on_chunk: Callable[[int, int], None], note: Callable[[str], None]
) -> None:
    """Read the files into text chunks. Chunks that are complete are kept; reading goes on where the last one ended.

    `on_chunk` is told how far it is: the file, and about how many bytes of it are read.
    """
    seen, number, info = SeenHashes(), spool.num_chunks(), ChunkInfo()
    for done in range(number):
        seen.add(spool.hashes(done)[0])
        info = spool.info(done)
    if info.last:
        return
    on_chunk(info.next_file, 0)
    found: dict[str, str] = {}
    said: set[str] = set()

    def say(index: int, format: str) -> None:
        found[str(index)] = format
        if (line := f"{files[index].argument}: {format}") not in said and (format != "text" or len(files) == 1):
            said.add(line)
            note(line)

    chunk, current, done = _OpenChunk(), -1, 0
    for item, position in _items(files, info.next_file, info.next_item, say):
        before = chunk.weight
        chunk.add(item)
        done = chunk.weight - before + (done if position[0] == current else 0)
        current = position[0]
        if chunk.full:
            chunk.info = replace(chunk.info, next_file=position[0], next_item=position[1], found=dict(found))
            spool.write_text(number, chunk.close(seen), chunk.info)
            on_chunk(current, done)
            number, chunk = number + 1, _OpenChunk()
            found.clear()
    chunk.info = replace(chunk.info, next_file=len(files), last=True, found=dict(found))
    spool.write_text(number, chunk.close(seen), chunk.info)
    on_chunk(len(files), 0)


@dataclass
class RowCounts:
    """Totals over the chunks, and the first bad rows."""

    rows: int = 0
    bad: int = 0
    empty: int = 0
    duplicates: int = 0
    first_bad: list[BadRow] = field(default_factory=list)
    found: dict[str, str] = field(default_factory=dict)


def check_rows(infos: Iterable[ChunkInfo], max_bad_ratio: float) -> RowCounts:
    """Count the rows; ArtefactError when too many are bad, or when there is no document at all."""
    counts = RowCounts()
    for info in infos:
        counts.rows += info.num_rows
        counts.bad += len(info.bad_rows)
        counts.empty += info.num_empty
        counts.duplicates += info.num_duplicates
        counts.first_bad += info.bad_rows[: MAX_BAD_SHOWN - len(counts.first_bad)]
        counts.found |= info.found
    if counts.bad > max_bad_ratio * counts.rows:
        lines = [
            f"{counts.bad:,} of {counts.rows:,} rows are bad ({counts.bad / counts.rows:.2%}), more than the "
            f"max_bad_ratio of {max_bad_ratio:.2%}; mend them or raise --max-bad-ratio. The first ones:",
            *(f"  {row.origin}: {row.reason}" for row in counts.first_bad),
        ]
        raise ArtefactError("\n".join(lines))
    if counts.rows == counts.bad + counts.empty:
        raise ArtefactError("the sources hold no document (nothing but empty text); name at least one with text in it")
    return counts


def _items(
    files: list[SourceFile], first_file: int, first_item: int, say: Callable[[int, str], None]
) -> Iterator[tuple[Document | BadRow, tuple[int, int]]]:
    """Every item from a position on, with the position after it."""
    for index in range(first_file, len(files)):
        skip = first_item if index == first_file else 0
        items = read_source(files[index], note=lambda format, index=index: say(index, format))
        for number, item in enumerate(islice(items, skip, None), skip + 1):
            yield item, (index, number)
