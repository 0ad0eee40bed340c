"""The directory of a data set while it is being prepared: the lock, the plan, stdin's copy, and cleaning up."""

import errno
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from inl_core.corpus.manifest import MANIFEST, QUARANTINE, SPLITS, TOKENIZER, WORK
from inl_core.corpus.shard_check import VERIFIED
from inl_core.corpus.sources import SourceFile, copy_stdin
from inl_core.errors import ArtefactError, InlError, RecipeError
from inl_core.files import ASIDE, open_regular, written_aside
from inl_core.locking import lock

PLAN, _STDIN, _LOCK = "plan.json", "stdin", "lock"

_SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}-of-\d{{5,}}\.arrow({re.escape(ASIDE)})?")
"""What shards are called; with the other ending, what a killed run leaves of one."""
_MODEL_FILES = ("model.safetensors", "config.json", "training_state")
_MANIFEST_HEAD = 1 << 20
_FIXES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room there") | {errno.EFBIG: "raise `ulimit -f`"}


def check_directory(directory: Path) -> None:
    """RecipeError when the output is a file, or a directory with something else in it."""
    if directory.exists() and not directory.is_dir():
        raise RecipeError(f"{directory}: a file; the output is a directory")
    if directory.is_dir() and any(directory.iterdir()) and not _is_data_set(directory):
        raise RecipeError(f"{directory}: not empty and not a data set; name another --output")


def _is_data_set(directory: Path) -> bool:
    """Whether a directory holds a data set, damaged or unfinished perhaps; other things have a manifest.json too."""

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
    """The working directory, for one preparation at a time; the system drops the lock of a killed process.

    Args:
        waiting: called once when another preparation has to be waited for; without it that is an ArtefactError.

    Raises:
        InlError: a file found no room.
    """
    with _lock(directory, waiting):
        work = directory / WORK
        try:
            yield work
        except OSError as error:
            if error.errno not in _FIXES:
                raise
            fix = f"{_FIXES[error.errno]} and run the same again, which goes on from here"
            raise InlError(f"{error.filename or directory}: {error.strerror}; {fix}") from error
        finally:
            if not (work / PLAN).exists():  # nothing to go on from
                clear(work)
                shutil.rmtree(work)
                if not any(directory.iterdir()):
                    directory.rmdir()


def _lock(directory: Path, waiting: Callable[[], None] | None) -> FileIO:
    while True:
        try:
            file, _ = lock(directory / WORK / _LOCK)  # where there are no locks there is no guard
        except OSError as error:
            raise ArtefactError(f"{directory}: cannot be written: {error.strerror or error}") from None
        if file is not None:
            return file
        if waiting is None:
            raise ArtefactError(f"{directory}: another process is preparing this data set; wait for it")
        waiting()
        waiting = _say_nothing
        time.sleep(0.2)


def _say_nothing() -> None:
    pass


def keep_stdin(work: Path) -> Path:
    """Copy stdin to a file, so that a restart sees what the stopped run saw."""
    with written_aside(work / _STDIN) as aside:
        copy_stdin(aside)
    return work / _STDIN


class Plan(BaseModel):
    """What a preparation works on: its settings, and its sources with their hashes."""

    settings: dict[str, Any]
    files: list[SourceFile]

    def content(self) -> object:
        """What makes two plans the same: settings and file contents; times do not."""
        return self.settings, [(file.path, file.format, file.sha256) for file in self.files]


def clear(work: Path, *, keep_stdin: bool = False) -> None:
    """Drop the work; the plan first, so that what a killed process leaves is not taken for work to go on from."""
    _remove(work / PLAN)
    for path in work.iterdir():
        if path.name != _LOCK and not (keep_stdin and path.name == _STDIN):
            _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def remove_data_set(directory: Path) -> None:
    """The manifest first: from then on there is no data set, whatever else is left."""
    for path in [directory / name for name in (MANIFEST, TOKENIZER, QUARANTINE, VERIFIED)]:
        path.unlink(missing_ok=True)
    for path in list(directory.iterdir()):
        if _SHARD.fullmatch(path.name):
            path.unlink()
