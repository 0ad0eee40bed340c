"""The directory of a data set while it is prepared: what may be written there, the lock, the plan, cleaning up."""

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
from inl_core.corpus.reading.sources import SourceFile, copy_stdin
from inl_core.corpus.shard_check import VERIFIED
from inl_core.errors import ArtefactError, InlError, RecipeError
from inl_core.files import ASIDE, open_regular, written_aside
from inl_core.locking import lock

PLAN, _STDIN, _LOCK = "plan.json", "stdin", "lock"

_SHARD = re.compile(rf"({'|'.join(SPLITS)})-\d{{5,}}-of-\d{{5,}}\.arrow({re.escape(ASIDE)})?")
"""The names of shards, and of shards that a killed run left unfinished."""
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
            if not (work / PLAN).exists():  # the run left nothing that could be gone on from
                clear(work)
                shutil.rmtree(work)
                if not any(directory.iterdir()):
                    directory.rmdir()


def _lock(directory: Path, waiting: Callable[[], None] | None) -> FileIO:
    has_waited = False
    while True:
        try:
            file, _ = lock(directory / WORK / _LOCK)  # some file systems have no locks: then there is none
        except OSError as error:
            raise ArtefactError(f"{directory}: cannot be written: {error.strerror or error}") from None
        if file is not None:
            return file
        if waiting is None:
            raise ArtefactError(f"{directory}: another process is preparing this data set; wait for it")
        if not has_waited:
            waiting()
        has_waited = True
        time.sleep(0.2)


def keep_stdin(work: Path) -> Path:
    """Copy stdin to a working file, since it can be read only once."""
    with written_aside(work / _STDIN) as aside:
        copy_stdin(aside)
    return work / _STDIN


class Plan(BaseModel):
    """What a preparation works on: its settings, and its sources with their hashes."""

    settings: dict[str, Any]
    files: list[SourceFile]

    def content(self) -> object:
        """What two equal plans have in common: settings and file contents, not the times of files."""
        return self.settings, [(file.path, file.format, file.sha256) for file in self.files]


def clear(work: Path, *, keep_stdin: bool = False) -> None:
    """Remove the working files. The plan goes first: without it, nothing that a kill leaves would be gone on from."""
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
    """Remove a data set. Its manifest goes first: without one there is no data set, whatever else is left."""
    for path in [directory / name for name in (MANIFEST, TOKENIZER, QUARANTINE, VERIFIED)]:
        path.unlink(missing_ok=True)
    for path in list(directory.iterdir()):
        if _SHARD.fullmatch(path.name):
            path.unlink()
