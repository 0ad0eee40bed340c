"""A file of plain text or JSON Lines -> documents and bad rows, streaming.

- Memory is bounded whatever the file's size: text in pieces, JSON Lines by line.
- A row that cannot be used is a BadRow; a damaged container is an ArtefactError.
"""

import codecs
import io
import json
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from inl_core.corpus.containers import opened
from inl_core.corpus.rows import TEXT, BadRow, Document, document_from_row, infer_columns
from inl_core.errors import InlError

MAX_DOCUMENT = 1 << 20
"""Longer plain text is cut at a line end into documents of at most this many characters, so that memory is bounded."""
MAX_LINE = 1 << 26
"""A longer line of JSON Lines is a bad row (bytes)."""
_BLOCK = 1 << 20
_MAX_VALUES = 1 << 22
"""A longer line of JSON with more brackets and commas is a bad row: as Python objects it would fill the memory."""
_LONG_LINE = 1 << 23

# Python's own, but no program is written in them; they are slow without bound, or give characters that are none.
_ODD_CODECS = {"idna", "punycode", "undefined", "unicode-escape", "raw-unicode-escape", "unicode_escape"}
_WIDE_MARKS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16", codecs.BOM_UTF32_BE: "UTF-32"}

Item = Document | BadRow
Note = Callable[[str], None]


class _Undecodable(InlError):
    """Why a file is not text, and how the wrong part begins."""

    def __init__(self, reason: str, excerpt: object = "") -> None:
        super().__init__(reason)
        self.excerpt = excerpt


def read_text(path: Path, name: str, compression: str | None, note: Note) -> Iterator[Item]:
    """A text file as one document, or as several when it is longer than MAX_DOCUMENT."""
    try:
        with opened(path, compression, name) as file:
            encoding = _encoding(file, name, compression)
        # A long file is decoded once before the first piece goes out: half a file must not slip through.
        with opened(path, compression, name) as file:
            num_pieces = sum(1 for _ in _pieces(file, encoding))
    except _Undecodable as error:
        yield BadRow(name, str(error), error.excerpt)
        return
    note(TEXT if num_pieces < 2 else f"text, cut at line ends into {num_pieces} documents of at most 1 MiB")
    with opened(path, compression, name) as file:
        for number, piece in enumerate(_pieces(file, encoding)):
            yield Document(name if num_pieces < 2 else f"{name}#{number}", (piece,), continues=number > 0)


def read_jsonl(path: Path, name: str, compression: str | None, note: Note) -> Iterator[Item]:
    """One JSON object a line; its columns are inferred from the first object that has known ones."""
    kind: str | None = None
    for origin, row in json_values(path, name, compression):
        if isinstance(row, BadRow):
            yield row
            continue
        if not isinstance(row, dict):
            yield BadRow(origin, f"a JSON {type(row).__name__}, not an object; write one object a line", row)
            continue
        if kind is None:
            kind = infer_columns(row)
            if kind is None:
                has = ", ".join(list(row)[:12]) or "no columns"
                yield BadRow(origin, f"has none of text, prompt+completion, messages; has {has}", row)
                continue
            note(f"JSON Lines, {kind}")
        yield from bounded(document_from_row(row, kind, origin))


def json_values(path: Path, name: str, compression: str | None) -> Iterator[tuple[str, Any]]:
    """(file:line, the JSON value of the line or a BadRow) of every line that is not blank."""
    with opened(path, compression, name) as file:
        for number, line in enumerate(lines(file), 1):
            origin = f"{name}:{number}"
            if line is None:
                yield origin, BadRow(origin, f"longer than {MAX_LINE >> 20} MiB")
            elif value := json_value(line, origin):
                yield origin, value[0]


def lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Lines of at most MAX_LINE bytes; None stands for a longer one."""
    while line := file.readline(MAX_LINE):
        if len(line) < MAX_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)
        yield None


def json_value(line: bytes, origin: str) -> tuple[Any] | None:
    """The value in a tuple, or None for a blank line."""
    if len(line) > _LONG_LINE and sum(map(line.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        return (BadRow(origin, f"more than {_MAX_VALUES:,} values in one row"),)
    try:
        text = line.decode("utf-8-sig")  # files put together may have a byte order mark at any line
        if not text.strip():
            return None
        return (json.loads(text, object_pairs_hook=_object),)
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: {error.reason}"
    except RecursionError:
        reason = "not JSON: nested too deeply"
    except ValueError as error:
        reason = str(error) if isinstance(error, _RepeatedKey) else f"not JSON: {error}"
    return (BadRow(origin, reason, line[:800].decode("utf-8", "replace")),)


class _RepeatedKey(ValueError):
    """A key stands twice in one object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise _RepeatedKey(f"the key {key!r} stands twice in one object")
    return row


def bounded(item: Item) -> Iterator[Item]:
    """A long text row in pieces, as a long text file; a long prompt or conversation cannot be cut and is a bad row."""
    size = sum(map(len, item.texts)) if isinstance(item, Document) else 0
    if isinstance(item, BadRow) or size <= MAX_DOCUMENT:
        yield item
    elif item.roles and size > 4 * MAX_DOCUMENT:
        yield BadRow(item.origin, f"{size:,} characters in one conversation; at most {4 * MAX_DOCUMENT:,} are possible")
    elif item.roles:
        yield item
    else:
        pieces = _cut(iter(item.texts))
        for number, piece in enumerate(pieces):
            yield Document(f"{item.origin}#{number}", (piece,), continues=number > 0)


def text_lines(path: Path, name: str, compression: str | None) -> Iterator[tuple[str, str | BadRow]]:
    r"""(file:line, the line without its \n or \r\n) of every line of a text file; one BadRow when it is not text."""
    rest, done = "", 0
    for item in read_text(path, name, compression, lambda message: None):
        if isinstance(item, BadRow):
            yield name, item
            return
        *whole, rest = (rest + item.texts[0]).split("\n")
        for number, line in enumerate(whole, done + 1):
            yield f"{name}:{number}", line.removesuffix("\r")
        done += len(whole)
        if len(rest) > 4 * MAX_DOCUMENT:
            origin = f"{name}:{done + 1}"
            yield origin, BadRow(origin, f"a line of more than {4 * MAX_DOCUMENT:,} characters")
            return
    yield f"{name}:{done + 1}", rest.removesuffix("\r")


def _encoding(file: IO[bytes], name: str, compression: str | None) -> str:
    """The encoding of a text file: UTF-8, or what a Python program's first lines name."""
    if compression is not None or Path(name).suffix.lower() not in (".py", ".pyi"):
        return "utf-8-sig"
    try:
        encoding, _ = tokenize.detect_encoding(lambda: _head_of_line(file))
        io.TextIOWrapper(io.BytesIO(), encoding)  # refuses codecs between bytes and bytes, or text and text: rot13, hex
        if codecs.lookup(encoding).name in _ODD_CODECS:
            raise LookupError(f"{encoding} is not an encoding of programs")
    except LookupError as error:
        raise _Undecodable(f"its first lines name an encoding that cannot be read: {error}") from None
    except (SyntaxError, ValueError):
        reason = "not UTF-8 text, and its first lines name no encoding that Python knows"
        raise _Undecodable(reason) from None
    return "utf-8-sig" if encoding == "utf-8" else encoding


def _head_of_line(file: IO[bytes]) -> bytes:
    """A line, or the ASCII beginning of a long one, which would fill memory: an encoding is named before that."""
    line = file.readline(1 << 12)
    if not line.endswith(b"\n"):
        line = line.rstrip(bytes(range(0x80, 0x100)))
    return line


def _pieces(file: IO[bytes], encoding: str) -> Iterator[str]:
    """The decoded text in pieces of at most MAX_DOCUMENT characters, cut after a line end where there is one."""
    return _cut(_decoded(file, encoding))


def _decoded(file: IO[bytes], encoding: str) -> Iterator[str]:
    """The file's text, block by block; _Undecodable says why it is none."""
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
        except Exception as error:  # codecs written in Python raise whatever they like
            raise _Undecodable(f"not {plain} text ({error}); convert it first") from None
        if "\0" in text:
            raise _Undecodable("holds NUL bytes, so it is not plain text (UTF-16, or a binary file?)", repr(text[:60]))
        yield text


def _cut(texts: Iterable[str]) -> Iterator[str]:
    """Texts joined and cut into pieces of at most MAX_DOCUMENT characters, after a line end where there is one."""
    rest = ""
    for text in texts:
        rest += text
        start = 0
        while len(rest) - start > MAX_DOCUMENT:
            cut = rest.rfind("\n", start, start + MAX_DOCUMENT) + 1 or start + MAX_DOCUMENT
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest
