"""The directory of a data set while it is prepared: what may be written there, the locks, the plan, cleaning up.

    DIRECTORY/.prepare/                        working files of a preparation, or of one that joins parts
    DIRECTORY/.prepare/part-00003-of-00008/    working files of a part

Who prepares a part locks its directory alone, and that of `.prepare` together with other parts. All others lock
`.prepare` alone.
"""

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from io import FileIO
from pathlib import Path
from typing import Any
from unicodedata import unidata_version

from pydantic import BaseModel

from inl_core.corpus.manifest import MANIFEST, QUARANTINE, SPLITS, TOKENIZER, WORK
from inl_core.corpus.reading.sources import SourceFile, copy_stdin
from inl_core.corpus.shard_check import VERIFIED
from inl_core.errors import ArtefactError, InlError, RecipeError
from inl_core.files import ASIDE, open_regular, written_aside
from inl_core.locking import lock

PLAN, _STDIN, _LOCK = "plan.json", "stdin", "lock"

_SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}-of-\d{{5,}}\.arrow({re.escape(ASIDE)})?")
"""The names of shards, and of shards that a killed run left unfinished."""
_PART = re.compile(r"part-(\d{5})-of-(\d{5})")
_MODEL_FILES = ("model.safetensors", "config.json", "training_state")
_MANIFEST_HEAD = 1 << 20
_FIXES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there") | {errno.EFBIG: "raise `ulimit -f`"}


def check_directory(directory: Path) -> None:
    """RecipeError when the output is a file, or a directory that holds something other than a data set."""
    if directory.exists() and not directory.is_dir():
        raise RecipeError(f"{directory}: a file; the output is a directory")
    if directory.is_dir() and any(directory.iterdir()) and not _is_data_set(directory):
        raise RecipeError(f"{directory}: not empty and not a data set; name another --output")


def _is_data_set(directory: Path) -> bool:
    """Whether a directory holds a data set, perhaps a damaged or unfinished one.

    A manifest.json alone does not tell: checkpoints and web pages have one too.
    """

    def has(*names: str) -> list[bool]:
        return [os.path.lexists(directory / name) for name in names]

    if any(has(*_MODEL_FILES)):
        return False
    if any(has(WORK)) or all(has(MANIFEST, TOKENIZER, QUARANTINE)):
        return True
    try:
        with open_regular(directory / MANIFEST) as file:
            return b'"tokenizer_fingerprint"' in file.read(_MANIFEST_HEAD)
    except (ArtefactError, OSError):
        return False


@contextmanager
def locked(directory: Path, waiting: Callable[[], None] | None = None) -> Iterator[Path]:
    """The working directory, locked for this process. The system drops the lock of a process that is killed.

    Args:
        waiting: called once when another process holds the lock, which is then waited for; without it, another
            process is an ArtefactError.

    Raises:
        InlError: there was no room for a file.
    """
    work = directory / WORK
    with _lock(directory, work, waiting):
        try:
            with _room_explained(directory):
                yield work
        finally:
            if not (work / PLAN).exists():  # the run left nothing that could be gone on from
                clear(work)
                if not part_directories(directory):
                    shutil.rmtree(work)
                    if not any(directory.iterdir()):
                        directory.rmdir()


@contextmanager
def locked_part(directory: Path, part: "Part") -> Iterator[Path]:
    """The working directory of a part, locked for this process, beside other parts but nothing else.

    Raises:
        ArtefactError: another process is preparing this part, or the data set as a whole, or joins its parts.
        InlError: there was no room for a file.
    """
    work = part.directory(directory)
    with _lock(directory, directory / WORK, is_shared=True), _lock(directory, work, name=f"part {part}"):
        try:
            with _room_explained(directory):
                yield work
        finally:
            if not (work / PLAN).exists():
                shutil.rmtree(work)


@contextmanager
def _room_explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FIXES:
            raise
        fix = f"{_FIXES[error.errno]} and run the same again, which goes on from here"
        raise InlError(f"{error.filename or directory}: {error.strerror}; {fix}") from error


def _lock(
    directory: Path,
    work: Path,
    waiting: Callable[[], None] | None = None,
    *,
    name: str = "this data set",
    is_shared: bool = False,
) -> FileIO:
    has_waited = False
    while True:
        try:
            file, _ = lock(work / _LOCK, is_shared=is_shared)  # some file systems have no locks: then there is none
        except OSError as error:
            raise ArtefactError(f"{directory}: cannot be written: {error.strerror or error}") from None
        if file is not None:
            return file
        if waiting is None:
            raise ArtefactError(f"{directory}: another process is preparing {name}; wait for it")
        if not has_waited:
            waiting()
        has_waited = True
        time.sleep(0.2)


def keep_stdin(work: Path) -> Path:
    """Copy stdin to a working file, since it can be read only once."""
    with written_aside(work / _STDIN) as aside:
        copy_stdin(aside)
    return work / _STDIN


@dataclass(frozen=True)
class Part:
    """Part `number` of the `count` of a data set, from 1."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def directory(self, data_set: Path) -> Path:
        """Where its working files are."""
        return data_set / WORK / f"part-{self.number:05d}-of-{self.count:05d}"


def part_directories(directory: Path) -> dict[Part, Path]:
    """The parts, finished or not, that lie in the directory of a data set, in order."""
    found = {}
    for path in sorted((directory / WORK).glob("part-*")):
        if match := _PART.fullmatch(path.name):
            found[Part(int(match[1]), int(match[2]))] = path
    return found


def versions() -> dict[str, str]:
    """The versions that decide which documents and tokens a text becomes; Unicode's is that of Python."""
    return {"inl": version("inl"), "tokenizers": version("tokenizers"), "Unicode": unidata_version}


class Plan(BaseModel):
    """What a preparation works on: its settings, and its sources with their hashes."""

    settings: dict[str, Any]
    files: list[SourceFile]
    versions: dict[str, str] = {}
    parts: int = 0
    """How many parts the data set is made in; 0 when it is made as a whole."""

    def content(self) -> object:
        """What two equal plans have in common: settings and file contents, not the times of files."""
        files = [(file.path, file.format, file.sha256) for file in self.files]
        return self.settings, files, self.versions, self.parts


def clear(work: Path, *, keep_stdin: bool = False) -> None:
    """Remove the working files, but not those of parts.

    The plan goes first: without it, nothing that a kill leaves would be gone on from.
    """
    _remove(work / PLAN)
    for path in work.iterdir():
        if path.name != _LOCK and not (keep_stdin and path.name == _STDIN) and not _PART.fullmatch(path.name):
            _remove(path)


def remove_parts(directory: Path) -> None:
    """Remove the parts of a data set that is complete."""
    for path in part_directories(directory).values():
        _remove(path / PLAN)
        shutil.rmtree(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_data_set(directory: Path) -> None:
    """Remove a data set. Its manifest goes first: without one there is no data set, whatever else is left."""
    for path in [directory / name for name in (MANIFEST, TOKENIZER, QUARANTINE, VERIFIED)]:
        path.unlink(missing_ok=True)
    for path in list(directory.iterdir()):
        if _SHARD.fullmatch(path.name):
            path.unlink()
