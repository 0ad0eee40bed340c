"""A file of JSON Lines -> documents and bad rows, streaming: one JSON object a line."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from inl_core.corpus.reading.compression import opened
from inl_core.corpus.reading.pieces import split_row
from inl_core.corpus.reading.rows import FORMS, BadRow, Form, Item, Note, document_from_row, infer_form, without_form
from inl_core.files import RepeatedKey, without_repeated_keys

MAX_LINE = 1 << 26
"""A longer line is a bad row (bytes)."""
_LONG_LINE = 1 << 23
_MAX_VALUES = 1 << 22
"""A long line with more brackets and commas than this is a bad row: as Python objects it would fill the memory."""

BLANK = object()
"""Stands for the value of a blank line."""


def read_jsonl(
    path: Path, name: str, compression: str | None, note: Note, forms: Sequence[Form] = FORMS
) -> Iterator[Item]:
    """The documents of the file. Its form is that of the first object that has the columns of one of the `forms`."""
    return documents_of_rows(json_values(path, name, compression), "JSON Lines", note, forms)


def documents_of_rows(
    values: Iterable[tuple[str, Any]], format: str, note: Note, forms: Sequence[Form]
) -> Iterator[Item]:
    """The documents of (origin, JSON value) pairs, of a file in this `format`."""
    form: Form | None = None
    for origin, row in values:
        if isinstance(row, BadRow):
            yield row
            continue
        if not isinstance(row, dict):
            advice = "write one object a line" if format == "JSON Lines" else "each item is to be an object"
            yield BadRow(origin, f"a JSON {type(row).__name__}, not an object; {advice}", row)
            continue
        if form is None:
            form = infer_form(row, forms)
            if form is None:
                yield BadRow(origin, without_form(forms, row), row)
                continue
            note(f"{format}, {form.label}")
        yield from split_row(document_from_row(row, form, origin))


def json_values(path: Path, name: str, compression: str | None) -> Iterator[tuple[str, Any]]:
    """("file:line", the JSON value of the line, or a BadRow) for every line that is not blank."""
    with opened(path, compression, name) as file:
        for number, line in enumerate(bounded_lines(file), 1):
            origin = f"{name}:{number}"
            if line is None:
                yield origin, BadRow(origin, f"longer than {MAX_LINE >> 20} MiB")
            elif (value := json_value(line, origin)) is not BLANK:
                yield origin, value


def bounded_lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """The lines of the file; None in the place of each that is longer than MAX_LINE bytes."""
    while line := file.readline(MAX_LINE):
        if len(line) < MAX_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)
        yield None


def has_too_many_values(line: bytes | str) -> bool:
    """Whether a row would fill the memory as Python objects."""
    signs = (b",", b"[", b"{") if isinstance(line, bytes) else (",", "[", "{")
    return len(line) > _LONG_LINE and sum(map(line.count, signs)) > _MAX_VALUES  # pyright: ignore[reportArgumentType]


def json_value(line: bytes, origin: str) -> Any:
    """The JSON value of a line, BLANK, or a BadRow that says why it has none."""
    if has_too_many_values(line):
        return BadRow(origin, f"more than {_MAX_VALUES:,} values in one row")
    try:
        text = line.decode("utf-8-sig")  # where files were joined, any line may begin with a byte order mark
        return json.loads(text, object_pairs_hook=without_repeated_keys) if text.strip() else BLANK
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: {error.reason}"
    except RecursionError:
        reason = "not JSON: nested too deeply"
    except RepeatedKey as error:
        reason = str(error)
    except ValueError as error:
        reason = f"not JSON: {error}"
    return BadRow(origin, reason, line[:800].decode("utf-8", "replace"))
