"""What a file is read as: by its suffix, or by its first bytes where the suffix says nothing.

- What is neither clearly JSON Lines nor clearly plain text is refused, and the message says what to do.
"""

from pathlib import Path
from typing import IO

from inl_core.corpus.containers import opened
from inl_core.corpus.readers import json_value, lines
from inl_core.corpus.rows import BadRow
from inl_core.errors import RecipeError

_TEXT = """.txt .text .md .markdown .rst .tex .org .adoc .html .htm .css .yaml .yml .toml .sql .sh
    .py .pyi .c .h .cc .cpp .hpp .cu .java .kt .scala .go .rs .js .mjs .ts .tsx .jsx .rb .php .pl .lua .r .jl
    .swift .cs .hs .ml"""
TEXT_SUFFIXES = frozenset(_TEXT.split())
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_MARKS = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst"}
WORDS = {"jsonl": "JSON Lines", "text": "plain text", "parquet": "Parquet"}


def format_of(path: Path) -> tuple[str | None, str | None]:
    """(text | jsonl | parquet | None when unknown, compression), by the name."""
    suffix = path.suffix.lower()
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = Path(path.stem).suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return "text", compression
    if suffix in JSONL_SUFFIXES:
        return "jsonl", compression
    return ("parquet", None) if suffix == ".parquet" and not compression else (None, compression)


def sniff(path: Path, name: str, *, is_json: bool = False) -> tuple[str, str | None]:
    """(text | jsonl | parquet, compression), by the content; `is_json` when the name says that it is JSON.

    Raises:
        RecipeError: JSON of another kind than one object a line.
        ArtefactError: the file cannot be read.
    """
    with opened(path, None, name) as file:
        head = file.read(4)
    if head == b"PAR1":
        return "parquet", None
    compression = next((kind for mark, kind in _MARKS.items() if head.startswith(mark)), None)
    with opened(path, compression, name) as file:
        return _line_format(*_first_value(file, name), name, is_json=is_json), compression


def _first_value(file: IO[bytes], name: str) -> tuple[bytes, object]:
    """The first line that is not blank, and its JSON value, a BadRow when it has none."""
    for line in lines(file):
        if line is None:
            break
        if (value := json_value(line, name)) is not None:
            return line.removeprefix(b"\xef\xbb\xbf").strip(), value[0]
    return b"", None


def _line_format(line: bytes, value: object, name: str, *, is_json: bool) -> str:
    if isinstance(value, dict):
        return "jsonl"
    if isinstance(value, BadRow) and line.startswith(b'{"') and line.endswith(b"}"):
        return "jsonl"  # its first row is a bad one
    # A lone bracket begins JSON over several lines; {" begins an object that goes on in the next line.
    goes_on = isinstance(value, BadRow) and (line in (b"{", b"[", b"[{") or line.startswith(b'{"'))
    if is_json or goes_on or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        raise RecipeError(
            f"{name}: begins like JSON, but not with one object in its first line, so it is not JSON Lines; write one "
            "object a line (jq -c '.[]' does), or name the file .txt if it is plain text"
        )
    return "text"
