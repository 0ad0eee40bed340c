"""Special tokens that a tokenizer would give to ordinary text, and the tokens that stand for that text instead.

The `tokenizers` library can be told not to look for special tokens in a text. But the model behind it finds them all
the same when it has them in its own vocabulary: as a word, as what its merges spell, or as its token for unknown text.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import tokenizers

from inl_core.errors import ArtefactError

BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
"""How SentencePiece spells a token that is one byte."""


class SpecialText:
    """Takes special tokens out of encoded text.

    Args:
        model: the description of the tokenizer's model, from its JSON.
        special: name -> id of the tokens that no text may give.
        unknown_id: the token for text that the vocabulary cannot spell, if there is one.

    Attributes:
        instead: for each special token that a text may give, its name and the tokens to give instead, if there are any.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        model: Mapping[str, Any],
        special: Mapping[str, int],
        unknown_id: int | None,
    ) -> None:
        self._backend_model: Any = backend.model
        self._model = model
        self._unknown_id = unknown_id
        self._special = frozenset(special.values())
        matched = {token.content for token in backend.get_added_tokens_decoder().values() if not token.special}
        self.instead = {
            id: (name, self._other_tokens(name, id))
            for name, id in special.items()
            if name in matched or self._may_give(name, id)
        }

    def replace(self, ids: list[int]) -> list[int]:
        """The ids of an encoded text, with other tokens for the text that became special ones.

        Raises:
            ArtefactError: there are no other tokens for it.
        """
        if not self.instead or self.instead.keys().isdisjoint(ids):
            return ids
        return [other for id in ids for other in self._others(id)]

    def _others(self, id: int) -> list[int]:
        name, others = self.instead.get(id, ("", [id]))
        if not others:
            what = "text that it cannot spell" if id == self._unknown_id else f'the text "{name}"'
            raise ArtefactError(
                f"the tokenizer has only its special token {name} for {what}, and text must not become a "
                "special token; name a tokenizer that has an unknown token besides, or take that text out"
            )
        return others

    def _may_give(self, name: str, id: int) -> bool:
        """Whether the model can come to this token.

        Plain merges find a token inside a longer word only if they find it in the word that is the token.
        """
        if id == self._unknown_id:
            return True
        if self._backend_model.token_to_id(name) is None:
            return False
        is_plain = self._model["type"] == "BPE" and not self._has_affixes() and not self._is_byte(name)
        return not is_plain or id in self._tokens(name)

    def _other_tokens(self, name: str, id: int) -> list[int]:
        """Tokens of the single characters if the model has them, else the unknown token, else none."""
        can_spell = self._model["type"] in ("BPE", "Unigram") and not self._has_affixes() and not self._is_byte(name)
        if can_spell and id != self._unknown_id:
            spelled = [other for character in name for other in self._tokens(character)]
            if spelled and self._special.isdisjoint(spelled):
                return spelled
        return [] if self._unknown_id is None or self._unknown_id in self._special else [self._unknown_id]

    def _tokens(self, text: str) -> Iterator[int]:
        with suppress(Exception):  # the library's own class: the model has no token for it and no unknown token
            yield from (token.id for token in self._backend_model.tokenize(text))

    def _has_affixes(self) -> bool:
        """Whether a character is spelled otherwise inside a word, or at its end."""
        return bool(self._model.get("continuing_subword_prefix") or self._model.get("end_of_word_suffix"))

    def _is_byte(self, name: str) -> bool:
        """Whether the token stands for a byte of any character that the model does not know."""
        return bool(self._model.get("byte_fallback")) and BYTE_TOKEN.fullmatch(name) is not None
