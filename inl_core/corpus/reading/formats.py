"""Which format a file has: told from its name, or from its first bytes where the name says nothing.

What is neither clearly JSON Lines nor clearly plain text is refused, and the message says what to do.
"""

from pathlib import Path

from inl_core.corpus.reading.compression import opened
from inl_core.corpus.reading.json_array import begins_array
from inl_core.corpus.reading.jsonl import BLANK, bounded_lines, json_value
from inl_core.corpus.reading.rows import BadRow
from inl_core.errors import RecipeError

_TEXT = """.txt .text .md .markdown .rst .tex .org .adoc .html .htm .css .yaml .yml .toml .sql .sh
    .py .pyi .c .h .cc .cpp .hpp .cu .java .kt .scala .go .rs .js .mjs .ts .tsx .jsx .rb .php .pl .lua .r .jl
    .swift .cs .hs .ml"""
_FORMATS = dict.fromkeys(_TEXT.split(), "text") | {".jsonl": "jsonl", ".ndjson": "jsonl"}
_COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_FIRST_BYTES = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst"}
FORMAT_NAMES = {"jsonl": "JSON Lines", "json": "a JSON array", "text": "plain text", "parquet": "Parquet"}


def format_of_name(path: Path) -> tuple[str | None, str | None]:
    """(text, jsonl, parquet, or None when unknown; gz, zst or None): the format and the compression."""
    compression = _COMPRESSIONS.get(path.suffix.lower())
    suffix = Path(path.stem).suffix.lower() if compression else path.suffix.lower()
    if suffix == ".parquet" and not compression:
        return "parquet", None
    return _FORMATS.get(suffix), compression


def format_of_content(path: Path, name: str, *, is_json: bool = False) -> tuple[str, str | None]:
    """(text, jsonl, json or parquet; gz, zst or None); `is_json` says that the file's name promises JSON.

    Raises:
        RecipeError: it is JSON, but neither an array of objects nor one object a line.
        ArtefactError: the file cannot be read.
    """
    with opened(path, None, name) as file:
        head = file.read(4)
    if head == b"PAR1":
        return "parquet", None
    compression = next((kind for first, kind in _FIRST_BYTES.items() if head.startswith(first)), None)
    line, value = b"", None
    with opened(path, compression, name) as file:
        if begins_array(file.read(1 << 12)):
            return "json", compression
    with opened(path, compression, name) as file:
        for line in bounded_lines(file):
            value = None if line is None else json_value(line, name)
            if value is not BLANK:
                break
    return _format_of_line(line or b"", value, name, is_json=is_json), compression


def _format_of_line(line: bytes, value: object, name: str, *, is_json: bool) -> str:
    """The format of a file whose first line that is not blank has this JSON value, or is this BadRow."""
    line = line.removeprefix(b"\xef\xbb\xbf").strip()
    if isinstance(value, dict):
        return "jsonl"
    if isinstance(value, BadRow) and line.startswith(b'{"') and line.endswith(b"}"):
        return "jsonl"  # its first row happens to be a bad one
    # A bracket alone begins JSON that is spread over lines, and so does {" where the object goes on in the next line.
    goes_on = isinstance(value, BadRow) and (line in (b"{", b"[", b"[{") or line.startswith(b'{"'))
    if is_json or goes_on or (isinstance(value, list) and any(isinstance(item, dict) for item in value)):
        raise RecipeError(
            f"{name}: begins like JSON, but is neither an array of objects nor JSON Lines, which has one object in its "
            "first line; write one object a line (jq -c does), or name the file .txt if it is plain text"
        )
    return "text"
