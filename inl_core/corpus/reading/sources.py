"""What the user named -> the files to read, in a fixed order, each with its format; and the documents of a file.

- A source is `builtin:python`, `-` (stdin, which is first copied to a file), a file, a directory or a glob.
- Directories, also those that a glob matches, are read with everything below them; links are followed.
- What is guessed (format, columns) and what is left out is told through `note`.
"""

import hashlib
import os
import shutil
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from inl_core.corpus.reading.builtin import python_documents, python_signature
from inl_core.corpus.reading.compression import import_zstandard
from inl_core.corpus.reading.formats import FORMAT_NAMES, format_of_content, format_of_name
from inl_core.corpus.reading.json_array import array_values
from inl_core.corpus.reading.jsonl import documents_of_rows, read_jsonl
from inl_core.corpus.reading.parquet import read_parquet
from inl_core.corpus.reading.paths import leads_up, local_path, matches, portable, refuse_missing, shown, walk
from inl_core.corpus.reading.rows import FORMS, Form, Item, Note
from inl_core.corpus.reading.text import read_text
from inl_core.errors import ArtefactError, RecipeError
from inl_core.files import open_regular

BUILTIN_PYTHON = "builtin:python"
STDIN = "-"
_CACHES = {"__pycache__", "node_modules"}


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file to read: `name` is what messages call it, `argument` the source that brought it.

    `path` is in a form that can be written into JSON; `location` is the path to open.
    """

    name: str
    path: str
    argument: str
    format: str  # text, jsonl, json, parquet, builtin
    compression: str | None = None
    size: int = 0
    modified: int = 0
    sha256: str = ""

    @property
    def location(self) -> Path:
        """Where the file is."""
        return local_path(self.path)


def resolve_sources(
    sources: Sequence[str],
    *,
    note: Note = lambda message: None,
    stdin_copy: Path | None = None,
    exclude: Path | None = None,
) -> list[SourceFile]:
    """The files that the sources stand for, in order and each of them once.

    Args:
        stdin_copy: the file that holds a copy of stdin, for the source `-`.
        exclude: the output directory, which is never read as a source.

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
    once = _each_once(files)
    if len(once) < len(files):
        note(f"{len(files) - len(once)} files were named more than once and are read once")
    packed = next((file.name for file in once if file.compression == "zst"), None)
    if packed is not None:
        import_zstandard(packed)
    return once


def hash_file(file: SourceFile, on_bytes: Callable[[int], None] = lambda count: None) -> SourceFile:
    """The file with its sha256; `on_bytes` is told how many bytes are read. A built-in has its own hash already."""
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


def check_unchanged(files: Iterable[SourceFile]) -> None:
    """ArtefactError when a file changed since it was hashed, as then nobody can say what was read from it."""
    for file in files:
        if not file.modified:
            continue  # a built-in, or the copy of stdin
        try:
            status = file.location.stat()
        except OSError:
            raise ArtefactError(f"{file.name}: disappeared while it was being read; put it back") from None
        if (status.st_size, status.st_mtime_ns) != (file.size, file.modified):
            raise ArtefactError(f"{file.name}: changed while it was being read; run again when it is finished")


def read_source(file: SourceFile, *, note: Note, forms: Sequence[Form] = FORMS) -> Iterator[Item]:
    """The documents and bad rows of one file, whose rows have one of the `forms`.

    Args:
        note: is told the file's format and columns.
    """
    if file.format == "builtin":
        note("standard-library sources and pydoc topics")
        return python_documents()
    if file.format == "text":
        return read_text(file.location, file.name, file.compression, note)
    if file.format == "json":
        values = array_values(file.location, file.name, file.compression)
        return documents_of_rows(values, "JSON array", note, forms)
    reader = {"jsonl": read_jsonl, "parquet": read_parquet}[file.format]
    return reader(file.location, file.name, file.compression, note, forms)


def copy_stdin(target: Path) -> None:
    """Copy stdin, which cannot be read twice, to a file; RecipeError when it is closed or a terminal."""
    if sys.stdin is None or sys.stdin.closed:
        raise RecipeError("`-` reads stdin, which is closed: pipe text into the command")
    if sys.stdin.isatty():
        raise RecipeError("`-` reads stdin, which is a terminal here: pipe text into the command")
    with target.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)


def _each_once(files: Iterable[SourceFile]) -> list[SourceFile]:
    """The files without repetitions: a file that was named twice stays where it came first."""
    by_path: dict[str, SourceFile] = {}
    for file in files:
        by_path.setdefault(file.path, file)
    return list(by_path.values())


def _builtin_file(source: str) -> SourceFile:
    if source != BUILTIN_PYTHON:
        raise RecipeError(f"{source}: no such built-in corpus; did you mean {BUILTIN_PYTHON}?")
    where, size, digest = python_signature()
    return SourceFile(source, where, source, "builtin", size=size, sha256=digest)


def _stdin_file(copy: Path, note: Note) -> SourceFile:
    format, compression = format_of_content(copy, "stdin")
    note(f"stdin: read as {FORMAT_NAMES[format]}" + (f", {compression}" if compression else ""))
    # When the copy was made says nothing about the data, so its time stays out of the manifest.
    return SourceFile("stdin", str(copy), STDIN, format, compression, size=copy.stat().st_size)


def _path_files(source: str, note: Note, exclude: Path | None) -> list[SourceFile]:
    path, name = local_path(source), shown(local_path(source))
    refuse_missing(path)
    found = [path]
    if not os.path.exists(path):  # noqa: PTH110  a pattern
        found = [Path(match) for match in matches(str(path))]
        if not found:
            raise RecipeError(f"{name}: the pattern matches no file")
    return _Collection(source, name, note, exclude).collect(found)


@dataclass
class _Collection:
    """Collects the files that one source stands for, and counts what it leaves out."""

    source: str
    name: str
    note: Note
    exclude: Path | None
    left_out: Counter[str] = field(default_factory=Counter)
    """Files that cannot be read, by kind."""
    passed_over: Counter[str] = field(default_factory=Counter)
    """What nobody would expect to be read: hidden files, caches, the output, links without end."""

    def collect(self, found: list[Path]) -> list[SourceFile]:
        """The files among the paths, and those below the directories among them; RecipeError when there is none."""
        files: list[SourceFile] = []
        walked: list[str] = []
        is_one = len(found) == 1
        for path in found:
            if self.exclude and (self.exclude == path.resolve() or self.exclude in path.resolve().parents):
                if is_one:
                    raise RecipeError(f"{self.name}: belongs to the output directory; name another --output")
                self.passed_over["in the output directory"] += 1
            elif not path.is_dir():
                if not is_one and (kind := _special(path)):
                    self.left_out[kind] += 1
                else:
                    files.append(_named_file(path, self.source, self.note))
            elif not is_one and leads_up(path):
                self.passed_over[f"link to a directory above it ({shown(path.name)})"] += 1
            elif not str(path).startswith(tuple(walked)):
                walked.append(f"{path}{os.sep}")
                files += self._below(path)
        files = _each_once(files)
        if not files:
            place = "in this directory" if is_one else "among what the pattern matches"
            skipped = _listed(self.left_out + self.passed_over)
            raise RecipeError(
                f"{self.name}: no text, .jsonl or .parquet file {place}"
                + (f" (left out: {skipped})" if skipped else "")
                + self._advice()
            )
        self._tell(files, has_directories=bool(walked))
        return files

    def _tell(self, files: list[SourceFile], *, has_directories: bool) -> None:
        skipped = _listed(self.left_out)
        if has_directories or skipped:
            kinds = sorted(Counter(file.format for file in files).items())
            counts = ", ".join(f"{count} {format}" for format, count in kinds) or "no"
            self.note(f"{self.name}: {counts} files" + (f"; left out: {skipped}" if skipped else "") + self._advice())
        if self.passed_over:
            self.note(f"{self.name}: passed over: {_listed(self.passed_over)}")

    def _advice(self) -> str:
        """JSON of a directory may be anything, settings above all, so it is read only where a user asks for it."""
        return "; a .json file is read where it is named itself" if self.left_out[".json"] else ""

    def _below(self, root: Path) -> Iterator[SourceFile]:
        """The readable files below a directory, sorted."""
        for directory, names in walk(str(root), self._is_skipped):
            for path in (Path(directory, name) for name in names):
                format, compression = format_of_name(path)
                if path.name.startswith("."):
                    self.passed_over["hidden file"] += 1
                elif kind := _special(path):
                    self.left_out[kind] += 1
                elif format is None:
                    self.left_out[shown(path.suffix) or "without a suffix"] += 1
                else:
                    yield _source_file(path, self.source, format, compression)

    def _is_skipped(self, directory: Path, is_endless: bool) -> bool:
        reason = ""
        if is_endless:
            reason = f"link to a directory above it ({shown(directory.name)})"
        elif self.exclude is not None and directory.resolve() == self.exclude:
            reason = f"output directory {shown(directory.name)}"
        elif directory.name.startswith("."):
            reason = f"hidden directory {shown(directory.name)}"
        elif directory.name in _CACHES:
            reason = f"cache directory {shown(directory.name)}"
        if reason:
            self.passed_over[reason] += 1
        return bool(reason)


def _listed(counts: Counter[str]) -> str:
    """`3 .png, 1 broken link`: the twelve most common kinds, the most common first, and the others as one number."""
    listed = [f"{count} {what}" for what, count in counts.most_common(12)]
    more = counts.total() - sum(count for _, count in counts.most_common(12))
    return ", ".join(listed + ([f"{more} others"] if more else []))


def _special(path: Path) -> str | None:
    """What a path is when it is not a regular file."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "broken link" if path.is_symlink() else "unreadable"
    return None if stat.S_ISREG(mode) else "not a regular file"


def _named_file(path: Path, source: str, note: Note) -> SourceFile:
    """A file that the user named. When its suffix is unknown, its content decides the format, and `note` is told."""
    name = shown(path)
    if not path.is_file():
        raise RecipeError(f"{name}: not a regular file; name a file, a directory, a glob or - for stdin")
    format, compression = format_of_name(path)
    if format is None and compression:
        raise RecipeError(
            f"{name}: unknown kind of compressed file; name it like .txt.{compression} or .jsonl.{compression}"
        )
    if format is None:
        is_json = path.suffix.lower() == ".json"  # which may be an array or JSON Lines
        format, compression = format_of_content(path, name, is_json=is_json)
        found = FORMAT_NAMES[format] + (f", {compression}" if compression else "")
        note(f"{name}: {'' if is_json else 'unknown suffix, '}read as {found}")
    return _source_file(path, source, format, compression)


def _source_file(path: Path, source: str, format: str, compression: str | None) -> SourceFile:
    status, real = path.stat(), portable(os.path.realpath(path))
    return SourceFile(shown(path), real, source, format, compression, status.st_size, status.st_mtime_ns)
