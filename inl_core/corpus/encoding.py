"""Text chunks -> token chunks: documents become bos, tokens, eos, on all cores, in the order they came.

- Several batches are in flight: while some wait for the GIL to hand over their ids, the others keep the cores busy.
- Prompt and completion (and every message) are encoded apart, so that the boundary between them is exact.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np

from inl_core.corpus.dataset import TokenStream
from inl_core.corpus.rows import PROMPT_ROLES, ROLE_OF_CODE, Document
from inl_core.corpus.spool import HashedDocuments, TokenChunk
from inl_core.corpus.tokenizer import Tokenizer

BATCH_BYTES = 1 << 20
_IN_FLIGHT = 4


@dataclass(frozen=True)
class EncodedBatch:
    """A few documents' tokens, flat."""

    chunk: int
    tokens: np.ndarray  # (sum of lengths,)
    lengths: np.ndarray  # (n,) int64
    prompt_lengths: np.ndarray  # (n,) int32
    num_bytes: np.ndarray  # (n,) int32
    hashes: np.ndarray  # (n,) uint64
    ends_chunk: bool


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """uint16 when every id fits, else uint32."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def encode_document(tokenizer: Tokenizer, document: Document, parts: Sequence[list[int]]) -> tuple[list[int], int]:
    """(tokens with bos, roles and eos; prompt_length) of a document whose parts are encoded already."""
    tokens = [tokenizer.bos_id]
    prompt_length = 0
    if document.roles in ("", PROMPT_ROLES):
        for part in parts:
            prompt_length = len(tokens) if document.roles else 0
            tokens += part
    else:
        for code, part in zip(document.roles, parts, strict=True):
            tokens.append(tokenizer.role_id(ROLE_OF_CODE[code]))
            prompt_length = len(tokens)
            tokens += part
            tokens.append(tokenizer.role_id("end"))
    tokens.append(tokenizer.eos_id)
    return tokens, prompt_length


def document_stream(tokenizer: Tokenizer, documents: Sequence[Document], *, document_mask: bool) -> TokenStream:
    """Documents as the stream of tokens that a preparation would make of them, in their order."""
    encoded = [encode_document(tokenizer, d, tokenizer.encode_documents(d.texts)) for d in documents]
    # A foreign tokenizer's normaliser may leave nothing of a document.
    encoded = [(tokens, prompt_length) for tokens, prompt_length in encoded if len(tokens) > 2]
    rows = [np.array(tokens, dtype=token_dtype(tokenizer)) for tokens, _ in encoded]
    prompts = np.array([prompt_length for _, prompt_length in encoded], dtype=np.int64)
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)[:-1]
    has_prompts = bool(prompts.any())
    return TokenStream(
        [np.concatenate(rows)] if rows else [],
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        document_starts=starts if has_prompts else None,
        prompt_lengths=prompts if has_prompts else None,
        document_mask=document_mask,
    )


def encode_chunks(
    tokenizer: Tokenizer, chunks: Iterator[tuple[int, HashedDocuments]]
) -> Iterator[tuple[int, TokenChunk | None, int]]:
    """Encode numbered chunks in order: (number, None, bytes) for each batch, with the whole TokenChunk in the last."""
    with ThreadPoolExecutor(_IN_FLIGHT, thread_name_prefix="encode") as pool:
        pending: deque[Future[EncodedBatch]] = deque()
        done: list[EncodedBatch] = []

        def finish() -> Iterator[tuple[int, TokenChunk | None, int]]:
            batch = pending.popleft().result()
            done.append(batch)
            chunk = None
            if batch.ends_chunk:
                chunk = _join(done)
                done.clear()
            yield batch.chunk, chunk, int(batch.num_bytes.sum())

        for number, documents in chunks:
            for rows, ends_chunk in _batches(documents.num_bytes):
                pending.append(pool.submit(_encode_batch, tokenizer, number, documents, rows, ends_chunk))
                if len(pending) > 2 * _IN_FLIGHT:
                    yield from finish()
        while pending:
            yield from finish()


def _batches(num_bytes: np.ndarray) -> Iterator[tuple[slice, bool]]:
    """Consecutive rows of about BATCH_BYTES, and whether they are the last ones; an empty chunk is one empty batch."""
    start = total = 0
    for row, size in enumerate(num_bytes.tolist()):
        if total + size > BATCH_BYTES and row > start:
            yield slice(start, row), False
            start, total = row, 0
        total += size
    yield slice(start, len(num_bytes)), True


def _encode_batch(
    tokenizer: Tokenizer, chunk: int, documents: HashedDocuments, rows: slice, ends_chunk: bool
) -> EncodedBatch:
    selected = documents.documents[rows]
    encoded = iter(tokenizer.encode_documents([text for document in selected for text in document.texts]))
    tokens, lengths, prompt_lengths = [], [], []
    for document in selected:
        row, prompt_length = encode_document(tokenizer, document, [next(encoded) for _ in document.texts])
        # A normaliser of a foreign tokenizer may leave nothing; a document without content would blur the boundaries.
        row = row if len(row) > 2 else []
        tokens.append(row)
        lengths.append(len(row))
        prompt_lengths.append(prompt_length)
    keep = np.array(lengths, dtype=np.int64) > 0
    flat = np.fromiter(chain.from_iterable(tokens), token_dtype(tokenizer), sum(lengths))
    return EncodedBatch(
        chunk,
        flat,
        np.array(lengths, dtype=np.int64)[keep],
        np.array(prompt_lengths, dtype=np.int32)[keep],
        documents.num_bytes[rows][keep],
        documents.hashes[rows][keep],
        ends_chunk,
    )


def _join(batches: list[EncodedBatch]) -> TokenChunk:
    names = ("tokens", "lengths", "prompt_lengths", "num_bytes", "hashes")
    return TokenChunk(*(np.concatenate([getattr(batch, name) for batch in batches]) for name in names))
