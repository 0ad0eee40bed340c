"""A conversation with a model: messages by its chat template, its answers as they come.

    chat = Chat(loaded, settings, system="Be brief.")
    for text in chat.answer("What is a list in Python?"):
        print(text, end="")

- The template and the special token that ends an answer come from the checkpoint.
- When a conversation outgrows the model's context, its oldest questions and answers are left out for good; the system's
  message stays. So an answer takes the same time however long the conversation is.
"""

from bisect import bisect_left
from collections.abc import Generator
from dataclasses import replace

from inl_core.corpus.chat_template import CHAT_TEMPLATE, encode_chat, end_of_answer
from inl_core.corpus.reading.whole_sources import check_utf8
from inl_core.errors import ArtefactError, RecipeError
from inl_core.inference.checkpoint_files import TOKENIZER_CONFIG
from inl_core.inference.decoding import Decoder
from inl_core.inference.generate import Completion, Request, stream_together
from inl_core.inference.loading import LoadedModel
from inl_core.inference.settings import GenerationSettings
from inl_core.model import Options

_SHARE_FOR_ANSWER = 4
"""A conversation leaves at least this part (one in so many) of the context for the next answer, if it can."""


class Chat:
    """One conversation.

    Attributes:
        messages: what was said, each {"role": ..., "content": ...}, the system's message first if there is one.
        num_left_out: how many of them did not fit the context of the last answer.
        completion: the last answer, once it is complete.
        is_trained: whether the checkpoint says how conversations are written; otherwise it is done our own way.

    Raises:
        ArtefactError: the checkpoint has no chat template, and its tokenizer lacks the tokens of ours.
    """

    def __init__(self, loaded: LoadedModel, settings: GenerationSettings, *, system: str | None = None) -> None:
        self.is_trained = loaded.chat_template is not None
        if not self.is_trained and loaded.tokenizer.turns is None:
            raise ArtefactError(
                f"{loaded.path}: has no chat template, and its tokenizer has no tokens for roles; `inl generate` "
                "continues text, and docs/finetuning.md says how a model learns to answer"
            )
        self.template = loaded.chat_template or CHAT_TEMPLATE
        self._origin = loaded.path / TOKENIZER_CONFIG if self.is_trained else None
        end = end_of_answer(loaded.tokenizer, self.template, origin=self._origin)
        self.loaded, self.settings = loaded, replace(settings, num_samples=1, end_ids=(end,))
        options = Options(num_iterations=settings.num_iterations, early_stopping=settings.early_stopping)
        self.decoder = Decoder(loaded.model.eval(), options, rows=1, bf16=settings.bf16)
        self._system = [] if system is None else [_message("system", system)]
        self.reset()

    def reset(self) -> None:
        """Begin anew, with the system's message alone."""
        self.messages = list(self._system)
        self.num_left_out = 0
        self.completion: Completion | None = None

    def answer(self, text: str) -> Generator[str, None, None]:
        """The answer to a message, piece by piece; both join the conversation once the answer ends or is given up.

        Raises:
            RecipeError: the message alone is longer than the context.
            NonFiniteError: the model's logits are not finite.
        """
        asked = _message("user", text)
        ids, self.num_left_out = self._fitting([*self.messages, asked])
        # Another seed for each answer, or the same question would be answered the same way again.
        settings = replace(self.settings, seed=self.settings.seed + len(self.messages))
        self.completion, said = None, ""
        try:
            for piece in stream_together(self.decoder, self.loaded.tokenizer, [Request(tuple(ids), settings)]):
                said += piece.text
                self.completion = piece.completion
                yield piece.text
        finally:
            self.messages += [asked, _message("assistant", said)]

    def _fitting(self, messages: list[dict[str, str]]) -> tuple[list[int], int]:
        """(ids of the conversation, how many of its oldest messages are not among them)."""
        limit, first = self.loaded.model.config.max_seq_len, len(self._system)
        room = limit - min(self.settings.max_new_tokens, limit // _SHARE_FOR_ANSWER)

        def ids_without(left_out: int) -> list[int]:
            kept = messages[:first] + messages[first + left_out :]
            return encode_chat(self.loaded.tokenizer, self.template, kept, origin=self._origin)

        ids = ids_without(self.num_left_out)
        if len(ids) <= room:
            return ids, self.num_left_out
        choices = range(self.num_left_out, len(messages) - first, 2)  # the last leaves the question alone
        alone = ids_without(choices[-1])
        if len(alone) > limit:
            raise RecipeError(
                f"the message: {len(alone):,} tokens with the system's, the context holds {limit:,}; shorten it"
            )
        found = bisect_left(choices[:-1], True, key=lambda left_out: len(ids_without(left_out)) <= room)
        return ids_without(choices[found]), choices[found]


def _message(role: str, content: str) -> dict[str, str]:
    check_utf8(content, f"the {role}'s message")
    return {"role": role, "content": content}
