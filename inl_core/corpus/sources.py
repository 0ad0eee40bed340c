"""What the user named -> the files to read, in a fixed order, with their formats -> a stream of documents.

- A source is `builtin:python`, `-` (stdin, kept in a file first), a file, a directory or a glob.
- What is guessed (format, columns, what was left out) is said through `note`, never silent.
"""

import glob
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from inl_core.corpus.builtin import python_documents, python_signature
from inl_core.corpus.readers import Item, Note, import_zstandard, read_jsonl, read_parquet, read_text
from inl_core.errors import ArtefactError, RecipeError

BUILTIN_PYTHON = "builtin:python"
STDIN = "-"
_TEXT = """.txt .text .md .markdown .rst .tex .org .adoc .html .htm .css .yaml .yml .toml .sql .sh
    .py .pyi .c .h .cc .cpp .hpp .cu .java .kt .scala .go .rs .js .mjs .ts .tsx .jsx .rb .php .pl .lua .r .jl
    .swift .cs .hs .ml"""
TEXT_SUFFIXES = frozenset(_TEXT.split())
JSONL_SUFFIXES = frozenset({".jsonl", ".ndjson"})
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_SKIPPED_DIRECTORIES = {"__pycache__", "node_modules"}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read: `name` is what messages call it, `argument` the source that brought it."""

    name: str
    path: str
    argument: str
    format: str  # text, jsonl, parquet, builtin
    compression: str | None = None
    size: int = 0
    modified: int = 0
    sha256: str = ""


def documents(sources: Sequence[str], *, note: Note = lambda message: None) -> Iterator[Item]:
    """Stream the documents and bad rows of the sources (stdin excepted) in order.

    Raises:
        RecipeError: a source is missing or of a kind that cannot be read.
        ArtefactError: a file is damaged.
    """
    for file in resolve_sources(sources, note=note):
        yield from read_source(file, note=lambda found, file=file: note(f"{file.name}: {found}"))


def read_source(file: SourceFile, *, note: Note) -> Iterator[Item]:
    """The documents and bad rows of one file; `note` is told its format and columns."""
    if file.format == "builtin":
        note("standard-library sources and pydoc topics")
        return python_documents()
    reader = {"text": read_text, "jsonl": read_jsonl, "parquet": read_parquet}[file.format]
    return reader(Path(file.path), file.name, file.compression, note)


def resolve_sources(
    sources: Sequence[str],
    *,
    note: Note = lambda message: None,
    stdin_copy: Path | None = None,
    exclude: Path | None = None,
) -> list[SourceFile]:
    """Expand the sources to files in order, each once. `exclude` is the output directory, never read as a source."""
    files: list[SourceFile] = []
    for source in sources:
        if source == STDIN:
            if stdin_copy is None:
                raise RecipeError("`-` (stdin) can only be prepared, not read here")
            files.append(_stdin_file(stdin_copy, note))
        elif source.startswith("builtin:"):
            files.append(_builtin_file(source))
        else:
            files += _path_files(source, note, exclude)
    unique = {file.path: file for file in reversed(files)}  # a file named twice is read where it came first
    if len(unique) < len(files):
        note(f"{len(files) - len(unique)} files were named more than once and are read once")
    ordered = [file for file in dict.fromkeys(files) if unique.pop(file.path, None)]
    if any(file.compression == "zst" for file in ordered):
        import_zstandard(next(file.name for file in ordered if file.compression == "zst"))
    return ordered


def hash_file(file: SourceFile, on_bytes: Callable[[int], None] = lambda count: None) -> SourceFile:
    """The file with its sha256 (a built-in has its own signature already)."""
    if file.format == "builtin":
        return file
    digest = hashlib.sha256()
    try:
        with Path(file.path).open("rb", buffering=0) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                on_bytes(len(block))
    except OSError as error:
        raise ArtefactError(f"{file.name}: cannot be read: {error.strerror or error}") from None
    return replace(file, sha256=digest.hexdigest())


def _builtin_file(source: str) -> SourceFile:
    if source != BUILTIN_PYTHON:
        raise RecipeError(f"{source}: no such built-in corpus; did you mean {BUILTIN_PYTHON}?")
    where, size, digest = python_signature()
    return SourceFile(source, where, source, "builtin", size=size, sha256=digest)


def _stdin_file(copy: Path, note: Note) -> SourceFile:
    format = "jsonl" if _first_line_is_object(copy) else "text"
    note(f"stdin: read as {'JSON Lines' if format == 'jsonl' else 'plain text'}")
    # The copy's time says nothing about the data, so it stays out of the manifest.
    return SourceFile("stdin", str(copy), STDIN, format, size=copy.stat().st_size)


def _path_files(source: str, note: Note, exclude: Path | None) -> list[SourceFile]:
    path = Path(source).expanduser()
    if path.is_dir():
        found = _walk(path, source, note, exclude)
        if not found:
            raise RecipeError(f"{source}: no text, .jsonl or .parquet file in this directory")
        return found
    if path.exists():
        return [_named_file(path, source, note)]
    if glob.has_magic(source):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207  absolute patterns too
        outside = [match for match in matches if exclude is None or exclude.resolve() not in match.resolve().parents]
        found = [_named_file(match, source, note) for match in outside if match.is_file()]
        if found:
            return found
        raise RecipeError(f"{source}: the pattern matches no file")
    raise RecipeError(f"{source}: no such file or directory{_nearest(path)}")


def _nearest(path: Path) -> str:
    import difflib

    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {path.with_name(close[0])}?" if close else ""


def _walk(root: Path, source: str, note: Note, exclude: Path | None) -> list[SourceFile]:
    """The readable files under a directory, sorted; hidden ones, caches and the output are left out."""
    found: list[SourceFile] = []
    left_out: Counter[str] = Counter()
    excluded = exclude.resolve() if exclude else None
    for directory, names, files in os.walk(root):
        names[:] = sorted(
            name
            for name in names
            if not name.startswith(".")
            and name not in _SKIPPED_DIRECTORIES
            and (excluded is None or Path(directory, name).resolve() != excluded)
        )
        for name in sorted(name for name in files if not name.startswith(".")):
            path = Path(directory, name)
            format, compression = _format_of(path)
            if format is None or not path.is_file():
                left_out[path.suffix or "no suffix"] += 1
            else:
                found.append(_source_file(path, source, format, compression))
    kinds = ", ".join(f"{count} {format}" for format, count in sorted(Counter(f.format for f in found).items()))
    skipped = ", ".join(f"{count} {suffix}" for suffix, count in left_out.most_common(6))
    note(f"{source}: {kinds or 'no'} files" + (f"; left out: {skipped}" if skipped else ""))
    return found


def _format_of(path: Path) -> tuple[str | None, str | None]:
    """(text | jsonl | parquet | None when unknown, compression)."""
    suffix = path.suffix.lower()
    compression = COMPRESSIONS.get(suffix)
    if compression:
        suffix = Path(path.stem).suffix.lower()
    if suffix in TEXT_SUFFIXES:
        return "text", compression
    if suffix in JSONL_SUFFIXES:
        return "jsonl", compression
    return ("parquet", None) if suffix == ".parquet" and not compression else (None, compression)


def _named_file(path: Path, source: str, note: Note) -> SourceFile:
    """A file the user named: an unknown suffix is read as what its content looks like, and that is said."""
    if not path.is_file():
        raise RecipeError(f"{path}: not a regular file; name a file, a directory, a glob or - for stdin")
    format, compression = _format_of(path)
    if format is None and compression:
        raise RecipeError(
            f"{path}: unknown kind of compressed file; name it like .txt.{compression} or .jsonl.{compression}"
        )
    if format is None:
        format = "jsonl" if _first_line_is_object(path) else "text"
        if format == "text" and path.suffix.lower() == ".json":
            raise RecipeError(f"{path}: not JSON Lines; write one object a line")
        note(f"{path}: unknown suffix, read as {'JSON Lines' if format == 'jsonl' else 'plain text'}")
    return _source_file(path, source, format, compression)


def _source_file(path: Path, source: str, format: str, compression: str | None) -> SourceFile:
    status = path.stat()
    return SourceFile(str(path), str(path.resolve()), source, format, compression, status.st_size, status.st_mtime_ns)


def _first_line_is_object(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return isinstance(json.loads(file.readline(1 << 26).decode("utf-8-sig")), dict)
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        return False
