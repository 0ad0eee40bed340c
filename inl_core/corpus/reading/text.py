"""A file of plain text -> documents, streaming: it is read, decoded and split block by block."""

import codecs
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from inl_core.corpus.reading import pieces
from inl_core.corpus.reading.compression import opened
from inl_core.corpus.reading.rows import TEXT, BadRow, Document, Item, Note
from inl_core.errors import InlError

_BLOCK = 1 << 20

# Python knows these encodings, but no program is written in them. Some take unbounded time, others give characters
# that do not exist.
_ODD_CODECS = {"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "unicode_escape"}
_WIDE_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16", codecs.BOM_UTF32_BE: "UTF-32"}


class _Undecodable(InlError):
    """Says why a file is not text, and how its wrong part begins."""

    def __init__(self, reason: str, excerpt: object = "") -> None:
        super().__init__(reason)
        self.excerpt = excerpt


def read_text(path: Path, name: str, compression: str | None, note: Note) -> Iterator[Item]:
    """A text file as one document, or as several when it is longer than one document may be."""
    try:
        with opened(path, compression, name) as file:
            encoding = _encoding(file, name, compression)
        # The whole file is decoded once before the first piece goes out: a file that turns out not to be text at its
        # end must not leave its beginning in the data.
        with opened(path, compression, name) as file:
            num_pieces = sum(1 for _ in pieces.split_text(_decoded(file, encoding)))
    except _Undecodable as error:
        yield BadRow(name, str(error), error.excerpt)
        return
    note(TEXT if num_pieces < 2 else f"text, cut at line ends into {num_pieces} documents of at most 1 MiB")
    with opened(path, compression, name) as file:
        for number, piece in enumerate(pieces.split_text(_decoded(file, encoding))):
            yield Document(name if num_pieces < 2 else f"{name}#{number}", (piece,), continues=number > 0)


def text_lines(path: Path, name: str, compression: str | None) -> Iterator[tuple[str, str | BadRow]]:
    r"""("file:line", the line without its \n or \r\n) for each line; a single BadRow when the file is not text."""
    rest, done = "", 0
    for item in read_text(path, name, compression, lambda message: None):
        if isinstance(item, BadRow):
            yield name, item
            return
        *whole, rest = (rest + item.texts[0]).split("\n")
        for number, line in enumerate(whole, done + 1):
            yield f"{name}:{number}", line.removesuffix("\r")
        done += len(whole)
        if len(rest) > pieces.longest_whole():
            origin = f"{name}:{done + 1}"
            yield origin, BadRow(origin, f"a line of more than {pieces.longest_whole():,} characters")
            return
    yield f"{name}:{done + 1}", rest.removesuffix("\r")


def _encoding(file: IO[bytes], name: str, compression: str | None) -> str:
    """The encoding of a text file: UTF-8, or what the first lines of a Python program name."""
    if compression is not None or Path(name).suffix.lower() not in (".py", ".pyi"):
        return "utf-8-sig"
    try:
        encoding, _ = tokenize.detect_encoding(lambda: _start_of_line(file))
        io.TextIOWrapper(io.BytesIO(), encoding)  # refuses codecs that are no text encodings, such as rot13 and hex
        if codecs.lookup(encoding).name in _ODD_CODECS:
            raise LookupError(f"{encoding} is not an encoding of programs")
    except LookupError as error:
        raise _Undecodable(f"its first lines name an encoding that cannot be read: {error}") from None
    except (SyntaxError, ValueError):
        reason = "not UTF-8 text, and its first lines name no encoding that Python knows"
        raise _Undecodable(reason) from None
    return "utf-8-sig" if encoding == "utf-8" else encoding


def _start_of_line(file: IO[bytes]) -> bytes:
    """A line. Of a long one, which would fill the memory, only the ASCII start, where an encoding would be named."""
    line = file.readline(1 << 12)
    if not line.endswith(b"\n"):
        line = line.rstrip(bytes(range(0x80, 0x100)))
    return line


def _decoded(file: IO[bytes], encoding: str) -> Iterator[str]:
    """The text of the file, block by block; raises _Undecodable, with the reason, when it is not text."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    plain = "UTF-8" if encoding == "utf-8-sig" else encoding
    size, at_end = 0, False
    while not at_end:
        data = file.read(_BLOCK)
        if wide := next((name for mark, name in _WIDE_MARKS.items() if not size and data.startswith(mark)), None):
            raise _Undecodable(f"not {plain} text but {wide}; convert it first", repr(data[:60]))
        size, at_end = size + len(data), not data
        try:
            text = decoder.decode(data, final=at_end)
            if not text.isascii() and encoding != "utf-8-sig":
                text.encode("utf-8")  # UTF-7 can spell lone surrogates, which UTF-8 cannot hold
        except UnicodeDecodeError as error:
            place = size - len(error.object) + error.start
            reason = f"not {plain} text (byte {place:,}: {error.reason}); convert it first"
            raise _Undecodable(reason, repr(error.object[error.start : error.start + 60])) from None
        except Exception as error:  # codecs written in Python raise exceptions of every kind
            raise _Undecodable(f"not {plain} text ({error}); convert it first") from None
        if "\0" in text:
            raise _Undecodable("holds NUL bytes, so it is not plain text (UTF-16, or a binary file?)", repr(text[:60]))
        yield text
