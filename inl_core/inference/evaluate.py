"""Cross-entropy, perplexity, bits per byte and accuracy of a model on token windows.

- Bits per byte = bits spent on text tokens / bytes of the source text that they stand for. Special tokens have no
  bytes, so neither their bits nor their bytes count, here and in training; loss, perplexity and accuracy count every
  target.
- Many tokenizers do not keep every byte (they drop or add spaces, change case). For those the bytes are known of a
  whole text only: of a part none are claimed, and bits per byte is None. Nor is it claimed where an unknown token is
  scored: it stands for any text, which the model is spared predicting.
- Sums are kept in float64, so the order of the batches does not matter to the printed digits.
"""

import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from inl_core.corpus.loader import Batch, TokenStream
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError
from inl_core.model import IntegratorLanguageModel, Options
from inl_core.model.vocabulary import logit_rows

_TOKENS_AT_ONCE = 1 << 20


class ByteCounts(NamedTuple):
    """What is known of the bytes behind a text's tokens, as `evaluate` takes it."""

    token_num_bytes: np.ndarray
    """(V,) bytes of each token, 0 for special ones, NaN where nobody can tell."""
    num_bytes: int | None
    """Bytes of the source text when all of it is scored; None where that is not known, or part of it is unknown."""


def byte_counts(tokenizer: Tokenizer, stream: TokenStream, num_bytes: int, *, is_whole: bool = True) -> ByteCounts:
    """The byte counts of a source text of `num_bytes` bytes that became the tokens of `stream`.

    Unless the tokenizer is exact, its tokens' own bytes are believed only where they add up to the text's: no rule
    changed it then. Only that reads the stream.

    Args:
        is_whole: whether all of the stream is scored; of a part no size is known.
    """
    table, has_unknown = tokenizer.token_num_bytes, False
    if not tokenizer.has_exact_bytes and (is_whole or tokenizer.keeps_every_byte):
        total, has_unknown = _count(tokenizer, stream)
        if total != num_bytes:
            table = np.where(table > 0, np.nan, table)
    # A prompt's tokens are not scored, and its bytes are not told apart from the completion's.
    is_known = is_whole and not has_unknown and stream.prompt_lengths is None
    return ByteCounts(table, num_bytes if is_known else None)


def _count(tokenizer: Tokenizer, stream: TokenStream) -> tuple[float, bool]:
    """The sum of all tokens' own bytes (NaN where one's are not known), and whether an unknown token is among them."""
    total, has_unknown = 0.0, False
    for segment in stream.segments:
        for start in range(0, len(segment), _TOKENS_AT_ONCE):
            part = segment[start : start + _TOKENS_AT_ONCE]
            total += float(tokenizer.token_num_bytes[part].sum())
            has_unknown |= tokenizer.unknown_id is not None and bool((part == tokenizer.unknown_id).any())
    return total, has_unknown


class NothingToScore(ArtefactError):
    """A text that holds no target token."""


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on a text."""

    loss: float
    """Mean nats per target token."""
    perplexity: float
    bits_per_byte: float | None
    """None: nobody can tell how many bytes the scored tokens stand for."""
    accuracy: float
    """Share of targets that are the most probable token."""
    iterations: float
    """Mean integrator iterations per token and layer."""
    tokens: int
    """Target tokens."""
    bytes: int | None
    """Bytes of text behind them."""
    seconds: float

    @property
    def bits_per_byte_text(self) -> str:
        """Bits per byte for people."""
        return "-" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f}"


@torch.inference_mode()
def evaluate(
    model: IntegratorLanguageModel,
    batches: Iterable[Batch],
    token_num_bytes: np.ndarray,
    *,
    num_bytes: int | None = None,
    num_iterations: int | None = None,
    early_stopping: bool = True,
    autocast: AbstractContextManager | None = None,
    reduce: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Evaluation:
    """Score `batches`; the model is left in the mode it came in.

    Args:
        token_num_bytes: (V,) bytes of each token, 0 for special ones, NaN where nobody can tell (Tokenizer has it).
        num_bytes: bytes of the source text, where the batches are all of it; they go before the tokens' own.
        num_iterations: T instead of the model's own; without an integrator it means nothing.
        early_stopping: False lets no token stop before T iterations.
        reduce: adds the sums over ranks, when each rank scores a part.

    Raises:
        NothingToScore: no batch holds a target token.
    """
    was_training, start = model.training, time.perf_counter()
    model.eval()
    device = model.embedding.table.weight.device
    byte_table = torch.from_numpy(token_num_bytes.astype(np.float64)).to(device)
    options = Options(num_iterations=num_iterations, early_stopping=early_stopping)
    # nats, nats of text, targets, bytes, correct, iterations
    sums = torch.zeros(6, dtype=torch.float64)
    for batch in batches:
        with autocast or nullcontext():
            sums += _score(model, batch, byte_table, options, device).cpu()
    nats, text_nats, tokens, token_bytes, correct, iterations = reduce(sums.to(device)).tolist()
    model.train(was_training)
    if not tokens:
        raise NothingToScore("evaluation: the text holds no target token; score more of it, or give it more text")
    loss = nats / tokens
    if num_bytes is None and math.isfinite(token_bytes):
        num_bytes = int(token_bytes)
    return Evaluation(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        bits_per_byte=text_nats / math.log(2) / num_bytes if num_bytes else None,
        accuracy=correct / tokens,
        iterations=iterations / tokens,
        tokens=int(tokens),
        bytes=num_bytes,
        seconds=time.perf_counter() - start,
    )


def _score(
    model: IntegratorLanguageModel, batch: Batch, byte_table: Tensor, options: Options, device: torch.device
) -> Tensor:
    """The six sums of one batch, (6,) float64."""
    tensors = {
        name: None if (array := getattr(batch, name)) is None else torch.from_numpy(array).to(device)
        for name in ("tokens", "targets", "positions", "document_ids")
    }
    ids, targets = tensors["tokens"], tensors["targets"]
    assert ids is not None
    assert targets is not None
    output = model(ids, positions=tensors["positions"], document_ids=tensors["document_ids"], options=options)
    valid = targets != -100
    hidden, wanted = output.hidden[valid], targets[valid]  # (N, D), (N,)
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    rows = logit_rows(model.vocab_size, device)
    for start in range(0, len(wanted), rows):
        part = wanted[start : start + rows]
        logits = model.logits(hidden[start : start + rows])
        nats = F.cross_entropy(logits, part, reduction="none").double()
        num_bytes = byte_table[part]
        correct = (logits.argmax(-1) == part).sum().double()
        sums[:5] += torch.stack(
            (nats.sum(), nats[num_bytes != 0].sum(), nats.new_tensor(len(part)), num_bytes.sum(), correct)
        )
    sums[5] = output.iterations()[valid].double().sum()
    return sums


def most_iterations(model: IntegratorLanguageModel, num_iterations: int | tuple[int, ...] | None) -> float:
    """Mean iterations over layers of a token that does not stop early; 0 without an integrator."""
    if model.config.integrator is None:
        return 0.0
    if num_iterations is None and model.budget is not None:
        num_iterations = tuple(layer.num_iterations for layer in model.budget())
    if num_iterations is None:
        return model.config.mean_iterations
    return sum(num_iterations) / len(num_iterations) if isinstance(num_iterations, tuple) else float(num_iterations)
