"""Which bytes of text each token of a vocabulary stands for, and whether a tokenizer keeps all bytes of every text."""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
"""How SentencePiece spells a token that is one byte."""

_EVERY_BYTE = (
    "".join(map(chr, range(0x800)))
    + "".join(chr(first << 12 | 0x1F6) for first in range(16))
    + "".join(chr(first << 18 | 0x1F600) for first in range(4))
    + "\U0010ffff"
)
"""A text with every byte that UTF-8 has, upper and lower case, composed and combining characters, all of ASCII."""

_KEEPING_CUTS = {"ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "FixedLength"}
"""Pre-tokenizers that only cut a text. If one of them rewrites it, the text with every byte shows that."""


def bytes_of_tokens(vocab: Mapping[str, int], size: int, *, is_byte_level: bool) -> list[bytes]:
    """The bytes for each id below `size`, empty where the vocabulary has no token of that id."""
    table = [b""] * size
    for token, id in vocab.items():
        table[id] = _byte_level_bytes(token) if is_byte_level else _piece_bytes(token)
    return table


def texts_to_try(tokens: Iterable[str]) -> list[str]:
    """Texts that show whether a tokenizer keeps every byte: all bytes, white space of every kind, these tokens."""
    return ["a", f"  A  b\t\r\n\n {_EVERY_BYTE}  ", " ".join(f" {token}  a" for token in tokens)]


def may_rewrite_text(description: dict[str, Any]) -> bool:
    """Whether the description of a tokenizer has a rule that may change or drop some text.

    Any normaliser may, but for SentencePiece's for spaces; so may any pre-tokenizer that is not known only to cut.
    """
    only_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    if any(step != only_spaces for step in _steps(description.get("normalizer"), "normalizers")):
        return True
    cuts = _steps(description.get("pre_tokenizer"), "pretokenizers")
    return any(cut["type"] not in _KEEPING_CUTS or cut.get("behavior") == "Removed" for cut in cuts)


def _steps(component: dict[str, Any] | None, parts: str) -> Iterator[dict[str, Any]]:
    """A component of a tokenizer's description; of a sequence its members, which may be sequences themselves."""
    if component is None:
        return
    if component["type"] != "Sequence":
        yield component
        return
    for part in component[parts]:
        yield from _steps(part, parts)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's way to write bytes as printable characters: 188 stand for themselves, the others for U+0100 and up."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in own]
    return {chr(byte): byte for byte in own} | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_of_character()


def _byte_level_bytes(token: str) -> bytes:
    # An added token with any other character, a space perhaps, is plain text: the library decodes it so too.
    if all(character in _BYTE_OF for character in token):
        return bytes(_BYTE_OF[character] for character in token)
    return token.encode("utf-8", "replace")


def _piece_bytes(token: str) -> bytes:
    """SentencePiece and WordPiece: `<0x0A>` is one byte, U+2581 a space, and `##` marks the inside of a word."""
    if BYTE_TOKEN.fullmatch(token):
        return bytes([int(token[3:5], 16)])
    return token.removeprefix("##").replace("\u2581", " ").encode("utf-8", "replace")
