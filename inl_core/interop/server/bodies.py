"""What clients may send, and what becomes of it: OpenAI's names on one side, `GenerationSettings` on the other.

- A key that this server does not know is refused by name, so that nothing is silently left out; so is a value that it
  cannot honour.
- Every problem is a `BadRequest`, which app.py answers with a 4xx.
"""

import secrets
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import RecipeError
from inl_core.inference.generate import Request, check_length, encode_prompt
from inl_core.inference.settings import GenerationSettings

MOST_PROMPTS = 256
_COMPLETION_TOKENS = 16
"""What OpenAI takes where a completion names no max_tokens."""

Stop = Annotated[str, StringConstraints(min_length=1)]
# Of a long list only the first bad item is looked for: a report of a million would take long, too.
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]
ListOfIds = Annotated[list[Ids], Field(fail_fast=True)]
Texts = Annotated[list[str], Field(fail_fast=True)]
Tokens = Annotated[int, Field(ge=1)]

_NOT_SUPPORTED = ("echo", "suffix", "frequency_penalty", "presence_penalty", "logit_bias")
"""Of these only the values that change nothing are taken, which some clients send."""
_SEVERAL_TYPES = {"prompt": "a text, a list of tokens, or a list of either", "stop": "a text or a list of texts"}


class BadRequest(Exception):
    """What is wrong with a request.

    Attributes:
        parameter: the key that is to blame.
    """

    def __init__(
        self, message: str, *, parameter: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.parameter, self.status, self.code = parameter, status, code


class StreamOptions(BaseModel):
    """What a streamed answer holds besides text."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False


class Body(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: Tokens | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=1e6)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """Not used."""
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @property
    def num_top(self) -> int | None:
        """How many of the most probable tokens are to be named at each place; None where nothing is to be scored."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.stream and self.num_top is not None:
            raise ValueError("logprobs are not streamed: leave out stream or logprobs")
        if self.stream_options and not self.stream:
            raise ValueError("stream_options is about stream: set it, too")
        return self

    def settings(self, *, max_new_tokens: int) -> GenerationSettings:
        """How its tokens are chosen; without a seed each request draws others."""
        try:
            return GenerationSettings(
                max_new_tokens=self.max_tokens or max_new_tokens,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty or 1.0,
                seed=secrets.randbits(63) if self.seed is None else self.seed,
                stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
                num_samples=self.n or 1,
            )
        except RecipeError as error:
            raise BadRequest(str(error)) from None


class CompletionBody(Body):
    """POST /v1/completions."""

    prompt: str | Ids | Annotated[Texts | ListOfIds, Field(min_length=1, max_length=MOST_PROMPTS)] = ""
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Literal[False] | None = None
    best_of: int | None = None
    suffix: None = None

    @property
    def num_top(self) -> int | None:
        return self.logprobs

    @model_validator(mode="after")
    def _draws_no_more_than_it_gives(self) -> Self:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of other than n is not supported: leave it out")
        return self

    def requests(self, tokenizer: Tokenizer, max_seq_len: int) -> list[Request]:
        """One request for each prompt."""
        given: Any = self.prompt
        prompts = [given] if isinstance(given, str) or isinstance(given[0], int) else given
        settings = self.settings(max_new_tokens=_COMPLETION_TOKENS)
        return [Request(_prompt_ids(tokenizer, prompt, max_seq_len), settings) for prompt in prompts]


class ContentPart(BaseModel):
    """A part of a message that is given in parts."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid")

    role: str
    content: str | list[ContentPart]
    name: str | None = None
    """Not used."""

    def plain(self) -> dict[str, str]:
        """Its role and text."""
        parts = self.content
        return {"role": self.role, "content": parts if isinstance(parts, str) else "".join(part.text for part in parts)}


class ChatBody(Body):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def num_top(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if self.max_completion_tokens is not None:
            self.max_tokens = self.max_completion_tokens
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is about logprobs: set it, too")
        return self


def parse(kind: type[Body], data: bytes) -> Any:
    """A request's body as the model `kind`.

    Raises:
        BadRequest: it is not JSON, or a key is missing, unknown or has an impossible value.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        errors = error.errors(include_url=False, include_context=False, include_input=False)
        keys = errors[0]["loc"]
        key = str(keys[0]) if keys and keys[0] in kind.model_fields else None
        keys = keys[: 3 if key == "messages" else 1]
        # Where a value may be of several types, pydantic names each that it is not, among them perhaps the one that was
        # meant, with what is wrong there.
        errors = [error for error in errors if error["loc"][: len(keys)] == keys]
        meant = next((error for error in errors if not error["type"].endswith("_type")), None)
        if key in _NOT_SUPPORTED:
            message = "is not supported: leave it out"
        elif meant is None and key in _SEVERAL_TYPES:
            message = f"must be {_SEVERAL_TYPES[key]}"
        elif meant and meant["type"] == "extra_forbidden":
            message = "this server does not know it"
        else:
            message = (meant or errors[0])["msg"].removeprefix("Value error, ").replace(" after validation", "")
        place = f"{'.'.join(map(str, keys))}: " if keys else ""
        raise BadRequest(f"{place}{message}", parameter=key) from None


def check_size(num_characters: int, name: str, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """RecipeError where a text is so long that it cannot fit the model's context, whatever its tokens are.

    This is told before the text is tokenised, which takes a second for some megabytes. Of tokenizers that may drop or
    rewrite text nothing can be told beforehand.
    """
    if not tokenizer.has_exact_bytes:
        return
    longest = int(tokenizer.token_num_bytes.max())
    if num_characters > max_seq_len * longest:
        raise RecipeError(
            f"{name}: {num_characters:,} characters cannot fit, the model's context holds {max_seq_len:,} tokens of at "
            f"most {longest} bytes; shorten it"
        )


def _prompt_ids(tokenizer: Tokenizer, prompt: str | list[int], max_seq_len: int) -> tuple[int, ...]:
    try:
        if isinstance(prompt, str):
            check_size(len(prompt), "the prompt", tokenizer, max_seq_len)
            return tuple(encode_prompt(tokenizer, prompt, max_seq_len=max_seq_len))
        largest = max(prompt)
        if largest >= tokenizer.vocab_size:
            raise RecipeError(f"token {largest:,}: the model has {tokenizer.vocab_size:,}")
        ids = prompt if prompt[0] == tokenizer.bos_id else [tokenizer.bos_id, *prompt]
        check_length(ids, "the prompt", max_seq_len=max_seq_len)
        return tuple(ids)
    except RecipeError as error:
        raise BadRequest(str(error), parameter="prompt") from None
