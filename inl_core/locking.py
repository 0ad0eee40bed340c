"""Lock files, by which a process tells others that something is in use.

- The system drops a lock when its process ends, in whatever way. Some network file systems have no locks at all.
- A lock file is opened for reading and writing: over NFS a shared lock needs the first, an exclusive one the second.
- Anything may stand under the name of a lock file. A link is not followed, since the file that it leads to could be
  anyone's, and a FIFO is not waited for.
"""

import errno
import fcntl
import os
import stat
import time
from contextlib import suppress
from io import FileIO
from itertools import count
from pathlib import Path

from inl_core.errors import ArtefactError

_MOST_ATTEMPTS = 100


def open_lock(path: Path, *, make: bool = True) -> FileIO:
    """A lock file, opened but not locked; made when it is missing, unless `make` is False.

    Raises:
        ArtefactError: something other than a regular file has its name.
        OSError: it cannot be opened, or is missing and `make` is False.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if make else 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):  # a link, a directory, a socket
            raise _not_a_lock(path) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _not_a_lock(path)
    return os.fdopen(descriptor, "r+b", buffering=0)


def try_lock(file: FileIO, *, is_shared: bool = False, patience: float = 0.0) -> bool | None:
    """Lock a file. True if it is locked, False if another process has locked it, None where there are no locks.

    Args:
        patience: seconds to wait for another process to unlock it.
    """
    kind, end = fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX, time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                return None
            if time.monotonic() >= end:
                return False
        time.sleep(0.05)


def lock(path: Path, *, is_shared: bool = False, patience: float = 0.0) -> tuple[FileIO | None, bool]:
    """Lock a file for this process alone, or for all that share it; file and directory are made when they are missing.

    Returns the open file, which keeps the lock until it is closed, and whether it is locked, as some file systems have
    no locks; or (None, False) when another process has locked it.

    Raises:
        ArtefactError: something other than a regular file has its name.
        OSError: it cannot be made or written.
    """
    for attempt in count(1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open_lock(path)
        except FileNotFoundError:
            if attempt == _MOST_ATTEMPTS:
                raise
            continue  # the process that had the lock has just ended and removed the directory
        is_locked = try_lock(file, is_shared=is_shared, patience=patience)
        if is_locked is False:
            file.close()
            return None, False
        # The process that had the lock removes the file before it unlocks it, so this may be a file without a name.
        with suppress(FileNotFoundError):
            if os.path.samestat(path.stat(follow_symlinks=False), os.fstat(file.fileno())):
                return file, bool(is_locked)
        file.close()
    raise AssertionError("counting never ends")


def _not_a_lock(path: Path) -> ArtefactError:
    return ArtefactError(f"{path}: not a regular file, which a lock is; remove it")
