"""Completions in the words of OpenAI's two endpoints, whole and in chunks."""

import math
import time
import uuid
from dataclasses import dataclass
from typing import Any

from inl_core.corpus.tokenizer import Tokenizer
from inl_core.inference.generate import Completion
from inl_core.interop.server.engine import Scored, TokenScores

_LEAST = -9999.0
"""JSON has no word for minus infinity; OpenAI writes this."""


@dataclass
class Usage:
    """Tokens of the prompts and of the completions."""

    prompt_tokens: int
    completion_tokens: int = 0

    def add(self, completion: Completion) -> None:
        """Count the tokens of a completion."""
        self.completion_tokens += len(completion.token_ids)

    def plain(self) -> dict[str, int]:
        """As clients read it."""
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": total,
        }


class CompletionAnswers:
    """Answers of /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.common = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def whole(self, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        return {**self.common, "object": self.kind, "choices": choices, "usage": usage.plain()}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The chunk that only counts tokens."""
        return {**self.common, "object": self.chunk_kind, "choices": [], "usage": usage.plain()}

    def first_chunks(self, count: int) -> list[dict[str, Any]]:
        """What comes before any text."""
        return []

    def chunk(self, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        """A piece of text."""
        return self._chunked({"index": index, "text": text, "logprobs": None, "finish_reason": reason})

    def last_chunk(self, index: int, completion: Completion) -> dict[str, Any]:
        """The end of a sample; its text was sent."""
        return self.chunk(index, "", finish_reason(completion))

    def choice(self, index: int, completion: Completion, scores: TokenScores | None) -> dict[str, Any]:
        """One sample."""
        reason = finish_reason(completion)
        return {
            "index": index,
            "text": completion.text,
            "logprobs": _scored(scores, self.tokenizer),
            "finish_reason": reason,
        }

    def _chunked(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self.common, "object": self.chunk_kind, "choices": [choice]}


class ChatAnswers(CompletionAnswers):
    """Answers of /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def first_chunks(self, count: int) -> list[dict[str, Any]]:
        """Who speaks, for each sample."""
        return [self._delta(index, {"role": "assistant", "content": ""}, None) for index in range(count)]

    def chunk(self, index: int, text: str, reason: str | None = None) -> dict[str, Any]:
        """A piece of text."""
        return self._delta(index, {"content": text}, reason)

    def last_chunk(self, index: int, completion: Completion) -> dict[str, Any]:
        """The end of a sample; its text was sent."""
        return self._delta(index, {}, finish_reason(completion))

    def choice(self, index: int, completion: Completion, scores: TokenScores | None) -> dict[str, Any]:
        """One sample."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": completion.text},
            "logprobs": None if scores is None else {"content": _scored_tokens(scores, self.tokenizer)},
            "finish_reason": finish_reason(completion),
        }

    def _delta(self, index: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return self._chunked({"index": index, "delta": delta, "logprobs": None, "finish_reason": reason})


def finish_reason(completion: Completion) -> str:
    """`stop` where the model or a stop string ended it, else `length`."""
    return "stop" if completion.finish_reason in ("eos", "stop") else "length"


def _finite(value: float) -> float:
    return value if math.isfinite(value) else _LEAST


def _scored(scores: TokenScores | None, tokenizer: Tokenizer) -> dict[str, Any] | None:
    if scores is None:
        return None
    return {
        "tokens": [spelt(tokenizer, token.id) for token in scores.tokens],
        "token_logprobs": [_finite(token.log_probability) for token in scores.tokens],
        "top_logprobs": [{spelt(tokenizer, one.id): _finite(one.log_probability) for one in row} for row in scores.top],
        "text_offset": [sum(map(len, scores.texts[:place])) for place in range(len(scores.texts))],
    }


def _scored_tokens(scores: TokenScores, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    def one(token: Scored) -> dict[str, Any]:
        data = tokenizer.token_bytes[token.id]
        text, logprob = spelt(tokenizer, token.id), _finite(token.log_probability)
        return {"token": text, "logprob": logprob, "bytes": list(data) if data else None}

    rows = zip(scores.tokens, scores.top, strict=True)
    return [one(token) | {"top_logprobs": [one(other) for other in top]} for token, top in rows]


def spelt(tokenizer: Tokenizer, id: int) -> str:
    r"""A token by itself: its text, `bytes:\xe2\x80` where that is only a part of a character, or its name."""
    data = tokenizer.token_bytes[id]
    try:
        return data.decode() or tokenizer.decode([id], skip_special_tokens=False)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
