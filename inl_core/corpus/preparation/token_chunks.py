"""Chunks of text -> chunks of tokens, on all cores, in the order in which they came.

Several batches are encoded at once: while some of them wait for Python's global lock to hand over their ids, the others
keep the cores busy.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields
from itertools import chain

import numpy as np

from inl_core.corpus.encoding import encode_documents, token_dtype
from inl_core.corpus.preparation.chunks import EncodedDocuments, HashedDocuments
from inl_core.corpus.tokenizer import Tokenizer

_BATCH_BYTES = 1 << 20
_IN_FLIGHT = 4


def encode_chunks(
    tokenizer: Tokenizer, chunks: Iterator[tuple[int, HashedDocuments]]
) -> Iterator[tuple[int, EncodedDocuments | None, int]]:
    """Encode numbered chunks in order, batch by batch.

    Yields (number of the chunk, None, bytes of text) for each batch; the last batch of a chunk has the whole encoded
    chunk in the place of None.
    """
    with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="encode") as pool:
        pending: deque[tuple[int, Future[EncodedDocuments], bool]] = deque()
        done: list[EncodedDocuments] = []

        def finish() -> tuple[int, EncodedDocuments | None, int]:
            number, future, is_last = pending.popleft()
            batch = future.result()
            done.append(batch)
            chunk = _joined(done) if is_last else None
            if is_last:
                done.clear()
            return number, chunk, int(batch.num_bytes.sum())

        for number, documents in chunks:
            for rows, is_last in _batches(documents.num_bytes):
                pending.append((number, pool.submit(_encode, tokenizer, documents, rows), is_last))
                if len(pending) > 2 * _IN_FLIGHT:
                    yield finish()
        while pending:
            yield finish()


def _batches(num_bytes: np.ndarray) -> Iterator[tuple[slice, bool]]:
    """(rows of about _BATCH_BYTES, whether they are the last of the chunk); an empty chunk is one empty batch."""
    start = total = 0
    for row, size in enumerate(num_bytes.tolist()):
        if total + size > _BATCH_BYTES and row > start:
            yield slice(start, row), False
            start, total = row, 0
        total += size
    yield slice(start, len(num_bytes)), True


def _encode(tokenizer: Tokenizer, documents: HashedDocuments, rows: slice) -> EncodedDocuments:
    encoded = encode_documents(tokenizer, documents.documents[rows])
    lengths = np.array([len(tokens) for tokens, _ in encoded], dtype=np.int64)
    return EncodedDocuments(
        np.fromiter(chain.from_iterable(tokens for tokens, _ in encoded), token_dtype(tokenizer), int(lengths.sum())),
        lengths,
        np.array([prompt_length for _, prompt_length in encoded], dtype=np.int32),
        documents.num_bytes[rows],
        documents.hashes[rows],
    )


def _joined(batches: list[EncodedDocuments]) -> EncodedDocuments:
    columns = ([getattr(batch, column.name) for batch in batches] for column in fields(EncodedDocuments))
    return EncodedDocuments(*map(np.concatenate, columns))
