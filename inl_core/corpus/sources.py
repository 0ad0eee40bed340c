"""What the user named -> the files to read, in a fixed order, with their formats -> a stream of documents.

- A source is `builtin:python`, `-` (stdin, kept in a file first), a file, a directory or a glob. Directories, found by
  a glob too, are read with all below them, links followed.
- What is guessed (format, columns) and what is left out is said through `note`, never silent.
"""

import hashlib
import os
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from inl_core.corpus.builtin import python_documents, python_signature
from inl_core.corpus.containers import import_zstandard
from inl_core.corpus.formats import WORDS, format_of, sniff
from inl_core.corpus.parquet import read_parquet
from inl_core.corpus.paths import leads_up, local_path, matches, portable, shown, walk
from inl_core.corpus.readers import Item, Note, read_jsonl, read_text
from inl_core.errors import ArtefactError, RecipeError
from inl_core.files import open_regular

BUILTIN_PYTHON = "builtin:python"
STDIN = "-"
_CACHES = {"__pycache__", "node_modules"}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read: `name` is what messages call it, `argument` the source that brought it.

    `path` can be written into JSON; `location` is the path to open.
    """

    name: str
    path: str
    argument: str
    format: str  # text, jsonl, parquet, builtin
    compression: str | None = None
    size: int = 0
    modified: int = 0
    sha256: str = ""

    @property
    def location(self) -> Path:
        """Where the file is."""
        return local_path(self.path)


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
    return reader(file.location, file.name, file.compression, note)


def resolve_sources(
    sources: Sequence[str],
    *,
    note: Note = lambda message: None,
    stdin_copy: Path | None = None,
    exclude: Path | None = None,
) -> list[SourceFile]:
    """Expand the sources to files in order, each once. `exclude` is the output directory, never read as a source.

    Raises:
        RecipeError: a source is empty, missing, ambiguous or of a kind that cannot be read.
        ArtefactError: a directory or a file cannot be read.
    """
    files: list[SourceFile] = []
    for source in sources:
        if source == STDIN:
            if stdin_copy is None:
                raise RecipeError("`-` (stdin) cannot be read here")
            files.append(_stdin_file(stdin_copy, note))
        elif source.startswith("builtin:"):
            files.append(_builtin_file(source))
        else:
            files += _path_files(source, note, exclude and exclude.resolve())
    unique = {file.path: file for file in reversed(files)}  # a file named twice is read where it came first
    if len(unique) < len(files):
        note(f"{len(files) - len(unique)} files were named more than once and are read once")
    ordered = [file for file in dict.fromkeys(files) if unique.pop(file.path, None)]
    if any(file.compression == "zst" for file in ordered):
        import_zstandard(next(file.name for file in ordered if file.compression == "zst"))
    return ordered


def hash_file(file: SourceFile, on_bytes: Callable[[int], None] = lambda count: None) -> SourceFile:
    """The file with its sha256 (a built-in has its own signature already); `on_bytes` is told how much is read."""
    if file.format == "builtin":
        return file
    digest = hashlib.sha256()
    try:
        with open_regular(file.location) as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
                on_bytes(stream.tell())
    except OSError as error:
        raise ArtefactError(f"{file.name}: cannot be read: {error.strerror or error}") from None
    return replace(file, sha256=digest.hexdigest())


def _builtin_file(source: str) -> SourceFile:
    if source != BUILTIN_PYTHON:
        raise RecipeError(f"{source}: no such built-in corpus; did you mean {BUILTIN_PYTHON}?")
    where, size, digest = python_signature()
    return SourceFile(source, where, source, "builtin", size=size, sha256=digest)


def copy_stdin(target: Path) -> None:
    """Copy stdin to a file: it cannot be read twice. RecipeError when it is closed or a terminal."""
    if sys.stdin is None or sys.stdin.closed:
        raise RecipeError("`-` reads stdin, which is closed: pipe text into the command")
    if sys.stdin.isatty():
        raise RecipeError("`-` reads stdin, which is a terminal here: pipe text into the command")
    with target.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)


def check_unchanged(files: Iterable[SourceFile]) -> None:
    """ArtefactError when a file is no longer what was hashed: what was read from it cannot be told."""
    for file in files:
        if not file.modified:
            continue  # a built-in, or the copy of stdin
        try:
            status = file.location.stat()
        except OSError:
            raise ArtefactError(f"{file.name}: disappeared while it was being read; put it back") from None
        if (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
            raise ArtefactError(f"{file.name}: changed while it was being read; run again when it is finished")


def _stdin_file(copy: Path, note: Note) -> SourceFile:
    format, compression = sniff(copy, "stdin")
    note(f"stdin: read as {WORDS[format]}" + (f", {compression}" if compression else ""))
    # The copy's time says nothing about the data, so it stays out of the manifest.
    return SourceFile("stdin", str(copy), STDIN, format, compression, size=copy.stat().st_size)


def _path_files(source: str, note: Note, exclude: Path | None) -> list[SourceFile]:
    path, name = local_path(source), shown(local_path(source))
    if os.path.exists(path):  # noqa: PTH110  False, not an error, for a name that is too long
        found = [str(path)]
    elif os.path.islink(path):  # noqa: PTH114
        raise RecipeError(f"{name}: a link to {shown(path.readlink())}, which is not there")
    elif any(character in str(path) for character in "*?["):
        found = matches(str(path))
        if not found:
            raise RecipeError(f"{name}: the pattern matches no file")
    else:
        raise RecipeError(f"{name}: no such file or directory{_nearest(path)}")
    return _collect(found, source, name, note, exclude)


def _nearest(path: Path) -> str:
    import difflib

    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {shown(path.with_name(close[0]))}?" if close else ""


def _collect(found: list[str], source: str, name: str, note: Note, exclude: Path | None) -> list[SourceFile]:
    """The files among what a source stands for, and those below its directories; what is left out is noted."""
    left_out: Counter[str] = Counter()
    passed_over: Counter[str] = Counter()
    files: list[SourceFile] = []
    walked: list[str] = []
    for path in map(Path, found):
        if exclude and (exclude == path.resolve() or exclude in path.resolve().parents):
            if len(found) == 1:
                raise RecipeError(f"{name}: belongs to the output directory; name another --output")
            passed_over["in the output directory"] += 1
        elif not path.is_dir():
            if len(found) > 1 and (kind := _special(path)):
                left_out[kind] += 1
            else:
                files.append(_named_file(path, source, note))
        elif len(found) > 1 and leads_up(path):
            passed_over[f"link to a directory above it ({shown(path.name)})"] += 1
        elif not str(path).startswith(tuple(walked)):
            walked.append(f"{path}{os.sep}")
            files += _below(path, source, left_out, passed_over, exclude)
    files = list({file.path: file for file in reversed(files)}.values())[::-1]
    skipped = _listed(left_out)
    if walked or skipped:
        kinds = sorted(Counter(file.format for file in files).items())
        counts = ", ".join(f"{count} {format}" for format, count in kinds) or "no"
        note(f"{name}: {counts} files" + (f"; left out: {skipped}" if skipped else ""))
    if passed_over:
        note(f"{name}: passed over: {_listed(passed_over)}")
    if not files:
        place = "in this directory" if len(found) == 1 else "among what the pattern matches"
        skipped = _listed(left_out + passed_over)
        raise RecipeError(
            f"{name}: no text, .jsonl or .parquet file {place}" + (f" (left out: {skipped})" if skipped else "")
        )
    return files


def _listed(counts: Counter[str]) -> str:
    """`3 .png, 1 broken link`, the most common first; what is beyond twelve kinds as one number."""
    listed = [f"{count} {what}" for what, count in counts.most_common(12)]
    more = counts.total() - sum(count for _, count in counts.most_common(12))
    return ", ".join(listed + ([f"{more} others"] if more else []))


def _below(
    root: Path, source: str, left_out: Counter[str], passed_over: Counter[str], exclude: Path | None
) -> Iterator[SourceFile]:
    """The readable files under a directory, sorted; hidden ones, caches and the output are passed over."""

    def is_skipped(path: Path, is_end: bool) -> bool:
        is_output = exclude is not None and path.resolve() == exclude
        is_hidden, is_cache = path.name.startswith("."), path.name in _CACHES
        if is_end:
            passed_over[f"link to a directory above it ({shown(path.name)})"] += 1
        elif is_output or is_hidden or is_cache:
            reason = "output directory" if is_output else "hidden directory" if is_hidden else "cache directory"
            passed_over[f"{reason} {shown(path.name)}"] += 1
        return is_end or is_output or is_hidden or is_cache

    for directory, names in walk(str(root), is_skipped):
        for path in (Path(directory, name) for name in names):
            format, compression = format_of(path)
            if path.name.startswith("."):
                passed_over["hidden file"] += 1
            elif kind := _special(path):
                left_out[kind] += 1
            elif format is None:
                left_out[shown(path.suffix) or "without a suffix"] += 1
            else:
                yield _source_file(path, source, format, compression)


def _special(path: Path) -> str | None:
    """What a path is when it is no regular file."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "broken link" if path.is_symlink() else "unreadable"
    return None if stat.S_ISREG(mode) else "not a regular file"


def _named_file(path: Path, source: str, note: Note) -> SourceFile:
    """A file the user named: an unknown suffix is read as what its content looks like, and that is said."""
    name = shown(path)
    if not path.is_file():
        raise RecipeError(f"{name}: not a regular file; name a file, a directory, a glob or - for stdin")
    format, compression = format_of(path)
    if format is None and compression:
        raise RecipeError(
            f"{name}: unknown kind of compressed file; name it like .txt.{compression} or .jsonl.{compression}"
        )
    if format is None:
        format, compression = sniff(path, name, is_json=path.suffix.lower() == ".json")
        note(f"{name}: unknown suffix, read as {WORDS[format]}" + (f", {compression}" if compression else ""))
    return _source_file(path, source, format, compression)


def _source_file(path: Path, source: str, format: str, compression: str | None) -> SourceFile:
    status, real = path.stat(), portable(os.path.realpath(path))
    return SourceFile(shown(path), real, source, format, compression, status.st_size, status.st_mtime_ns)
