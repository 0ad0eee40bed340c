"""The name of a source -> paths: home directories, globs, links, and file names that are not UTF-8.

- Links to directories are followed, except for a link that leads back to a directory above it: that has no end.
- A name that is not UTF-8 cannot be written into JSON. It is kept as a file:// URI, from which it can be had back.
"""

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote_from_bytes, unquote_to_bytes

from inl_core.errors import ArtefactError, RecipeError
from inl_core.files import expand_home

_URI = "file://"


def portable(path: str) -> str:
    """The path itself when it is UTF-8, else its absolute file:// URI; `local_path` is the inverse for both."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return _URI + quote_from_bytes(os.fsencode(Path(path).expanduser().absolute()))
    return path


def local_path(source: str) -> Path:
    """The path that a source, or a file in a manifest, stands for; a leading ~ is the home directory.

    Raises:
        RecipeError: the source is empty, holds a NUL byte, or begins with the home directory of an unknown user.
    """
    if not source:
        raise RecipeError("an empty source (a shell variable that is not set?); name a file, a directory or a glob")
    if "\0" in source:
        raise RecipeError(f"{shown(source)}: no file name holds a NUL byte")
    if source.startswith(_URI):
        return Path(os.fsdecode(unquote_to_bytes(source[len(_URI) :])))
    return expand_home(source)


def refuse_missing(path: Path) -> None:
    """RecipeError where there is nothing at a path that is no pattern; it names the nearest name that is there."""
    if os.path.exists(path):  # noqa: PTH110  False, not an error, for a name that is too long
        return
    if os.path.islink(path):  # noqa: PTH114
        raise RecipeError(f"{shown(path)}: a link to {shown(path.readlink())}, which is not there")
    if not any(character in str(path) for character in "*?["):
        raise RecipeError(f"{shown(path)}: no such file or directory{_nearest(path)}")


def _nearest(path: Path) -> str:
    import difflib

    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, 1)
    return f"; did you mean {shown(path.with_name(close[0]))}?" if close else ""


def absolute_source(source: str) -> str:
    """The absolute path of a source, links resolved, in the form of `portable`."""
    return portable(os.path.realpath(local_path(source)))


def shown(path: str | os.PathLike[str]) -> str:
    r"""A path as one line of UTF-8 for messages: other bytes are written like \xff, control characters like \n."""
    text = os.fsdecode(path)
    if text.isprintable():
        return text
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def matches(pattern: str) -> list[str]:
    """The files and directories that match a glob, sorted. Hidden ones are left out; links are followed."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return sorted(glob.glob(pattern))  # noqa: PTH207  absolute patterns too
    place = parts.index("**")
    rest = str(Path(*parts[place + 1 :])) if parts[place + 1 :] else "*"
    bases = filter(os.path.isdir, matches(str(Path(*parts[:place])))) if place else [""]
    found = {
        match
        for base in bases
        for directory, _ in walk(base, lambda path, is_end: is_end or path.name.startswith("."))
        for match in matches(os.path.join(glob.escape(directory), rest))  # noqa: PTH118  "" stays relative
    }
    return sorted(found)


def leads_up(path: Path) -> bool:
    """Whether a directory is a link to one of the directories that it lies in."""
    real, place = Path(os.path.realpath(path)), Path(os.path.realpath(path.parent))
    return real == place or real in place.parents


def walk(root: str, is_skipped: Callable[[Path, bool], bool]) -> Iterator[tuple[str, list[str]]]:
    """(directory, the names in it that are not directories), sorted, for the root and every directory below it.

    Args:
        is_skipped: says whether a directory is left out. It is told the directory, and whether that is a link which
            leads back up; such a link is never followed.

    Raises:
        ArtefactError: a directory cannot be read.
    """
    todo = [(root, frozenset({os.path.realpath(root)}))]
    while todo:
        directory, above = todo.pop()
        others, deeper = [], []
        for entry in _entries(directory):
            path = os.path.join(directory, entry.name)  # noqa: PTH118
            if not entry.is_dir():
                others.append(entry.name)
                continue
            real_path = os.path.realpath(path)
            is_end = real_path in above or leads_up(Path(path))
            if not is_skipped(Path(path), is_end) and not is_end:
                deeper.append((path, above | {real_path}))
        yield directory, others
        todo += reversed(deeper)


def _entries(directory: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(directory or ".") as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise ArtefactError(f"{shown(directory)}: cannot be read: {error.strerror or error}") from None
