"""Byte-level BPE: train, load, encode and decode without loss, and stream text out token by token.

- Text is never turned into special tokens: a document that spells `<|bos|>` gets ordinary tokens, so that it cannot
  forge a document boundary.
- No normaliser, no prefix space: decode(encode(text)) == text for every str that UTF-8 can hold.
- A tokenizer.json made elsewhere is accepted too; its own rules then decide what is lossless.
"""

import codecs
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from inl_core.errors import ArtefactError, RecipeError

SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
ROLES = ("system", "user", "assistant")

# In order of preference; GPT-2's family has one token for both ends.
BOS_NAMES = ("<|bos|>", "<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>", "[CLS]")
EOS_NAMES = ("<|eos|>", "</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>", "[SEP]")

_WINDOW = 64
_LONGEST_WORD = 500
"""Characters; when a tokenizer is trained, longer words are cut."""


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
        canonical = json.dumps(json.loads(backend.to_str()), sort_keys=True, separators=(",", ":"))
        self.fingerprint = hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()
        self._byte_level = '"type":"ByteLevel"' in json.dumps(
            json.loads(canonical).get("decoder"), separators=(",", ":")
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Read a tokenizer.json; ArtefactError when it is missing, is not one, or has no bos/eos."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ArtefactError(f"{path}: cannot read the tokenizer: {_reason(error)}") from None
        try:
            backend = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtefactError(
                f"{path}: not a tokenizer.json of the `tokenizers` library ({error}); "
                "name a file written by its save(), or train one by leaving the tokenizer file out"
            ) from None
        return cls(backend, origin=str(path))

    def padded(self, vocab_size: int) -> "Tokenizer":
        """The same tokenizer with unused special tokens up to `vocab_size` ids, for an embedding with more rows.

        Special tokens are never encoded from text and never generated, so no text gets other ids.
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
        path = Path(path)
        aside = path.with_name(path.name + ".tmp")
        with aside.open("w", encoding="utf-8", newline="\n") as file:
            file.write(self.to_json())
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)

    def encode(self, text: str) -> list[int]:
        """Ids of the text; no special token is added, and none is recognised in it."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores; releases the GIL meanwhile."""
        return [e.ids for e in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

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
        """(V,) int32: bytes of each token, special tokens 0; over an encoded text it sums to the text's UTF-8 size."""
        return np.array([len(token) for token in self.token_bytes], dtype=np.int32)

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
    """Ids in, text out, never half a code point: join of all pushes and the flush == tokenizer.decode(ids)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._ids: list[int] = []  # only for tokenizers whose tokens depend on their neighbours
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that became complete with this token; empty while a character is unfinished."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(self._tokenizer.token_bytes[token_id])
        self._ids.append(int(token_id))
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd"):
            return ""
        new = self._advance(text)
        if len(self._ids) > _WINDOW:  # a few neighbours suffice; decoding everything each time would be quadratic
            tail = self._ids[-_WINDOW // 4 :]
            tail_text = self._tokenizer.decode(tail)
            if "\ufffd" not in tail_text and text.endswith(tail_text):  # else the tail begins inside a character
                self._ids, self._shown = tail, len(tail_text)
        return new

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character."""
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"", final=True)
        return self._advance(self._tokenizer.decode(self._ids))

    def _advance(self, text: str) -> str:
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new


def _first_known(backend: tokenizers.Tokenizer, names: tuple[str, ...], problem: str) -> str:
    for name in names:
        if backend.token_to_id(name) is not None:
            return name
    raise ArtefactError(f"{problem} {' '.join(names)}")


def _reason(error: Exception) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


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
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.removeprefix("##").replace("\u2581", " ").encode("utf-8", "replace")
