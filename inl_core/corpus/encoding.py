"""Documents -> tokens: the beginning token, the document's tokens, the end token.

Prompt and completion (and every message of a conversation) are encoded apart, so that the boundary between them lies
between two tokens.
"""

from collections.abc import Sequence

import numpy as np

from inl_core.corpus.dataset import TokenStream
from inl_core.corpus.reading.rows import PROMPT_ROLES, ROLE_OF_LETTER, Document
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.recipe.data import LossOn


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """uint16 when every id fits, else uint32."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def encode_documents(tokenizer: Tokenizer, documents: Sequence[Document]) -> list[tuple[list[int], int]]:
    """(tokens, prompt_length) of each document, encoded on all cores.

    prompt_length is the number of tokens before the last answer, or 0 for plain text. A document of which nothing is
    left, as may happen under the normaliser of a foreign tokenizer, has no tokens: its two ends alone would blur the
    boundaries.
    """
    parts = iter(tokenizer.encode_documents([text for document in documents for text in document.texts]))
    encoded = [_with_ends(tokenizer, document, [next(parts) for _ in document.texts]) for document in documents]
    return [(tokens, prompt_length) if len(tokens) > 2 else ([], 0) for tokens, prompt_length in encoded]


def _with_ends(tokenizer: Tokenizer, document: Document, parts: Sequence[list[int]]) -> tuple[list[int], int]:
    """(tokens with bos, roles and eos; prompt_length) of a document whose parts are encoded already."""
    tokens = [tokenizer.bos_id]
    prompt_length = 0
    if document.roles in ("", PROMPT_ROLES):
        for part in parts:
            prompt_length = len(tokens) if document.roles else 0
            tokens += part
    else:
        for letter, part in zip(document.roles, parts, strict=True):
            tokens.append(tokenizer.role_id(ROLE_OF_LETTER[letter]))
            prompt_length = len(tokens)
            tokens += part
            tokens.append(tokenizer.role_id("end"))
    tokens.append(tokenizer.eos_id)
    return tokens, prompt_length


def document_stream(
    tokenizer: Tokenizer, documents: Sequence[Document], *, document_mask: bool, loss_on: LossOn = "answers"
) -> TokenStream:
    """Documents in their order as the stream of tokens that a preparation would make of them."""
    encoded = [found for found in encode_documents(tokenizer, documents) if found[0]]
    rows = [np.array(tokens, dtype=token_dtype(tokenizer)) for tokens, _ in encoded]
    prompts = np.array([prompt_length for _, prompt_length in encoded], dtype=np.int64)
    starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)[:-1]
    has_prompts = bool(prompts.any()) and loss_on != "all"
    return TokenStream(
        [np.concatenate(rows)] if rows else [],
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        document_starts=starts if has_prompts else None,
        prompt_lengths=prompts if has_prompts else None,
        turns=tokenizer.turns if loss_on == "answers" else None,
        document_mask=document_mask,
    )
