"""Special tokens that a tokenizer would give for ordinary text, and the tokens that the text gets in their place.

The `tokenizers` library can be told not to look for special tokens in a text. But the model inside it finds them all
the same when its own vocabulary has them: as a word, as what its merges spell, or as its token for unknown text.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import tokenizers

from inl_core.corpus.token_bytes import BYTE_TOKEN
from inl_core.errors import ArtefactError


class SpecialText:
    """Replaces special tokens in the ids of an encoded text.

    Args:
        model: the description of the tokenizer's model, from its JSON.
        special: name -> id of the tokens that no text may become.
        unknown_id: the token for text that the vocabulary cannot spell, if there is one.

    Attributes:
        instead: the id of each special token that some text would become -> its name, and the ids to put in its place,
            which are none where the vocabulary has no other way to spell that text.
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
        """The ids of an encoded text, with other ids in the place of special tokens.

        Raises:
            ArtefactError: there are no other ids for that text.
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
        """Whether the model gives this token for some text.

        Plain merges make a token inside a longer word only if they also make it of the word that is the token alone.
        """
        if id == self._unknown_id:
            return True
        if self._backend_model.token_to_id(name) is None:
            return False
        is_plain = self._model["type"] == "BPE" and not self._has_affixes() and not self._is_byte(name)
        return not is_plain or id in self._tokens(name)

    def _other_tokens(self, name: str, id: int) -> list[int]:
        """The ids of the single characters where the model has them all, else the unknown token, else none."""
        can_spell = self._model["type"] in ("BPE", "Unigram") and not self._has_affixes() and not self._is_byte(name)
        if can_spell and id != self._unknown_id:
            spelled = [other for character in name for other in self._tokens(character)]
            if spelled and self._special.isdisjoint(spelled):
                return spelled
        return [] if self._unknown_id is None or self._unknown_id in self._special else [self._unknown_id]

    def _tokens(self, text: str) -> Iterator[int]:
        with suppress(Exception):  # a class of the library: there is neither a token for the text nor an unknown token
            yield from (token.id for token in self._backend_model.tokenize(text))

    def _has_affixes(self) -> bool:
        """Whether the spelling of a character depends on its place in the word."""
        return bool(self._model.get("continuing_subword_prefix") or self._model.get("end_of_word_suffix"))

    def _is_byte(self, name: str) -> bool:
        """Whether the token stands for one byte of characters that the vocabulary does not have."""
        return bool(self._model.get("byte_fallback")) and BYTE_TOKEN.fullmatch(name) is not None
