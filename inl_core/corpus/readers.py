"""One file -> documents and bad rows, streaming: text, JSON Lines, Parquet; plain or compressed.

- Memory is bounded whatever the file's size: text in pieces, JSON Lines by line, Parquet by batches of a row group.
- A row that cannot be used is a BadRow; a damaged container (Parquet, gzip, zstd) is an ArtefactError.
"""

import codecs
import gzip
import io
import json
import tokenize
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from inl_core.corpus.rows import TEXT, BadRow, Document, columns_of, document_from_row, excerpt, infer_columns
from inl_core.errors import ArtefactError, RecipeError

MAX_DOCUMENT = 1 << 20
"""Longer plain text is cut at a line end into documents of at most this many characters, so that memory is bounded."""
MAX_LINE = 1 << 26
"""A longer line of JSON Lines is a bad row (bytes)."""
_BLOCK = 1 << 20

Item = Document | BadRow
Note = Callable[[str], None]


def read_text(path: Path, name: str, compression: str | None, note: Note) -> Iterator[Item]:
    """A text file as one document, or as several when it is longer than MAX_DOCUMENT."""
    with _opened(path, compression, name) as file:
        encoding = _source_encoding(file) if name.endswith((".py", ".pyi")) and compression is None else "utf-8-sig"
    if encoding is None:
        yield BadRow(name, "not UTF-8 text, and its first lines name no encoding that Python knows")
        return
    # A long file is decoded once before the first piece goes out: half a file must not slip through.
    try:
        with _opened(path, compression, name) as file:
            num_pieces = sum(1 for _ in _pieces(file, encoding))
    except UnicodeDecodeError as error:
        yield BadRow(name, f"not {_plain(encoding)} text: {error.reason}", excerpt(repr(error.object[:60])))
        return
    note(TEXT if num_pieces < 2 else f"text, cut at line ends into {num_pieces} documents of at most 1 MiB")
    with _opened(path, compression, name) as file:
        for number, piece in enumerate(_pieces(file, encoding)):
            yield Document(name if num_pieces < 2 else f"{name}#{number}", (piece,))


def read_jsonl(path: Path, name: str, compression: str | None, note: Note) -> Iterator[Item]:
    """One JSON object a line; its columns are inferred from the first object that has known ones."""
    kind: str | None = None
    with _opened(path, compression, name) as file:
        for number, line in enumerate(_lines(file), 1):
            origin = f"{name}:{number}"
            if line is None:
                yield BadRow(origin, f"longer than {MAX_LINE >> 20} MiB")
                continue
            if line.isspace():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                yield BadRow(origin, f"not UTF-8: {error.reason}", excerpt(repr(line[:60])))
                continue
            except (ValueError, RecursionError) as error:
                yield BadRow(origin, f"not JSON: {error}", excerpt(line[:800].decode("utf-8", "replace")))
                continue
            if not isinstance(row, dict):
                yield BadRow(origin, f"a JSON {type(row).__name__}, not an object", excerpt(row))
                continue
            if kind is None:
                kind = infer_columns(row)
                if kind is None:
                    has = ", ".join(list(row)[:12]) or "no columns"
                    yield BadRow(origin, f"has none of text, prompt+completion, messages; has {has}", excerpt(row))
                    continue
                note(f"JSON Lines, {kind}")
            yield from _bounded(document_from_row(row, kind, origin))


def read_parquet(path: Path, name: str, compression: str | None, note: Note) -> Iterator[Item]:
    """The rows of every row group; ArtefactError names the file and the row group that cannot be read."""
    del compression  # Parquet compresses inside
    try:
        file = pq.ParquetFile(path, memory_map=False, pre_buffer=False)
    except (pa.ArrowException, OSError) as error:
        raise ArtefactError(f"{name}: not a readable Parquet file ({_first_line(error)}); {_REPLACE}") from None
    with file:
        kind = infer_columns(file.schema_arrow.names)
        if kind is None:
            raise ArtefactError(
                f"{name}: has none of the columns text, prompt+completion, messages; "
                f"has {', '.join(file.schema_arrow.names[:12])}; rename one to `text`"
            )
        note(f"Parquet, {kind}")
        row_number = 0
        for group in range(file.num_row_groups):
            try:
                for batch in file.iter_batches(
                    _rows_at_once(file, group), row_groups=[group], columns=[*columns_of(kind)]
                ):
                    for row in batch.to_pylist():
                        row_number += 1
                        yield from _bounded(document_from_row(row, kind, f"{name}:{row_number}"))
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                where = f"{name}: row group {group} of {file.num_row_groups}"
                raise ArtefactError(f"{where} cannot be read ({_first_line(error)}); {_REPLACE}") from None


_REPLACE = "replace the file or leave it out of the sources"


@contextmanager
def _opened(path: Path, compression: str | None, name: str) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed; damage and disappearance become ArtefactError."""
    try:
        with path.open("rb") as raw:
            if compression == "gz":
                with gzip.GzipFile(fileobj=raw) as unpacked:
                    yield io.BufferedReader(unpacked, _BLOCK)  # pyright: ignore[reportArgumentType]
            elif compression == "zst":
                zstandard = import_zstandard(name)
                try:
                    with zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True) as unpacked:
                        yield io.BufferedReader(unpacked, _BLOCK)
                except zstandard.ZstdError as error:
                    raise ArtefactError(f"{name}: damaged zstd data ({error}); {_REPLACE}") from None
            else:
                yield raw
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ArtefactError(f"{name}: damaged gzip data ({error}); {_REPLACE}") from None
    except OSError as error:
        raise ArtefactError(f"{name}: cannot be read: {error.strerror or error}") from None


def import_zstandard(name: str) -> Any:
    """The optional zstandard module, or how to install it."""
    try:
        import zstandard
    except ImportError:
        raise RecipeError(f'{name}: reading .zst needs zstandard: pip install "inl[compression]"') from None
    return zstandard


def _source_encoding(file: IO[bytes]) -> str | None:
    try:
        encoding, _ = tokenize.detect_encoding(file.readline)
    except SyntaxError:
        return None
    return "utf-8-sig" if encoding == "utf-8" else encoding


def _plain(encoding: str) -> str:
    return "UTF-8" if encoding == "utf-8-sig" else encoding


def _pieces(file: IO[bytes], encoding: str) -> Iterator[str]:
    """The decoded text in pieces of at most MAX_DOCUMENT characters, cut after a line end where there is one."""
    decoder = codecs.getincrementaldecoder(encoding)("strict")
    rest, at_end = "", False
    while not at_end:
        data = file.read(_BLOCK)
        at_end = not data
        rest += decoder.decode(data, final=at_end)
        while len(rest) > MAX_DOCUMENT:
            cut = rest.rfind("\n", 0, MAX_DOCUMENT) + 1 or MAX_DOCUMENT
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _bounded(item: Item) -> Iterator[Item]:
    """A long text row in pieces, as a long text file; a long prompt or conversation cannot be cut and is a bad row."""
    size = sum(map(len, item.texts)) if isinstance(item, Document) else 0
    if isinstance(item, BadRow) or size <= MAX_DOCUMENT:
        yield item
    elif item.roles and size > 4 * MAX_DOCUMENT:
        yield BadRow(item.origin, f"{size:,} characters in one conversation; at most {4 * MAX_DOCUMENT:,} are possible")
    elif item.roles:
        yield item
    else:
        pieces = _pieces(io.BytesIO(item.texts[0].encode("utf-8")), "utf-8")
        yield from (Document(f"{item.origin}#{number}", (piece,)) for number, piece in enumerate(pieces))


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """Lines of at most MAX_LINE bytes; None stands for a longer one."""
    while line := file.readline(MAX_LINE):
        if len(line) < MAX_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)
        yield None


def _rows_at_once(file: pq.ParquetFile, group: int) -> int:
    """Rows that make about 8 MiB, so that wide rows do not fill memory."""
    metadata = file.metadata.row_group(group)
    return max(1, min(1024, (8 << 20) * metadata.num_rows // max(1, metadata.total_byte_size)))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
