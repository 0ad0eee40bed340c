"""The log-probability that a model gives to each token of a text, alone or after a context; many texts in one batch.

- Texts are scored longest first, in batches padded on the right. Continuations that share all tokens before their last
  one, such as the letters of a multiple choice, share one row of a batch. Longer ones of a long context share the pass
  over it (shared_contexts.py).
- The model sees C tokens at once. Where context and continuation together are longer, the context loses its beginning.
  A continuation that alone is longer than C is scored in windows: its first C tokens in one, then C / 2 in each, with
  the C / 2 before them as their context.
- Legend: B rows, S tokens, N tokens of a continuation, D d_model, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from inl_core.errors import NonFiniteError, RecipeError
from inl_core.inference.loading import LoadedModel
from inl_core.inference.shared_contexts import batches, hidden_states, shared_contexts
from inl_core.model import IntegratorLanguageModel, Options

_ROWS_AT_ONCE = 512
"""Tokens whose logits, (tokens, V), are in memory together."""

Ids = Sequence[int]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class TokenScores:
    """What a model gives to the N tokens of a text or of a continuation."""

    ids: tuple[int, ...]
    """The tokens that were scored."""
    log_probabilities: np.ndarray
    """(N,) float64, nats: the logarithm of each token's probability after all tokens before it."""
    is_best: np.ndarray
    """(N,) bool: whether each is the most probable token there."""

    @property
    def total(self) -> float:
        """The log-likelihood of all of it, in nats."""
        return float(self.log_probabilities.sum())

    @property
    def is_greedy(self) -> bool:
        """Whether greedy decoding would write exactly these tokens."""
        return bool(self.is_best.all())


def score_texts(
    loaded: LoadedModel, texts: Sequence[str], contexts: Sequence[str] | None = None, *, batch_size: int = 16
) -> list[TokenScores]:
    """The scores of each text, or of each text as the continuation of its context.

    Every text begins as in training, with the token that begins a document (bos). Text and context are encoded
    together, so that a word may stretch across their border; spaces that end the context are counted to the text.

    Raises:
        RecipeError: there are not as many contexts as texts.
        NonFiniteError: the model's logits are not finite.
    """
    if contexts is not None and len(contexts) != len(texts):
        raise RecipeError(f"{len(contexts):,} contexts for {len(texts):,} texts: give one for each")
    encode, bos = loaded.tokenizer.encode, loaded.tokenizer.bos_id
    pairs = []
    for text, context in zip(texts, contexts or [""] * len(texts), strict=True):
        bare = context.rstrip()
        num_before = len(encode(bare)) if bare else 0
        ids = encode(context + text)
        pairs.append(([bos, *ids[:num_before]], ids[num_before:]))
    return score_tokens(loaded.model, pairs, batch_size=batch_size)


@torch.no_grad()
def score_tokens(
    model: IntegratorLanguageModel,
    pairs: Sequence[tuple[Ids, Ids]],
    *,
    batch_size: int = 16,
    options: Options | None = None,
    bf16: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[TokenScores]:
    """The scores of each continuation's tokens after its context; the model is left in the mode it came in.

    Args:
        pairs: (context, continuation) as token ids. The context has at least one, which mostly is bos.
        batch_size: rows in one pass; it changes speed only.
        options: iterations and early stopping.
        bf16: whether matrix products are computed in bfloat16.
        progress: is told how many of how many rows are done.

    Raises:
        RecipeError: a context is empty, or an id is not in the vocabulary.
        NonFiniteError: the model's logits are not finite.
    """
    _check(pairs, model)
    longest, options = model.config.max_seq_len, options or Options()
    groups = shared_contexts(pairs, longest, batch_size)
    shared = {index for group in groups for index, _ in group.members}
    rows = sorted(_divide(pairs, longest, shared).items(), key=lambda row: -len(row[0]))
    parts = [rows[first : first + batch_size] for first in range(0, len(rows), batch_size)]
    passes = [(len(part), partial(_hidden_states, model, part, options)) for part in parts]
    for batch in batches(groups, batch_size):
        passes.append((sum(len(group.members) for group in batch), partial(hidden_states, model, batch, options)))
    scores = [(np.zeros(len(wanted)), np.ones(len(wanted), dtype=bool)) for _, wanted in pairs]
    was_training, device, done = model.training, model.embedding.table.weight.device, 0
    model.eval()
    try:
        for count, run in passes:
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                for (index, begin), tokens, states in run():
                    log_probabilities, best = _likelihood(model, states, tokens)
                    scores[index][0][begin : begin + len(best)] = log_probabilities
                    scores[index][1][begin : begin + len(best)] = best
            done += count
            progress(done, len(shared) + len(rows))
    finally:
        model.train(was_training)
    return [TokenScores(tuple(ids), *found) for (_, ids), found in zip(pairs, scores, strict=True)]


def _check(pairs: Sequence[tuple[Ids, Ids]], model: IntegratorLanguageModel) -> None:
    size = model.config.vocab_size or 0
    for index, (context, continuation) in enumerate(pairs):
        if not context:
            raise RecipeError(f"pair {index}: an empty context; begin with bos, as documents do in training")
        wrong = next((token for token in (*context, *continuation) if not 0 <= token < size), None)
        if wrong is not None:
            raise RecipeError(f"pair {index}: token {wrong} is not in the model's vocabulary of {size:,}")


_Row = tuple[tuple[int, ...], list[tuple[tuple[int, int], Ids]]]
"""Tokens that the model reads once, and what is scored in them: (number of a pair, place in its continuation), and the
tokens, the last of which is the one that comes after the row."""


def _divide(pairs: Sequence[tuple[Ids, Ids]], longest: int, shared: set[int]) -> dict[tuple[int, ...], list]:
    """The rows of all pairs but those that are `shared`."""
    rows: dict[tuple[int, ...], list] = {}
    for index, (context, continuation) in enumerate(pairs):
        ids, start = (*context, *continuation), len(context)
        while start < len(ids) and index not in shared:
            is_first = start == len(context)
            end = min(len(ids), start + (longest if is_first else max(1, longest // 2)))
            row = ids[max(0, end - 1 - longest) : end - 1]
            rows.setdefault(row, []).append(((index, start - len(context)), ids[start:end]))
            start = end
    return rows


def _hidden_states(
    model: IntegratorLanguageModel, rows: list[_Row], options: Options
) -> Iterator[tuple[tuple[int, int], Ids, Tensor]]:
    """(where it belongs, N tokens, the states (N, D) from which they are predicted) of what is scored in the rows."""
    width, device = max(len(ids) for ids, _ in rows), model.embedding.table.weight.device
    # What stands to the right of a text is seen by none of its tokens.
    padded = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids, _ in rows], device=device)
    hidden = model(padded, options=options).hidden  # (B, S, D)
    for (ids, wanted), states in zip(rows, hidden, strict=True):
        for place, tokens in wanted:
            # Several continuations of one row mostly are one token each, whose logits are quickly computed again.
            yield place, tokens, states[len(ids) - len(tokens) : len(ids)]


def _likelihood(model: IntegratorLanguageModel, states: Tensor, tokens: Ids) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities (N,) of the tokens after the states (N, D), and whether each is the most probable one."""
    found, best = [], []
    targets = torch.tensor(tokens, device=states.device).split(_ROWS_AT_ONCE)
    for part, wanted in zip(states.split(_ROWS_AT_ONCE), targets, strict=True):
        logits = model.logits(part)
        found.append(logits.log_softmax(-1).gather(1, wanted[:, None]).squeeze(1).double())
        best.append(logits.argmax(-1) == wanted)
    log_probabilities = torch.cat(found)
    if not log_probabilities.isfinite().all():
        raise NonFiniteError("the model's logits are not finite; use an earlier checkpoint")
    return log_probabilities.cpu().numpy(), torch.cat(best).cpu().numpy()
