"""Byte-level BPE: train, load, encode and decode without loss, and stream text out token by token.

- Text is never turned into special tokens: a document that spells `<|bos|>` gets ordinary tokens, so that it cannot
  forge a document boundary (special_text.py for tokenizers whose vocabulary would).
- The same text always gets the same tokens: a tokenizer's dropout of merges is switched off.
- No normaliser, no prefix space: decode(encode(text)) == text for every str that UTF-8 can hold.
- A tokenizer.json made elsewhere is accepted too. Many of those do not keep every byte of a text (`keeps_every_byte`):
  nobody can say how many of its bytes one of their tokens stands for.
"""

import codecs
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from inl_core.corpus.special_text import BYTE_TOKEN, SpecialText
from inl_core.errors import ArtefactError, RecipeError
from inl_core.files import read_text, written_aside

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
ROLES = ("system", "user", "assistant")

# In order of preference; GPT-2's family has one token for both ends.
BOS_NAMES = ("<|bos|>", "<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>", "[CLS]")
EOS_NAMES = ("<|eos|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>", "[SEP]")

_WINDOW = 64
_LONGEST_WORD = 500
"""Characters; when a tokenizer is trained, longer words are cut."""

_MOST_IDS = 1 << 24
"""Vocabulary ids are below this: sixteen times the largest vocabulary in use. Tables have a row for each."""

_EVERY_BYTE = (
    "".join(map(chr, range(0x800)))
    + "".join(chr(first << 12 | 0x1F6) for first in range(16))
    + "".join(chr(first << 18 | 0x1F600) for first in range(4))
    + "\U0010ffff"
)
"""A text with every byte that UTF-8 has, upper and lower case, composed and combining characters, all of ASCII."""

_KEEPING_CUTS = {"ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "FixedLength"}
"""Pre-tokenizers that only cut a text, or rewrite it in a way that the text with every byte shows."""


class Tokenizer:
    """A `tokenizers` model with the special-token policy: a document is bos, its tokens, eos.

    Attributes:
        vocab_size: one more than the largest id.
        bos_id, eos_id: the ids at a document's ends (equal in GPT-2's family).
        special_ids: name -> id of every special token.
        fingerprint: sha256 of the canonical JSON; equal fingerprints encode equally.

    Raises:
        ArtefactError: no beginning- or end-of-text token is among the usual names.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, origin: str = "tokenizer") -> None:
        backend.no_truncation()
        backend.no_padding()
        if getattr(backend.model, "dropout", None):
            backend.model.dropout = None  # pyright: ignore - of BPE models
        _check_ids(backend, origin)
        bos = _first_known(backend, BOS_NAMES, f"{origin}: no beginning-of-text token; add one of")
        eos = _first_known(backend, EOS_NAMES, f"{origin}: no end-of-text token; add one of")
        # A file may hold them as ordinary tokens, and then text could spell them.
        backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in {bos: 0, eos: 0}])
        backend.encode_special_tokens = True  # "encode them as text": not stored in the JSON, so set it on every load
        self._backend = backend
        self._vocab: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values()) + 1
        self.bos_id, self.eos_id = self._vocab[bos], self._vocab[eos]
        added = backend.get_added_tokens_decoder()
        self.special_ids = {token.content: id for id, token in sorted(added.items()) if token.special}
        self._content: dict[str, Any] = json.loads(backend.to_str())
        canonical = json.dumps(self._content, sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
        self._special_text = SpecialText(backend, self._content["model"], self._never_from_text(), self.unknown_id)
        self._byte_level = '"type": "ByteLevel"' in json.dumps(self._content.get("decoder"))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a tokenizer.json; ArtefactError when it is missing, is not one, or has no bos/eos."""
        path = Path(path)
        text = read_text(path)
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:  # bare Exception, and for some files Rust's panics, which are no Exception
            raise ArtefactError(
                f"{path}: not a tokenizer.json of the `tokenizers` library ({error}); "
                "name a file written by its save(), or train one by leaving the tokenizer file out"
            ) from None
        return cls(backend, origin=str(path))

    def padded(self, vocab_size: int) -> "Tokenizer":
        """The same tokenizer with unused special tokens up to `vocab_size` ids, for an embedding with more rows.

        Special tokens are never encoded from text and never generated, so no text gets other ids. The ids must have no
        gaps (`has_gaps`): the library would put the new tokens into them.
        """
        backend = tokenizers.Tokenizer.from_str(self.to_json())
        names = [f"<|unused_{id}|>" for id in range(self.vocab_size, vocab_size)]
        backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in names])
        return Tokenizer(backend)

    def to_json(self) -> str:
        """The text of its tokenizer.json."""
        return self._backend.to_str(pretty=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write tokenizer.json, aside first, so that a killed process leaves no half file."""
        with written_aside(Path(path)) as aside:
            aside.write_text(self.to_json(), encoding="utf-8", newline="\n")

    def encode(self, text: str) -> list[int]:
        """Ids of the text; no special token is added, and none is recognised in it.

        Raises:
            ArtefactError: a tokenizer made elsewhere has nothing but a special token for some of the text.
        """
        return self._special_text.replace(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores; releases the GIL meanwhile."""
        encoded = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._special_text.replace(e.ids) for e in encoded]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode([int(id) for id in ids], skip_special_tokens=skip_special_tokens)

    def token_id(self, name: str) -> int | None:
        """The id of a token by its exact name, or None."""
        return self._vocab.get(name)

    def role_id(self, role: str) -> int:
        """The id of `<|role|>` or `<|end|>`; ArtefactError when this tokenizer has no chat tokens."""
        id = self._vocab.get(f"<|{role}|>")
        if id is None:
            raise ArtefactError(
                f"the tokenizer has no <|{role}|> token, which `messages` rows need; "
                "train a tokenizer (leave the tokenizer file out) or add "
                + " ".join(f"<|{name}|>" for name in (*ROLES, "end"))
            )
        return id

    @cached_property
    def token_bytes(self) -> list[bytes]:
        """The bytes each id stands for; empty for special tokens and unused ids."""
        table = [b""] * self.vocab_size
        to_bytes = _byte_level_bytes if self._byte_level else _piece_bytes
        for token, id in self._vocab.items():
            table[id] = to_bytes(token)
        for id in self.special_ids.values():
            table[id] = b""
        return table

    @cached_property
    def token_num_bytes(self) -> np.ndarray:
        """(V,) float64: bytes of text that each token stands for; 0 for special tokens and unused ids.

        NaN where nobody can tell: the unknown token, which stands for any text, and every token of a tokenizer that
        does not keep every byte. So a sum over an encoded text is the text's UTF-8 size or NaN, but for one case: where
        U+2581 stands for a space, a text's own U+2581 cannot be told from it (`has_exact_bytes` is False there).
        """
        sizes = np.array([len(token) for token in self.token_bytes], dtype=np.float64)
        if not self.keeps_every_byte:
            sizes[sizes > 0] = np.nan
        if self.unknown_id is not None and not self.has_exact_bytes:
            sizes[self.unknown_id] = np.nan
        return sizes

    @cached_property
    def keeps_every_byte(self) -> bool:
        """Whether the bytes of an encoded text's tokens are the text's: nothing is added, dropped or rewritten.

        Found by encoding a text that has every byte, spaces of every kind, and between spaces each token that may be
        found in a text whole: added ones, special ones that get other tokens, the unknown one. What no single text can
        try (rules for some text only) is looked for in the tokenizer's own description.
        """
        tried = [token["content"] for token in self._content["added_tokens"] if not token["special"]]
        tried += [name for name, _ in self._special_text.instead.values()]
        if self._byte_level and self._content["model"].get("unk_token"):
            tried.append(self._content["model"]["unk_token"])
        probes = ["a", f"  A  b\t\r\n\n {_EVERY_BYTE}  ", " ".join(f" {content}  a" for content in tried)]
        if _rewrites_some_text(self._content):
            return False
        return all(b"".join(self.token_bytes[id] for id in self.encode(text)) == text.encode() for text in probes)

    @property
    def has_exact_bytes(self) -> bool:
        """Whether the bytes of any encoded text's tokens are the text's, so that no text needs to be counted to know.

        True of byte-level tokenizers that keep every byte; they never need their unknown token either.
        """
        return self._byte_level and self.keeps_every_byte

    @cached_property
    def unknown_id(self) -> int | None:
        """The id that stands for text the vocabulary cannot spell, or None."""
        model = self._content["model"]
        if model.get("unk_id") is not None:
            return int(model["unk_id"])
        return self._vocab.get(model.get("unk_token"))

    def _never_from_text(self) -> dict[str, int]:
        """Special and chat tokens: all but an unknown token that is not also the end of a document."""
        chat = {name: self._vocab[name] for role in (*ROLES, "end") if (name := f"<|{role}|>") in self._vocab}
        ends = (self.bos_id, self.eos_id)
        return {name: id for name, id in (self.special_ids | chat).items() if id != self.unknown_id or id in ends}

    @property
    def has_gaps(self) -> bool:
        """Whether some ids below `vocab_size` stand for no token."""
        return len(self._vocab) < self.vocab_size

    @property
    def is_byte_level(self) -> bool:
        """Whether a token is a byte string of its own, whatever its neighbours."""
        return self._byte_level


def train_tokenizer(texts: Iterator[str], *, vocab_size: int) -> Tokenizer:
    """Train byte-level BPE with SPECIAL_TOKENS as the first ids; a small corpus may give fewer than `vocab_size`.

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
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(_without_long_words(texts), trainer)
    return Tokenizer(backend)


def _without_long_words(texts: Iterator[str]) -> Iterator[str]:
    """The texts, cut inside words of 2 * _LONGEST_WORD characters and more (DNA, a line of dashes, a field of spaces).

    Each merge that training learns moves all that follows in its word: the time grows with the square of the longest.
    """
    for text in texts:
        start = 0
        for place in range(0, len(text) - _LONGEST_WORD + 1, _LONGEST_WORD):
            end = place + _LONGEST_WORD
            if _is_one_word(text[place:end]):
                yield text[start:end]
                start = end
        yield text[start:]


def _is_one_word(text: str) -> bool:
    """Whether the pre-tokenizer keeps the text whole: nothing but white space, letters and digits, or other signs."""
    return text.isspace() or text.isalnum() or not any(c.isalnum() or c.isspace() for c in text)


class StreamDecoder:
    """Ids in, text out, never half a code point: join of all pushes and the flush == tokenizer.decode(ids).

    With `context`, the tokens before them, it is what they add to its text: how many tokenizers spell a token depends
    on whether one stands before it. A text that was shown is never taken back, also where a decoder would.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.special_ids.values())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # only for tokenizers whose tokens depend on their neighbours
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
        """What is left at the end: U+FFFD for an unfinished character."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"", final=True)
        return self._advance(self._decode(self._ids))

    def _decode(self, ids: list[int]) -> str:
        # The context's unknown tokens count as text here: what follows them does not begin a text.
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def _without_unfinished(self, ids: list[int]) -> list[int]:
        """The ids without the at most three bytes of a character that they begin: the rest of it is yet to come."""
        for end in range(len(ids), max(-1, len(ids) - 4), -1):
            if not self._decode(ids[:end]).endswith("\ufffd"):
                return ids[:end]
        return ids  # the text ends with U+FFFD itself

    def _advance(self, text: str) -> str:
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new

    def _forget(self, text: str) -> None:
        """Keep the last few neighbours, all of whose `text` was shown: decoding everything each time is quadratic."""
        size = _WINDOW // 4
        while size < len(self._ids):
            tail = self._decode(self._ids[-size:])
            if "\ufffd" not in tail and text.endswith(tail):  # else it begins inside a character
                self._ids, self._shown = self._ids[-size:], len(tail)
                return
            size *= 4


def _check_ids(backend: tokenizers.Tokenizer, origin: str) -> None:
    """ArtefactError when there is no token, an id beyond every real vocabulary's, or one id for two tokens."""
    vocab = backend.get_vocab(with_added_tokens=True)
    largest = max(vocab.values(), default=-1)
    if not 0 <= largest < _MOST_IDS:
        found = f"a token with id {largest:,}; ids must be below {_MOST_IDS:,}" if largest >= 0 else "no token"
        raise ArtefactError(f"{origin}: has {found}; name another tokenizer.json")
    if len(set(vocab.values())) < len(vocab):
        (id, _), *_ = Counter(vocab.values()).most_common(1)
        names = " and ".join(repr(name) for name in sorted(vocab) if vocab[name] == id)
        raise ArtefactError(f"{origin}: {names} have the same id {id}; give each token an id of its own")


def _rewrites_some_text(content: dict[str, Any]) -> bool:
    """Whether a rule may change or drop text that has a certain form.

    So may any normaliser but SentencePiece's for spaces, and any pre-tokenizer that is not known to keep what it cuts.
    """
    only_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    if any(step != only_spaces for step in _steps(content.get("normalizer"), "normalizers")):
        return True
    cuts = _steps(content.get("pre_tokenizer"), "pretokenizers")
    return any(cut["type"] not in _KEEPING_CUTS or cut.get("behavior") == "Removed" for cut in cuts)


def _steps(component: dict[str, Any] | None, parts: str) -> Iterator[dict[str, Any]]:
    """A component of a tokenizer's description, or the members of a sequence, which may hold sequences again."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    for part in component[parts]:
        yield from _steps(part, parts)


def _first_known(backend: tokenizers.Tokenizer, names: tuple[str, ...], problem: str) -> str:
    for name in names:
        if backend.token_to_id(name) is not None:
            return name
    raise ArtefactError(f"{problem} {' '.join(names)}")


def _unicode_to_byte() -> dict[str, int]:
    """GPT-2's printable stand-ins: 188 bytes stand for themselves, the rest are moved to U+0100 and up."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in own}
    moved = (byte for byte in range(256) if byte not in set(own))
    return table | {chr(0x100 + i): byte for i, byte in enumerate(moved)}


_BYTE_OF = _unicode_to_byte()


def _byte_level_bytes(token: str) -> bytes:
    # An added token with a character outside the stand-ins (a space, say) is plain text: so does the Rust decoder.
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode("utf-8", "replace")


def _piece_bytes(token: str) -> bytes:
    """SentencePiece and WordPiece spellings: `<0x0A>` is one byte, U+2581 a space, `##` a continuation."""
    if BYTE_TOKEN.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.removeprefix("##").replace("\u2581", " ").encode("utf-8", "replace")
