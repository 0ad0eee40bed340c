"""Sources -> chunks of text: copies are dropped, and empty and bad rows are counted and set aside.

- Copies are found by a 64-bit hash of the normalised text, so texts that differ only in case, spacing or Unicode form
  count as copies. The same hash decides later who goes to validation: copies cannot stand on both sides.
- 64 bits: among a hundred million documents the odds that two different ones have one hash are 1 in 4,000, and the
  price is one document dropped.
- Weights of sources act after that: a document is taken twice, or not at all, on whichever side of the split it is.
- Reading goes on after the last complete chunk.
"""

import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from itertools import islice

import numpy as np

from inl_core.corpus.preparation.chunks import CHUNK_BYTES, CHUNK_ROWS, ChunkInfo, Chunks, HashedDocuments
from inl_core.corpus.reading.rows import FORMS, BadRow, Document, Form, Item, name_columns
from inl_core.corpus.reading.sources import SourceFile, read_source
from inl_core.errors import ArtefactError

_BAD_ROWS_SHOWN = 5
_BAD_ROW_BYTES = 400  # counted for a bad row, so that a chunk of nothing but bad rows is bounded too


def document_hash(document: Document) -> int:
    """64-bit hash of the normalised text: NFKC, case folded, and a single space for each run of white space."""
    digest = blake2b(digest_size=8)
    for text in document.texts:
        # For ASCII, lower() gives the same as casefold() of NFKC, in a tenth of the time.
        folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
        digest.update(" ".join(folded.split()).encode("utf-8"))
        digest.update(b"\x00")
    digest.update(document.roles.encode())
    return int.from_bytes(digest.digest(), "little")


class SeenHashes:
    """A set of 64-bit hashes that takes 8 bytes for each: sorted arrays, merged as they come to equal size."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add uint64 hashes; returns a mask of those that were new (of equal ones, the first)."""
        new = np.zeros(len(hashes), dtype=bool)
        new[np.unique(hashes, return_index=True)[1]] = True
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            new &= run[places] != hashes
        fresh = np.sort(hashes[new])
        while self._runs and len(fresh) and len(self._runs[-1]) <= 2 * len(fresh):
            fresh = np.sort(np.concatenate([self._runs.pop(), fresh]), kind="stable")
        if len(fresh):
            self._runs.append(fresh)
        return new

    def __len__(self) -> int:
        return sum(map(len, self._runs))


class _OpenChunk:
    """The chunk that is being filled."""

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.hashes: list[int] = []
        self.num_bytes: list[int] = []
        self.weights: list[float] = []
        self.weight = 0
        self.info = ChunkInfo()

    @property
    def is_full(self) -> bool:
        return self.weight >= CHUNK_BYTES or self.info.num_rows >= CHUNK_ROWS

    def add(self, item: Item, weight: float) -> int:
        """Take in a row of a source with this weight; returns about how many bytes of its file it stood for."""
        self.info.num_rows += 1
        if isinstance(item, BadRow):
            self.info.bad_rows.append(item)
            self.weight += _BAD_ROW_BYTES
            return _BAD_ROW_BYTES
        elif all(not text or text.isspace() for text in item.texts):
            self.info.num_empty += 1
        else:
            self.documents.append(item)
            self.hashes.append(document_hash(item))
            self.num_bytes.append(sum(len(text) if text.isascii() else len(text.encode()) for text in item.texts))
            self.weights.append(weight)
            self.weight += self.num_bytes[-1] * max(1, math.ceil(weight))
            return self.num_bytes[-1]
        return 0

    def without_copies(self, seen: SeenHashes) -> HashedDocuments:
        """The documents that were not seen before, as often as their weights say; copies are counted in `info`.

        All that are taken come once, then all that are taken twice come again, and so on: the same text does not stand
        side by side.
        """
        hashes = np.array(self.hashes, dtype=np.uint64)
        times = times_taken(hashes, np.array(self.weights, dtype=np.float64))
        # A document that its source's weight leaves out is not seen: a restart, which reads the chunks, knows none.
        wanted = np.flatnonzero(times)
        new = seen.add(hashes[wanted])
        self.info.num_duplicates = int(len(new) - new.sum())
        times[wanted[~new]] = 0
        taken = np.concatenate([np.flatnonzero(times > turn) for turn in range(max(1, times.max(initial=0)))])
        documents = [self.documents[index] for index in taken.tolist()]
        return HashedDocuments(documents, hashes[taken], np.array(self.num_bytes, dtype=np.int32)[taken])


def times_taken(hashes: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(N,) how often each document is taken: its weight, rounded up or down by its hash, so that the mean is right."""
    whole = np.floor(weights)
    mixed = (hashes ^ (hashes >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)  # independent of other choices by hash
    return (whole + ((mixed >> np.uint64(32)) < (weights - whole) * 2**32)).astype(np.int64)


def read_into_chunks(
    files: list[SourceFile],
    chunks: Chunks,
    *,
    on_chunk: Callable[[int, int], None],
    note: Callable[[str], None],
    forms: Sequence[Form] = FORMS,
    weights: Mapping[str, float] | None = None,
) -> None:
    """Read the files into chunks of text; chunks that are complete already stay.

    Args:
        on_chunk: is told how far reading has come: the number of the file, and about how many of its bytes are read.
        note: is told the format and the columns that were recognised, once for each source.
        forms: in which columns the text of rows is looked for.
        weights: how often the documents of a source are taken, where that is not once.
    """
    seen, number, info = SeenHashes(), chunks.count(), ChunkInfo()
    for done in range(number):
        seen.add(chunks.hashes(done)[0])
        info = chunks.info(done)
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

    def write(chunk: _OpenChunk, **position: int | bool) -> None:
        documents = chunk.without_copies(seen)
        chunks.write_text(number, documents, chunk.info.model_copy(update={"found": dict(found), **position}))

    chunk, current, done = _OpenChunk(), -1, 0
    for item, (index, next_item) in _items(files, info.next_file, info.next_item, say, forms):
        weight = (weights or {}).get(files[index].argument, 1.0)
        done = chunk.add(item, weight) + (done if index == current else 0)
        current = index
        if chunk.is_full:
            write(chunk, next_file=index, next_item=next_item)
            on_chunk(index, done)
            number, chunk = number + 1, _OpenChunk()
            found.clear()
    write(chunk, next_file=len(files), last=True)
    on_chunk(len(files), 0)


def _items(
    files: list[SourceFile], first_file: int, first_item: int, say: Callable[[int, str], None], forms: Sequence[Form]
) -> Iterator[tuple[Item, tuple[int, int]]]:
    """Every row from a position on, with the position after it: (number of the file, rows of it that are done)."""
    for index in range(first_file, len(files)):
        skip = first_item if index == first_file else 0
        items = read_source(files[index], note=lambda format, index=index: say(index, format), forms=forms)
        for number, item in enumerate(islice(items, skip, None), skip + 1):
            yield item, (index, number)


def check_rows(infos: Iterable[ChunkInfo], max_bad_ratio: float) -> ChunkInfo:
    """The totals over all chunks, without bad rows; ArtefactError when too many are bad, or there is no document."""
    totals, num_bad, first_bad = ChunkInfo(), 0, []
    for info in infos:
        totals.num_rows += info.num_rows
        totals.num_empty += info.num_empty
        totals.num_duplicates += info.num_duplicates
        totals.found |= info.found
        num_bad += len(info.bad_rows)
        first_bad += info.bad_rows[: _BAD_ROWS_SHOWN - len(first_bad)]
    if num_bad > max_bad_ratio * totals.num_rows:
        lines = [
            f"{num_bad:,} of {totals.num_rows:,} rows are bad ({num_bad / totals.num_rows:.2%}), more than the "
            f"max_bad_ratio of {max_bad_ratio:.2%}; mend them or raise --max-bad-ratio{name_columns(first_bad)}. "
            "The first ones:",
            *(f"  {row.origin}: {row.reason}" for row in first_bad),
        ]
        raise ArtefactError("\n".join(lines))
    if totals.num_rows == num_bad + totals.num_empty:
        raise ArtefactError("the sources hold no document (nothing but empty text); name at least one with text in it")
    return totals
