"""The directory of a data set while it is being prepared: the lock, the plan, stdin's copy, and cleaning up."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from inl_core.corpus.manifest import MANIFEST, QUARANTINE, TOKENIZER, WORK
from inl_core.corpus.shard_check import VERIFIED
from inl_core.corpus.sources import copy_stdin
from inl_core.errors import ArtefactError, RecipeError

PLAN, _STDIN, _LOCK = "plan.json", "stdin", "lock"


def check_directory(directory: Path) -> None:
    """RecipeError when the output is a file, or a directory with something else in it."""
    if directory.exists() and not directory.is_dir():
        raise RecipeError(f"{directory}: a file; the output is a directory")
    ours = any((directory / name).exists() for name in (MANIFEST, WORK))
    if directory.is_dir() and not ours and any(directory.iterdir()):
        raise RecipeError(f"{directory}: not empty and not a data set; name another --output")


@contextmanager
def locked(directory: Path, waiting: Callable[[], None] | None = None) -> Iterator[Path]:
    """The working directory, for one preparation at a time; the system drops the lock of a killed process.

    Args:
        waiting: called once when another preparation has to be waited for; without it that is an ArtefactError.
    """
    with _lock(directory, waiting):
        work = directory / WORK
        try:
            yield work
        finally:
            if not (work / PLAN).exists():  # nothing to go on from
                clear(work)
                shutil.rmtree(work)
                if not any(directory.iterdir()):
                    directory.rmdir()


def _lock(directory: Path, waiting: Callable[[], None] | None) -> IO[bytes]:
    path = directory / WORK / _LOCK
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("ab")
        except FileNotFoundError:
            continue  # a preparation that ends has just removed the directory
        except OSError as error:
            raise ArtefactError(f"{directory}: cannot be written: {error.strerror or error}") from None
        if _try_lock(file):
            # A preparation that ends removes the file while it is locked: it may not be what has the name now.
            with suppress(FileNotFoundError):
                if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                    return file
        elif waiting is None:
            file.close()
            raise ArtefactError(f"{directory}: another process is preparing this data set; wait for it")
        else:
            waiting()
            waiting = _say_nothing
            time.sleep(0.2)
        file.close()


def _try_lock(file: IO[bytes]) -> bool:
    """False when another process has the lock; where there are no locks there is no guard."""
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def _say_nothing() -> None:
    pass


def keep_stdin(work: Path) -> Path:
    """Copy stdin to a file, so that a restart sees what the stopped run saw."""
    aside = work / (_STDIN + ".tmp")
    copy_stdin(aside)
    aside.replace(work / _STDIN)
    return work / _STDIN


def read_plan(path: Path) -> dict | None:
    """The plan of a stopped run, or None."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def plan_content(plan: dict | None) -> object:
    """What makes two plans the same: settings and file contents; times do not."""
    return plan and (plan["settings"], [(f["path"], f["format"], f["sha256"]) for f in plan["files"]])


def clear(work: Path, *, keep_stdin: bool = False) -> None:
    """Drop the work; the plan first, so that what a killed process leaves is not taken for work to go on from."""
    (work / PLAN).unlink(missing_ok=True)
    for path in work.iterdir():
        if path.name != _LOCK and not (keep_stdin and path.name == _STDIN):
            path.unlink()


def remove_data_set(directory: Path) -> None:
    """The manifest first: from then on there is no data set, whatever else is left."""
    for path in [directory / name for name in (MANIFEST, TOKENIZER, QUARANTINE, VERIFIED)]:
        path.unlink(missing_ok=True)
    for pattern in ("train-*.arrow*", "validation-*.arrow*"):  # .tmp too, from a killed run
        for path in directory.glob(pattern):
            path.unlink()
