"""The tokenizer: trained or loaded, it encodes text, decodes it without loss, and streams it out token by token.

- Text never becomes special tokens: a document that spells `<|bos|>` gets ordinary tokens, so that it cannot forge the
  beginning of a document (special_text.py sees to tokenizers whose vocabulary would let it).
- The same text always gets the same tokens: the random dropout of merges that some tokenizers have is switched off.
- Ours are byte-level BPE without a normaliser or an added space: decode(encode(text)) == text for every text.
- A tokenizer.json made elsewhere is accepted too. Many of those do not keep every byte of a text (`keeps_every_byte`),
  and then nobody can say for how many bytes one of their tokens stands.
"""

import codecs
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from inl_core.corpus.special_text import SpecialText
from inl_core.corpus.token_bytes import bytes_of_tokens, may_rewrite_text, texts_to_try
from inl_core.errors import ArtefactError, RecipeError
from inl_core.files import read_text, write_text_aside

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
ROLES = ("system", "user", "assistant")

# In order of preference. GPT-2 and its relatives have one token for both ends of a document.
BOS_NAMES = ("<|bos|>", "<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>", "[CLS]")
EOS_NAMES = ("<|eos|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>", "[SEP]")

_WINDOW = 64
"""Ids that are kept at most to decode the next one."""
_LONGEST_WORD = 500
"""Characters. Longer words are cut when a tokenizer is trained."""
_MOST_PIECES = 2000
"""Pieces of longer words that a tokenizer is trained on; 10 MB of them would take half a minute and teach little."""
_SEPARATORS = dict.fromkeys(range(0x1C, 0x20), "-")
"""White space in Python, but not for the pre-tokenizer."""

_LONG_TEXT = 20_000
"""Characters of a text that takes so long that other threads must not wait for Python's global lock meanwhile."""

_MOST_IDS = 1 << 24
"""Ids must be below this, which is sixteen times the largest vocabulary in use: some tables have a row for each id."""


@dataclass(frozen=True)
class Turns:
    """The ids of the special tokens between the messages of a conversation: a role, the message, the end."""

    answer: int
    """Begins a message of the assistant."""
    end: int
    """Ends any message."""
    all: tuple[int, ...]
    """Those of all roles, and the end."""


class Tokenizer:
    """A tokenizer of the `tokenizers` library, under our rule that a document is bos, its tokens, eos.

    Attributes:
        vocab_size: one more than the largest id.
        bos_id, eos_id: the ids with which a document begins and ends (equal in GPT-2 and its relatives).
        special_ids: name -> id of every special token.
        is_byte_level: whether a token stands for the same bytes whatever its neighbours are.
        fingerprint: sha256 of the canonical JSON; tokenizers with equal fingerprints encode equally.

    Raises:
        ArtefactError: it has no token under one of the usual names for the beginning or the end of a text, or its ids
            are impossible.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, origin: str = "tokenizer") -> None:
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None  # pyright: ignore - of BPE models
        _check_ids(backend, origin)
        bos = _first_known(backend, BOS_NAMES, f"{origin}: no beginning-of-text token; add one of")
        eos = _first_known(backend, EOS_NAMES, f"{origin}: no end-of-text token; add one of")
        # A file may hold them as ordinary tokens, which text could spell.
        backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in {bos: 0, eos: 0}])
        # True means that a special token in a text is encoded as text. The JSON does not keep this setting.
        backend.encode_special_tokens = True
        self._backend = backend
        self._vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1
        self.bos_id, self.eos_id = self._vocab[bos], self._vocab[eos]
        added = backend.get_added_tokens_decoder()
        self.special_ids = {token.content: id for id, token in sorted(added.items()) if token.special}
        self._description: dict[str, Any] = json.loads(backend.to_str())
        canonical = json.dumps(self._description, sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
        self._special_text = SpecialText(backend, self._description["model"], self._never_from_text(), self.unknown_id)
        self.is_byte_level = '"type": "ByteLevel"' in json.dumps(self._description.get("decoder"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a tokenizer.json; ArtefactError when it is missing, is not one, or has no bos/eos."""
        path = Path(path)
        text = read_text(path)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # for some files the library panics, which is not an Exception in Python
            raise ArtefactError(
                f"{path}: not a tokenizer.json of the `tokenizers` library ({error}); "
                "name a file written by its save(), or train one by leaving the tokenizer file out"
            ) from None
        return cls(backend, origin=str(path))

    def padded(self, vocab_size: int, names: Sequence[str] = ()) -> "Tokenizer":
        """The same tokenizer with more special tokens, up to `vocab_size` ids, for an embedding with more rows.

        Args:
            names: of the first of them; the others are called unused.

        Text never becomes special tokens and they are never generated, so every text keeps its ids. There must be an
        ordinary token for each id so far (not `has_gaps`), as the library would give free ids to the new tokens.
        """
        backend = tokenizers.Tokenizer.from_str(self.to_json())
        names = [*names, *(f"<|unused_{id}|>" for id in range(self.vocab_size + len(names), vocab_size))]
        backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
        return Tokenizer(backend)

    def to_json(self) -> str:
        """The text of its tokenizer.json."""
        return self._backend.to_str(pretty=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizer.json; a process that is killed meanwhile leaves no half of it."""
        write_text_aside(Path(path), self.to_json())

    def encode(self, text: str) -> list[int]:
        """The ids of a text; no special token is added, and none is recognised in the text.

        Raises:
            ArtefactError: a tokenizer made elsewhere has nothing but a special token for some of the text.
        """
        if len(text) > _LONG_TEXT:
            return self.encode_documents([text])[0]
        return self._special_text.replace(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores and without holding Python's global lock."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._special_text.replace(e.ids) for e in encoded]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(id) for id in ids], skip_special_tokens=skip_special_tokens)

    def encodes_like(self, other: "Tokenizer") -> bool:
        """Whether both give every text the same ids. What their files would add around a text is never added here."""
        around = {"post_processor": None}
        return self._description | around == other._description | around

    def token_id(self, name: str) -> int | None:
        """The id of the token with exactly this name, or None."""
        return self._vocab.get(name)

    def role_id(self, role: str) -> int:
        """The id of `<|role|>`, where role may also be "end"; ArtefactError when this tokenizer has no such token."""
        id = self._vocab.get(f"<|{role}|>")
        if id is None:
            raise ArtefactError(
                f"the tokenizer has no <|{role}|> token, which `messages` rows need; "
                "train a tokenizer (leave the tokenizer file out) or add "
                + " ".join(f"<|{name}|>" for name in (*ROLES, "end"))
            )
        return id

    @property
    def turns(self) -> Turns | None:
        """The tokens between the messages of a conversation; None where one of them is missing."""
        ids = [self._vocab.get(f"<|{name}|>") for name in (*ROLES, "end")]
        found = tuple(id for id in ids if id is not None)
        return Turns(self.role_id("assistant"), self.role_id("end"), found) if len(found) == len(ids) else None

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes that each id stands for; empty for special tokens and for ids without a token."""
        ordinary = {token: id for token, id in self._vocab.items() if token not in self.special_ids}
        return bytes_of_tokens(ordinary, self.vocab_size, is_byte_level=self.is_byte_level)

    @cached_property
    def token_num_bytes(self) -> np.ndarray:
        """(V,) float64: how many bytes of text each token stands for; 0 for special tokens and ids without a token.

        NaN where nobody can tell: for the unknown token, which may stand for any text, and for every token of a
        tokenizer that does not keep every byte. So the sum over the tokens of a text is the size of the text in UTF-8,
        or NaN, with one exception: where U+2581 stands for a space, it cannot be told from a U+2581 in the text, and
        `has_exact_bytes` is False.
        """
        sizes = np.array([len(token) for token in self.token_bytes], dtype=np.float64)
        if not self.keeps_every_byte:
            sizes[sizes > 0] = np.nan
        if self.unknown_id is not None and not self.has_exact_bytes:
            sizes[self.unknown_id] = np.nan
        return sizes

    @cached_property
    def keeps_every_byte(self) -> bool:
        """Whether the bytes of a text's tokens are those of the text: nothing is added, dropped or rewritten.

        This is found out by encoding a text with every byte, spaces of every kind, and each token that may be found
        whole in a text: added tokens, special ones that are replaced by others, and the unknown token. Rules for some
        texts only, which cannot all be tried out, are looked for in the tokenizer's description.
        """
        tried = [token["content"] for token in self._description["added_tokens"] if not token["special"]]
        tried += [name for name, _ in self._special_text.instead.values()]
        if self.is_byte_level and self._description["model"].get("unk_token"):
            tried.append(self._description["model"]["unk_token"])
        return not may_rewrite_text(self._description) and all(
            b"".join(self.token_bytes[id] for id in self.encode(text)) == text.encode() for text in texts_to_try(tried)
        )

    @property
    def has_exact_bytes(self) -> bool:
        """Whether `token_num_bytes` is right for every text, so that no text has to be looked at to know.

        True of byte-level tokenizers that keep every byte; they never need their unknown token either.
        """
        return self.is_byte_level and self.keeps_every_byte

    @cached_property
    def unknown_id(self) -> int | None:
        """The id of the token that stands for text which the vocabulary cannot spell, or None."""
        model = self._description["model"]
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        return self._vocab.get(model.get("unk_token"))

    def _never_from_text(self) -> dict[str, int]:
        """The tokens that no text may become: special and chat tokens, but not an unknown token that is only that."""
        chat = {name: self._vocab[name] for role in (*ROLES, "end") if (name := f"<|{role}|>") in self._vocab}
        ends = (self.bos_id, self.eos_id)
        return {name: id for name, id in (self.special_ids | chat).items() if id != self.unknown_id or id in ends}

    @property
    def has_gaps(self) -> bool:
        """Whether there is no token for some id below `vocab_size`."""
        return len(self._vocab) < self.vocab_size


def train_tokenizer(texts: Iterator[str], *, vocab_size: int) -> Tokenizer:
    """Train byte-level BPE, with SPECIAL_TOKENS as the first ids; little text may give fewer tokens than `vocab_size`.

    Raises:
        RecipeError: the vocabulary is too small for the bytes and the special tokens.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise RecipeError(
            f"vocab_size {vocab_size}: 256 bytes and {len(SPECIAL_TOKENS)} special tokens need {smallest}"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    backend.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer: Any = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_without_long_words(texts), trainer)
    return Tokenizer(backend)


def _without_long_words(texts: Iterator[str]) -> Iterator[str]:
    """The texts, cut inside very long words (DNA, a line of dashes, a run of spaces), which would take training hours.

    Each merge that is learned moves all that follows it in its word, so a word takes the square of its length in time.
    And nearly every piece is a word of its own, whereas ordinary words recur and count once: after the first
    `_MOST_PIECES` of all texts, pieces are left out.
    """
    num_pieces = 0
    for text in texts:
        start = 0
        for place in range(0, len(text) - _LONGEST_WORD + 1, _LONGEST_WORD):
            end = place + _LONGEST_WORD
            if _is_one_word(text[place:end]):
                num_pieces += 1
                yield text[start : end if num_pieces <= _MOST_PIECES else place]
                start = end
        yield text[start:]


def _is_one_word(text: str) -> bool:
    """Whether the pre-tokenizer would not cut the text: it is all white space, all letters and digits, or neither."""
    text = text.translate(_SEPARATORS)
    return text.isspace() or text.isalnum() or not any(c.isalnum() or c.isspace() for c in text)


class StreamDecoder:
    """Takes one id after the other and gives the text as it becomes complete, never a part of a character.

    All that `push` and `flush` give, joined, is tokenizer.decode(ids). With `context`, the ids before the first one, it
    is what the ids add to the text of the context: with many tokenizers the spelling of a token depends on the token
    before it. Text that was given stays given, also where decoding more ids would change it.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.special_ids.values())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # used only where the spelling of a token depends on its neighbours
        self._shown = 0
        if tokenizer.is_byte_level:
            self._utf8.decode(b"".join(tokenizer.token_bytes[id] for id in context))
        else:
            self._ids = list(context)
            whole = self._without_unfinished(self._ids)
            text = self._decode(whole)
            self._shown = len(text)
            if len(whole) == len(self._ids):
                self._forget(text)

    def push(self, token_id: int) -> str:
        """The text that became complete with this token; empty while a character is unfinished."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes[token_id])
        if token_id in self._special:
            return ""
        self._ids.append(int(token_id))
        text = self._decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        new = self._advance(text)
        if len(self._ids) > _WINDOW:
            self._forget(text)
        return new

    def flush(self) -> str:
        """What is left when no more ids come: U+FFFD where a character is unfinished."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"", final=True)
        return self._advance(self._decode(self._ids))

    def _decode(self, ids: list[int]) -> str:
        # Unknown tokens in the context count as text here: what follows one of them is not the beginning of a text.
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _without_unfinished(self, ids: list[int]) -> list[int]:
        """The ids without the one to three bytes at their end of a character whose rest is still to come."""
        for end in range(len(ids), max(-1, len(ids) - 4), -1):
            if not self._decode(ids[:end]).endswith("\ufffd"):
                return ids[:end]
        return ids  # the text really ends with the character U+FFFD

    def _advance(self, text: str) -> str:
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new

    def _forget(self, text: str) -> None:
        """Keep only the last ids, as all of `text` was given. To decode all of them each time would be quadratic."""
        size = _WINDOW // 4
        while size < len(self._ids):
            tail = self._decode(self._ids[-size:])
            if "\ufffd" not in tail and text.endswith(tail):  # otherwise the tail begins inside a character
                self._ids, self._shown = self._ids[-size:], len(tail)
                return
            size *= 4


def _check_ids(backend: tokenizers.Tokenizer, origin: str) -> None:
    """ArtefactError when there is no token, an id is larger than in any real vocabulary, or two tokens have one id."""
    vocab = backend.get_vocab(with_added_tokens=True)
    largest = max(vocab.values(), default=-1)
    if not 0 <= largest < _MOST_IDS:
        found = f"a token with id {largest:,}; ids must be below {_MOST_IDS:,}" if largest >= 0 else "no token"
        raise ArtefactError(f"{origin}: has {found}; name another tokenizer.json")
    if len(set(vocab.values())) < len(vocab):
        (id, _), *_ = Counter(vocab.values()).most_common(1)
        names = " and ".join(repr(name) for name in sorted(vocab) if vocab[name] == id)
        raise ArtefactError(f"{origin}: {names} have the same id {id}; give each token an id of its own")


def _first_known(backend: tokenizers.Tokenizer, names: tuple[str, ...], problem: str) -> str:
    for name in names:
        if backend.token_to_id(name) is not None:
            return name
    raise ArtefactError(f"{problem} {' '.join(names)}")
