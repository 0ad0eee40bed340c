"""Sources read into memory at once, for commands that measure a text or continue prompts.

- Sources and formats are those of a preparation. Stdin is copied to a file while it is read.
- The first row that cannot be used is an error here; a preparation sets such rows aside.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from inl_core.corpus.reading.json_array import array_values
from inl_core.corpus.reading.jsonl import json_values
from inl_core.corpus.reading.parquet import parquet_rows
from inl_core.corpus.reading.rows import BadRow, Document, name_columns, named_forms
from inl_core.corpus.reading.sources import STDIN, SourceFile, copy_stdin, read_source, resolve_sources
from inl_core.corpus.reading.text import text_lines
from inl_core.errors import ArtefactError, RecipeError
from inl_core.recipe.data import ColumnSettings

MAX_CHARACTERS = 1 << 28
"""A longer text has to be prepared first."""
_MAX_BYTES = 4 * MAX_CHARACTERS
"""A larger file is refused before it is read, but for Parquet, which may hold columns that are not read."""


def whole_documents(
    source: str, *, note: Callable[[str], None] = lambda message: None, columns: ColumnSettings = ColumnSettings()
) -> list[Document]:
    """The documents of a source, without the empty ones. A long text is one document, not several pieces.

    Args:
        columns: which columns of rows hold the text.

    Raises:
        RecipeError: the source is missing or cannot be used, or holds more than MAX_CHARACTERS.
        ArtefactError: a file is damaged, or a row cannot be used.
    """
    found: list[list[Document]] = []
    total = 0
    for file, quiet in _files(source, note):
        for item in read_source(file, note=quiet, forms=named_forms(columns)):
            if isinstance(item, BadRow):
                raise ArtefactError(f"{item.origin}: {item.reason}{name_columns([item])}")
            total += sum(map(len, item.texts))
            if total > MAX_CHARACTERS:
                raise RecipeError(
                    f"{source}: more than {MAX_CHARACTERS:,} characters; prepare it with inl prepare-data and name it "
                    "with --data"
                )
            if item.continues:
                found[-1].append(item)
            elif any(item.texts):
                found.append([item])
    return [
        pieces[0] if len(pieces) == 1 else Document(pieces[0].origin, ("".join(piece.texts[0] for piece in pieces),))
        for pieces in found
    ]


def read_prompts(source: str, *, note: Callable[[str], None] = lambda message: None) -> list[str]:
    """The prompts of a source: each line of a text file that is not blank, each line of JSON Lines (a string, or an
    object with the key "prompt"), or each row of the column `prompt` of Parquet.

    Raises:
        RecipeError: the source is missing or holds no prompt, or a row is not a prompt.
        ArtefactError: a file is damaged.
    """
    found = []
    for file, _ in _files(source, note):
        for origin, value in _prompt_values(file):
            if isinstance(value, BadRow):
                raise RecipeError(f"{value.origin}: {value.reason}")
            prompt = value.get("prompt") if isinstance(value, dict) else value
            if not isinstance(prompt, str):
                raise RecipeError(f'{origin}: neither a string nor an object with a string "prompt"')
            check_utf8(prompt, origin)
            found.append(prompt)
    if not found:
        raise RecipeError(f"{source}: holds no prompt; write one a line")
    return found


def check_utf8(text: str, origin: str) -> None:
    """RecipeError when UTF-8 cannot hold a text: JSON, and arguments that are not UTF-8, may give lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecipeError(f"{origin}: not UTF-8 text (at character {error.start:,})") from None


def _files(source: str, note: Callable[[str], None]) -> Iterator[tuple[SourceFile, Callable[[str], None]]]:
    """(file, note) for each file of a source; `note` passes on what is found in the file unless it is plain text."""
    with tempfile.TemporaryDirectory(prefix="inl-") as directory:
        copy = Path(directory) / "stdin"
        if source == STDIN:
            copy_stdin(copy)
        for file in resolve_sources([source], note=note, stdin_copy=copy):
            if file.size > _MAX_BYTES and file.format != "parquet":
                raise RecipeError(f"{file.name}: {file.size:,} bytes; what is read whole has {_MAX_BYTES:,} at most")

            def quiet(found: str, name: str = file.name) -> None:
                if not found.startswith("text"):
                    note(f"{name}: {found}")

            yield file, quiet


def _prompt_values(file: SourceFile) -> Iterator[tuple[str, Any]]:
    if file.format == "jsonl":
        yield from json_values(file.location, file.name, file.compression)
    elif file.format == "json":
        yield from array_values(file.location, file.name, file.compression)
    elif file.format == "parquet":
        yield from parquet_rows(file.location, file.name, lambda names: _prompt_column(names, file.name))
    elif file.format == "text":
        lines = text_lines(file.location, file.name, file.compression)
        yield from ((origin, line) for origin, line in lines if isinstance(line, BadRow) or line.strip())
    else:
        raise RecipeError(f"{file.name}: no file of prompts")


def _prompt_column(names: Any, name: str) -> tuple[str]:
    if "prompt" not in names:
        raise RecipeError(f"{name}: has no column `prompt`; has {', '.join(list(names)[:12])}")
    return ("prompt",)
