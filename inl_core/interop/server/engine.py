"""The one thread that computes: it takes requests that wait, and completes as many as it can together.

- Requests share a batch when they choose tokens by the same rule (temperature, top-p, ...); lengths, seeds and stop
  strings may differ. Each gets the text that it would get alone. What comes while a batch runs waits for the next one;
  the oldest request decides which rule that has.
- The queue is bounded: a request that finds it full is turned away at once.
"""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from inl_core.inference.decoding import Decoder
from inl_core.inference.generate import Completion, Piece, Request, stream_together, token_texts
from inl_core.inference.loading import LoadedModel
from inl_core.model import Options


class QueueFull(Exception):
    """As many requests wait as may."""


class Closed(Exception):
    """The server is being shut down."""


@dataclass(frozen=True)
class Scored:
    """A token and what the model gave it at its place."""

    id: int
    log_probability: float
    """In nats, whatever rule the token was chosen by."""


@dataclass(frozen=True)
class TokenScores:
    """The tokens of a completion, without the closing end token."""

    texts: tuple[str, ...]
    """What each adds to the visible text."""
    tokens: tuple[Scored, ...]
    top: tuple[tuple[Scored, ...], ...]
    """For each place, the most probable tokens, the most probable first."""


Event = tuple[Completion, TokenScores | None] | Piece | Exception
"""A piece of text; a finished completion, with its scores where they were asked for; or why there will be none."""


class Ticket:
    """A request that waits or is being computed.

    Args:
        request: the prompt and its settings.
        num_top: score the tokens, and name so many of the most probable ones at each place; None does not score.
        deliver: is called by the engine's thread, with pieces, then a completion for each sample; or with an error.
    """

    def __init__(self, request: Request, num_top: int | None, deliver: Callable[[Event], None]) -> None:
        self.request, self.num_top, self.deliver = request, num_top, deliver
        self.is_cancelled = False

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.is_cancelled = True


class Engine:
    """Completes requests with one model, in a thread of its own.

    Args:
        batch_size: completions side by side, at most; a request for more is a batch of its own.
        max_waiting: requests that may wait.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        batch_size: int = 32,
        max_waiting: int = 512,
        options: Options = Options(),
        bf16: bool = False,
    ) -> None:
        self.loaded, self.batch_size, self.max_waiting, self.options = loaded, batch_size, max_waiting, options
        self.decoder = Decoder(loaded.model.eval(), options, rows=batch_size, bf16=bf16)
        self.largest_batch = 0
        """Requests that were completed together, at most, so far."""
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="inl engine", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Let them wait for their turn, all or none.

        Raises:
            QueueFull: there is no room for them.
            Closed: the engine was closed.
        """
        with self._changed:
            if self._is_closed:
                raise Closed
            if len(self._waiting) + len(tickets) > self.max_waiting:
                raise QueueFull
            self._waiting.extend(tickets)
            self._changed.notify()

    def close(self) -> None:
        """End after the batch that runs; those that wait get `Closed`."""
        with self._changed:
            self._is_closed = True
            for ticket in self._waiting:
                ticket.deliver(Closed())
                ticket.cancel()
            self._waiting.clear()
            self._changed.notify()
        self._thread.join()

    def _work(self) -> None:
        while batch := self._next_batch():
            self.largest_batch = max(self.largest_batch, len(batch))
            try:
                self._complete(batch)
            except Exception as error:  # those who wait must hear of it, and others must still be served
                for ticket in batch:
                    ticket.deliver(error)

    def _next_batch(self) -> list[Ticket]:
        """The oldest request with those that can share its batch, once there is one; empty when closed."""
        with self._changed:
            while True:
                while not self._waiting and not self._is_closed:
                    self._changed.wait()
                batch, left, num_rows = [], deque(), 0
                for ticket in self._waiting:
                    if ticket.is_cancelled:
                        continue
                    settings = ticket.request.settings
                    fits = not batch or (
                        settings.sampling == batch[0].request.settings.sampling
                        and num_rows + settings.num_samples <= self.batch_size
                    )
                    if fits:
                        batch.append(ticket)
                        num_rows += settings.num_samples
                    else:
                        left.append(ticket)
                self._waiting = left
                if batch or self._is_closed:
                    return batch

    def _complete(self, batch: list[Ticket]) -> None:
        requests = [ticket.request for ticket in batch]

        def is_wanted(index: int) -> bool:
            return not (batch[index].is_cancelled or self._is_closed)

        for piece in stream_together(self.decoder, self.loaded.tokenizer, requests, is_wanted):
            ticket = batch[piece.prompt_index]
            if piece.text:
                ticket.deliver(piece)
            if piece.completion is not None:
                ticket.deliver((piece.completion, self._scores(ticket, piece.completion)))
        if self._is_closed:
            for ticket in batch:
                ticket.deliver(Closed())

    @torch.inference_mode()
    def _scores(self, ticket: Ticket, completion: Completion) -> TokenScores | None:
        if ticket.num_top is None:
            return None
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        prompt, ids = ticket.request.prompt_ids, completion.token_ids
        device = model.embedding.table.weight.device
        with self.decoder.autocast:
            read = torch.tensor([[*prompt, *ids[:-1]]], device=device)
            hidden = model(read, options=self.options).hidden[0, len(prompt) - 1 :]
            table = model.logits(hidden).log_softmax(-1)  # (new tokens, V)
        own = table.gather(1, torch.tensor(ids, device=device)[:, None])[:, 0].tolist()
        values, places = table.topk(min(ticket.num_top, table.shape[1]))
        shown = len(ids) - (completion.finish_reason == "eos")
        return TokenScores(
            texts=tuple(text for text, _ in token_texts(tokenizer, completion))[:shown],
            tokens=tuple(map(Scored, ids, own))[:shown],
            top=tuple(tuple(map(Scored, *row)) for row in zip(places.tolist(), values.tolist(), strict=True))[:shown],
        )
