"""Tokens -> text that may be shown: whole characters, and nothing that may yet become a stop string."""

from collections.abc import Sequence

from inl_core.corpus.tokenizer import StreamDecoder, Tokenizer


class StopStrings:
    """Cuts text before the first stop string. An end that may become one is held back until it is decided.

    The result does not depend on how the text was divided among the calls of `push`.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = tuple(stops)
        self.matched: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """Add text; returns what can now be shown. It is empty after a stop string."""
        if self.matched is not None:
            return ""
        text = self._held + text
        # Of several stop strings the one that ends first counts; of those that end together, the longest.
        found = [(place + len(stop), place, stop) for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            _, start, self.matched = min(found)
            self._held = ""
            return text[:start]
        certain = len(text) - self._undecided(text)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back, to be shown when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stops):
                return length
        return 0


class TextStream:
    """The visible text of one completion as its tokens arrive, without the text of `prompt_ids` before them."""

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), *, prompt_ids: Sequence[int] = ()) -> None:
        self._decoder, self._stops = StreamDecoder(tokenizer, prompt_ids), StopStrings(stops)
        self.text = ""

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was met; it is not part of the text."""
        return self._stops.matched is not None

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that can now be shown."""
        return self._show(self._stops.push(self._decoder.push(token_id)))

    def finish(self) -> str:
        """The rest of the text, when no more tokens come; an unfinished character becomes U+FFFD."""
        return self._show(self._stops.push(self._decoder.flush()) + self._stops.flush())

    def _show(self, text: str) -> str:
        self.text += text
        return text
