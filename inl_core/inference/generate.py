"""Prompts -> completions: the prompts in one pass, then one token a step for all rows, with a key-value cache.

    for piece in stream(model, tokenizer, ["def "], settings):
        print(piece.text, end="")

- A row is one sample of one prompt. Prompts of different length share a batch by padding on the left. A row gets the
  tokens it would get alone, and leaves the batch when it is finished.
- The samples of a prompt share the pass over the prompt.
- `sampling.py` chooses the tokens (temperature, top-k, top-p, min-p), `streaming.py` turns them into text.
- Legend: B rows, P prompts, S tokens.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from inl_core.corpus.reading.whole_sources import check_utf8
from inl_core.corpus.tokenizer import StreamDecoder, Tokenizer
from inl_core.errors import RecipeError
from inl_core.inference.decoding import Decoder, Predicted
from inl_core.inference.sampling import Sampler
from inl_core.inference.settings import GenerationSettings
from inl_core.inference.streaming import TextStream
from inl_core.model import IntegratorLanguageModel, Options

FinishReason = Literal["eos", "stop", "length", "context"]
_DEFAULTS = GenerationSettings()
_MOST_COMPLETIONS = 100_000


@dataclass(frozen=True)
class Completion:
    """One finished sample of one prompt."""

    prompt: str
    text: str
    """Without the prompt, special tokens and the stop string."""
    finish_reason: FinishReason
    """eos: the model ended it; stop: a stop string; length: max_new_tokens; context: the model's context is full."""
    token_ids: tuple[int, ...]
    """Every generated token, including the closing eos and a stop string's tokens."""
    iterations: tuple[float, ...]
    """The integrator iterations spent on predicting each token, the mean over layers; 0 without an integrator."""
    prompt_tokens: int
    """Tokens of the prompt, including bos."""
    prompt_index: int = 0
    sample_index: int = 0


@dataclass(frozen=True)
class Piece:
    """Text that one row adds, never half a character; the last piece of a row carries its completion."""

    prompt_index: int
    sample_index: int
    text: str
    completion: Completion | None = None


def generate(
    model: IntegratorLanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: GenerationSettings = _DEFAULTS,
) -> list[Completion]:
    """Complete every prompt `num_samples` times, in the order of prompts and samples; raises as `stream` does."""
    pieces = stream(model, tokenizer, prompts, settings)
    done = [piece.completion for piece in pieces if piece.completion is not None]
    return sorted(done, key=lambda completion: (completion.prompt_index, completion.sample_index))


def stream(
    model: IntegratorLanguageModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: GenerationSettings = _DEFAULTS,
) -> Iterator[Piece]:
    """The text of all completions piece by piece. The prompts are checked at once, before the first token.

    Raises:
        RecipeError: a prompt is not UTF-8 text or is longer than the model's context.
        NonFiniteError: the model's logits are not finite.
    """
    rows = _make_rows(model, tokenizer, prompts, settings)
    return _complete_rows(model, tokenizer, rows, settings)


@dataclass(frozen=True)
class Request:
    """One caller's prompt in a batch that several callers share."""

    prompt_ids: tuple[int, ...]
    """As `encode_prompt` makes them."""
    settings: GenerationSettings


def stream_together(
    decoder: Decoder,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    is_wanted: Callable[[int], bool] = lambda index: True,
) -> Iterator[Piece]:
    """Complete several requests in one batch; each gets the text that it would get alone, in pieces as from `stream`.

    Args:
        decoder: of a model in evaluation mode. Its iterations and precision count, not those of the requests.
        requests: what `GenerationSettings.sampling` gives must be the same for all. Seeds, lengths, stop strings and
            numbers of samples may differ.
        is_wanted: whether a request, by its number, is still waited for; asked after each token.
    """
    rows: list[_Row] = []
    for index, request in enumerate(requests):
        assert request.settings.sampling == requests[0].settings.sampling
        prompt = tokenizer.decode(request.prompt_ids)
        own = _rows_of(tokenizer, prompt, list(request.prompt_ids), request.settings, decoder.model, first_sample=0)
        rows += [replace(row, prompt_index=index) for row in own]
    yield from _complete_batch(decoder, tokenizer, rows, requests[0].settings, is_wanted)


def token_texts(tokenizer: Tokenizer, completion: Completion) -> list[tuple[str, float]]:
    """The completion's text divided among its tokens, each with its iterations; joined they are the text.

    A character made of several tokens belongs to the last of them; tokens beyond a stop string have no text.
    """
    decoder = StreamDecoder(tokenizer, tokenizer.encode(completion.prompt))
    left, parts = completion.text, []
    for index, token in enumerate(completion.token_ids):
        is_last = index + 1 == len(completion.token_ids)
        text = "" if is_last and completion.finish_reason == "eos" else decoder.push(token)
        text += decoder.flush() if is_last else ""
        text, left = left[: len(text)], left[len(text) :]
        parts.append((text, completion.iterations[index]))
    return parts


@dataclass
class _Row:
    """One sample of one prompt while it grows."""

    prompt: str
    prompt_ids: list[int]
    prompt_index: int
    sample_index: int
    random: random.Random
    text: TextStream
    limit: int
    """Tokens it may generate; the context may leave room for fewer than max_new_tokens."""
    limit_reason: FinishReason
    token_ids: list[int] = field(default_factory=list)
    iterations: list[float] = field(default_factory=list)

    def add(self, token: int, iterations: float, end_ids: frozenset[int]) -> Piece:
        """Take the next token; the piece is the text that it makes certain."""
        self.token_ids.append(token)
        self.iterations.append(iterations)
        is_end = token in end_ids
        shown = "" if is_end else self.text.push(token)
        is_full = len(self.token_ids) >= self.limit
        if not (is_end or self.text.is_stopped or is_full):
            return Piece(self.prompt_index, self.sample_index, shown)
        shown += self.text.finish()  # which may still complete a stop string
        reason: FinishReason = "stop" if self.text.is_stopped else "eos" if is_end else self.limit_reason
        completion = Completion(
            prompt=self.prompt,
            text=self.text.text,
            finish_reason=reason,
            token_ids=tuple(self.token_ids),
            iterations=tuple(self.iterations),
            prompt_tokens=len(self.prompt_ids),
            prompt_index=self.prompt_index,
            sample_index=self.sample_index,
        )
        return Piece(self.prompt_index, self.sample_index, shown, completion)


def _make_rows(
    model: IntegratorLanguageModel, tokenizer: Tokenizer, prompts: Sequence[str], settings: GenerationSettings
) -> list[_Row]:
    """All rows, by prompt and sample."""
    total = len(prompts) * settings.num_samples
    if total > _MOST_COMPLETIONS:
        raise RecipeError(f"{total:,} completions at once, above {_MOST_COMPLETIONS:,}: give fewer prompts or samples")
    rows, repeats = [], Counter()
    for index, prompt in enumerate(prompts):
        name = f"prompt {index + 1}" if len(prompts) > 1 else "the prompt"
        ids = encode_prompt(tokenizer, prompt, name, max_seq_len=model.config.max_seq_len, bos=settings.bos)
        own = _rows_of(tokenizer, prompt, ids, settings, model, first_sample=repeats[prompt])
        rows += [replace(row, prompt_index=index) for row in own]
        repeats[prompt] += settings.num_samples
    return rows


def _rows_of(
    tokenizer: Tokenizer,
    prompt: str,
    ids: list[int],
    settings: GenerationSettings,
    model: IntegratorLanguageModel,
    *,
    first_sample: int,
) -> list[_Row]:
    """The samples of one prompt, whose random numbers are those of its sample `first_sample` and the following ones."""
    room = model.config.max_seq_len - len(ids) + 1  # the last token needs no place: nothing is predicted from it
    return [
        _Row(
            prompt=prompt,
            prompt_ids=ids,
            prompt_index=0,
            sample_index=sample,
            random=_row_random(settings.seed, prompt, first_sample + sample),
            text=TextStream(tokenizer, settings.stop, prompt_ids=ids[ids[:1] == [tokenizer.bos_id] :]),  # without bos
            limit=min(settings.max_new_tokens, room),
            limit_reason="length" if settings.max_new_tokens <= room else "context",
        )
        for sample in range(settings.num_samples)
    ]


def encode_prompt(
    tokenizer: Tokenizer, prompt: str, name: str = "the prompt", *, max_seq_len: int, bos: bool = True
) -> list[int]:
    """The begin token, unless `bos` is False, and the prompt's tokens.

    Raises:
        RecipeError: it is not UTF-8 text, does not fit the model's context, or is empty and has no begin token; `name`
            says which prompt.
    """
    check_utf8(prompt, name)
    ids = [tokenizer.bos_id] * bos + tokenizer.encode(prompt)
    if not ids:
        raise RecipeError(f"{name}: is empty, and without the beginning-of-text token there is nothing to continue")
    check_length(ids, name, max_seq_len=max_seq_len)
    return ids


def check_length(ids: Sequence[int], name: str, *, max_seq_len: int) -> None:
    """RecipeError where the tokens of a prompt do not fit the model's context."""
    if len(ids) > max_seq_len:
        raise RecipeError(
            f"{name}: {len(ids):,} tokens with the beginning-of-text token, the model's context holds {max_seq_len:,}; "
            f"shorten it by {len(ids) - max_seq_len:,} tokens"
        )


def _row_random(seed: int, prompt: str, sample: int) -> random.Random:
    """A row's own random numbers, which depend on nothing but these three: not on the other rows of its batch.

    Args:
        sample: counts on where a prompt is given twice, so that the two do not get the same text.
    """
    digest = hashlib.blake2b(f"sampling/{seed}/{sample}/{prompt}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "little"))


def _complete_rows(
    model: IntegratorLanguageModel, tokenizer: Tokenizer, rows: list[_Row], settings: GenerationSettings
) -> Iterator[Piece]:
    """Complete batch after batch in evaluation mode; afterwards the model is in the mode it came in."""
    was_training = model.training
    model.eval()
    try:
        options = Options(num_iterations=settings.num_iterations, early_stopping=settings.early_stopping)
        most_rows = min(settings.batch_size, len(rows))
        decoder = Decoder(model, options, rows=most_rows, compiled=settings.compiled, bf16=settings.bf16)
        for first in range(0, len(rows), settings.batch_size):
            yield from _complete_batch(decoder, tokenizer, rows[first : first + settings.batch_size], settings)
    finally:
        model.train(was_training)


def _complete_batch(
    decoder: Decoder,
    tokenizer: Tokenizer,
    rows: list[_Row],
    settings: GenerationSettings,
    is_wanted: Callable[[int], bool] = lambda index: True,
) -> Iterator[Piece]:
    end_ids = frozenset((tokenizer.eos_id, *settings.end_ids))
    batch = _Batch(decoder, tokenizer, rows, settings)
    while rows:
        count = min(decoder.tokens_at_once, max(row.limit - len(row.token_ids) for row in rows))
        draws = [[row.random.random() for row in rows] for _ in range(count)]
        going = list(range(len(rows)))
        for tokens, iterations in batch.choose(draws):  # a row that is finished ignores the rest of its tokens
            pieces = [rows[index].add(tokens[index], iterations[index], end_ids) for index in going]
            yield from (piece for piece in pieces if piece.text or piece.completion)
            going = [index for index, piece in zip(going, pieces, strict=True) if piece.completion is None]
        going = [index for index in going if is_wanted(rows[index].prompt_index)]
        batch_rows, rows = len(rows), [rows[index] for index in going]
        if rows:
            batch.advance([row.token_ids[-1] for row in rows], going if len(going) < batch_rows else None)


class _Batch:
    """What the device holds of a batch: the cache, and the logits of each row's next token.

    A finished row leaves the batch. With a compiled or recorded step it stays there unread: a smaller batch would be
    compiled and recorded anew.
    """

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, rows: list[_Row], settings: GenerationSettings) -> None:
        self.decoder, self.device = decoder, decoder.model.embedding.table.weight.device
        banned = sorted(set(tokenizer.special_ids.values()) - {tokenizer.eos_id, *settings.end_ids})
        prompts = {row.prompt_index: row.prompt_ids for row in rows}
        with torch.inference_mode():
            ids = self._prefill(list(prompts.values()), max(row.limit for row in rows), tokenizer.bos_id)
            if len(rows) > len(prompts):  # each prompt's place once for each of its samples
                places = [row.prompt_index - rows[0].prompt_index for row in rows]
                self._select(torch.tensor(places, device=self.device))
                ids = ids[places]
            self.places = torch.arange(len(rows), device=self.device)
            self.sampler = Sampler(
                settings,
                banned=torch.tensor(banned, dtype=torch.long, device=self.device),
                prompts=ids,
                vocab_size=decoder.model.vocab_size,
            )

    def _prefill(self, prompts: list[list[int]], max_new_tokens: int, bos_id: int) -> Tensor:
        """Run the prompts, aligned to the right, in one pass; returns their ids (P, S), padded with bos."""
        width = max(map(len, prompts))
        ids = torch.tensor([[bos_id] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        self.cache = self.decoder.new_cache(len(prompts), width + max_new_tokens - 1)
        padding = torch.tensor([width - len(prompt) for prompt in prompts], device=self.device)
        self.cache.padding = padding if bool(padding.any()) else None
        self.next = self.decoder.prefill(ids, self.cache)
        return ids

    def choose(self, draws: list[list[float]]) -> list[tuple[list[int], list[float]]]:
        """The next tokens of each row, and the iterations that predicting them took; waits for the device at the end.

        Args:
            draws: for each of these tokens, a uniform number of each row.
        """
        with torch.inference_mode():
            tokens, iterations = [], []
            for uniform in torch.tensor(draws, dtype=torch.float64, device=self.device):
                if tokens:
                    self.next = self._step(tokens[-1])
                tokens.append(self.sampler(self.next.logits, uniform))
                iterations.append(self.next.iterations)
            self.sampler.check()
            return list(zip(torch.stack(tokens).tolist(), torch.stack(iterations).tolist(), strict=True))

    def advance(self, tokens: list[int], going: list[int] | None) -> None:
        """Feed each row its new token; `going` are the places of the rows that stay, None when all do."""
        with torch.inference_mode():
            if going is not None:
                rows = torch.tensor(going, device=self.device)
                self.sampler.select(rows)
                if self.decoder.is_static:
                    self.places = self.places[rows]
                else:
                    self._select(rows)
            self.next = self._step(torch.tensor(tokens, device=self.device))

    def _step(self, tokens: Tensor) -> Predicted:
        batch = len(self.cache.keys[0])
        if len(tokens) == batch:
            return self.decoder.step(tokens, self.cache)
        every = tokens.new_zeros(batch).index_copy(0, self.places, tokens)
        logits, iterations = self.decoder.step(every, self.cache)
        return Predicted(logits[self.places], iterations[self.places])

    def _select(self, rows: Tensor) -> None:
        """Make these rows, in this order, the whole batch."""
        self.cache.select(rows)
        if self.cache.padding is not None and not bool(self.cache.padding.any()):
            self.cache.padding = None  # without padding there is a faster path
        self.next = Predicted(self.next.logits[rows], self.next.iterations[rows])
