"""Cross-entropy, perplexity, bits per byte and accuracy of a model on token windows.

- Bits per byte = bits spent on the text's tokens / bytes of the text. Special tokens stand for no bytes of it, so their
  bits are left out, here and in training; loss, perplexity and accuracy count every target.
- Many tokenizers do not keep every byte: they drop or add spaces, or change case. For those only the size of the whole
  text is known, so bits per byte is None when a part of it is scored. It is also None when an unknown token is scored,
  because that stands for any text, which the model is spared predicting.
- Sums are kept in float64, so that the order of the batches does not change the printed digits.
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

from inl_core.corpus.dataset import TokenStream
from inl_core.corpus.loader import Batch
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError
from inl_core.kernels.loss import logit_rows
from inl_core.model import IntegratorLanguageModel, Options

_TOKENS_AT_ONCE = 1 << 20


class ByteCounts(NamedTuple):
    """How many bytes of text the tokens stand for, as `evaluate` takes it."""

    token_num_bytes: np.ndarray
    """(V,) bytes of each token: 0 for special ones, NaN for those of which it is not known."""
    num_bytes: int | None
    """Bytes of the source text when all of it is scored; None where that is not known, or a part of it is unknown."""


def byte_counts(tokenizer: Tokenizer, stream: TokenStream, num_bytes: int, *, is_whole: bool = True) -> ByteCounts:
    """The byte counts of a source text of `num_bytes` bytes that became the tokens of `stream`.

    A tokenizer that is not exact may have changed this text or not. If the bytes of its tokens add up to the text's, it
    did not, and they are believed. The stream is read only to find that out.

    Args:
        is_whole: whether all of the stream is scored; of a part no size is known.
    """
    table, has_unknown = tokenizer.token_num_bytes, False
    if not tokenizer.has_exact_bytes and (is_whole or tokenizer.keeps_every_byte):
        total = 0.0
        for segment in stream.segments:
            for part in np.array_split(segment, -(-len(segment) // _TOKENS_AT_ONCE)):
                total += float(table[part].sum())
                has_unknown |= tokenizer.unknown_id is not None and bool((part == tokenizer.unknown_id).any())
        if total != num_bytes:  # also where it is NaN
            table = np.where(table > 0, np.nan, table)
    # With prompts, only completions are scored, and the text's size is that of both.
    is_known = is_whole and not has_unknown and stream.prompt_lengths is None
    return ByteCounts(table, num_bytes if is_known else None)


class NothingToScore(ArtefactError):
    """A text that holds no target token."""


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on a text."""

    loss: float
    """Mean nats per target token."""
    perplexity: float
    bits_per_byte: float | None
    """None where it is not known how many bytes the scored tokens stand for."""
    accuracy: float
    """Share of targets that are the most probable token."""
    iterations: float | None
    """Mean integrator iterations per token and layer; None without an integrator."""
    tokens: int
    """Target tokens."""
    bytes: int | None
    """Bytes of text behind them."""
    seconds: float

    @property
    def bits_per_byte_text(self) -> str:
        """Bits per byte for people."""
        return "-" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f}"


@torch.no_grad()  # as other passes of a trainer's model: a compiler would take inference mode for another kind
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
        token_num_bytes: (V,) bytes of each token, as in `ByteCounts`.
        num_bytes: bytes of the source text, where the batches are all of it; without it, the sum of the tokens' bytes.
        num_iterations: T instead of the model's own; ignored without an integrator.
        early_stopping: False makes every token take all T iterations.
        autocast: the context of the forward pass.
        reduce: adds the sums of all ranks, when each rank scores a part of the batches.

    Raises:
        NothingToScore: no batch holds a target token.
    """
    was_training, start = model.training, time.perf_counter()
    model.eval()
    device = model.embedding.table.weight.device
    byte_table = torch.from_numpy(token_num_bytes.astype(np.float64)).to(device)
    options = Options(num_iterations=num_iterations, early_stopping=early_stopping)
    sums = torch.zeros(6, dtype=torch.float64, device=device)
    for batch in batches:
        with autocast or nullcontext():
            sums += _score(model, batch, byte_table, options)
    nats, text_nats, tokens, token_bytes, correct, iterations = reduce(sums).tolist()
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
        iterations=iterations / tokens if model.config.integrator else None,
        tokens=int(tokens),
        bytes=num_bytes,
        seconds=time.perf_counter() - start,
    )


def _score(model: IntegratorLanguageModel, batch: Batch, byte_table: Tensor, options: Options) -> Tensor:
    """Sums over one batch, (6,) float64: nats, nats of text tokens, targets, bytes, correct targets, iterations."""
    arrays = (batch.tokens, batch.targets, batch.positions, batch.document_ids)
    ids, targets, positions, document_ids = (
        None if array is None else torch.from_numpy(array).to(byte_table.device) for array in arrays
    )
    assert ids is not None
    assert targets is not None
    output = model(ids, positions=positions, document_ids=document_ids, options=options)
    valid = targets != -100
    hidden, wanted = output.hidden[valid], targets[valid]  # (N, D), (N,)
    sums = byte_table.new_zeros(6)
    rows = logit_rows(model.vocab_size, sums.device)  # whose logits are in memory at once
    for start in range(0, len(wanted), rows):
        part = wanted[start : start + rows]
        logits = model.logits(hidden[start : start + rows])
        nats = F.cross_entropy(logits, part, reduction="none").double()
        num_bytes = byte_table[part]
        correct = (logits.argmax(-1) == part).sum()
        counts = (nats.sum(), nats[num_bytes != 0].sum(), nats.new_tensor(len(part)), num_bytes.sum(), correct.double())
        sums[:5] += torch.stack(counts)
    sums[5] = output.iterations()[valid].double().sum()
    return sums


def most_iterations(model: IntegratorLanguageModel, num_iterations: int | None) -> float | None:
    """Mean iterations over layers of a token that does not stop early; None without an integrator.

    Args:
        num_iterations: T instead of the model's own; None for that.
    """
    if model.config.integrator is None:
        return None
    if num_iterations is not None:
        return float(num_iterations)
    if model.budget is None:
        return model.config.mean_iterations
    return sum(layer.num_iterations for layer in model.budget()) / model.config.num_layers
