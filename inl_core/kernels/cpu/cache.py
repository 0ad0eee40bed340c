"""Compiled code kept from one process to the next: only this user's, and what is loaded is what was checked.

- In $XDG_CACHE_HOME/inl, else ~/.cache/inl. The directory and the file are opened once, no link followed, and every
  question is asked of what was opened: it must be this user's, and nobody else may be allowed to write to it. So it
  does not matter who may write to the directories above.
- A file ends with a checksum of its name and its code: one that was cut short, damaged or renamed is found before it is
  loaded. (A library cut short would end the process by a signal.)
- The bytes that were checked are loaded from memory of this process: nobody can change them in between.
"""

import ctypes
import errno
import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inl_core.errors import ExecutionWarning

_MOST_BYTES = 64 << 20
"""A file larger than this is not read; the library is below one MB."""
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not hold us up


class Refused(Exception):
    """Why something in the cache is not used, in one line with the fix."""


def find(prefix: str, endings: list[str]) -> bytes | None:
    """The code of the first good file called `prefix` and one of the endings; of any ending, where none are given.

    What is there and refused is warned of.
    """
    try:
        with _directory() as (path, directory):
            names = [prefix + ending for ending in endings]
            there = os.listdir(directory)  # noqa: PTH208 - of the open descriptor
            for name in names or sorted(name for name in there if name.startswith(prefix)):
                try:
                    return _read(path / name, directory)
                except FileNotFoundError:
                    continue
                except Refused as refused:
                    _warn(refused)
    except Refused as refused:
        _warn(refused)
    except OSError:  # no home, no such directory, a disk that fails
        return None
    return None


def keep(name: str, code: bytes) -> None:
    """Write a file aside and move it into place whole: ranks that start together may all do so.

    Where the cache cannot be used nothing is kept, and the next process compiles the code again.
    """
    aside = f".build-{os.urandom(8).hex()}"
    try:
        with _directory(make=True) as (_, directory):
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _FLAGS
                with os.fdopen(os.open(aside, flags, 0o600, dir_fd=directory), "wb") as file:
                    file.write(code + _checksum(name, code))
                    file.flush()
                    os.fsync(file.fileno())  # the name must never stand before its contents
                os.replace(aside, name, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError:  # a full disk
                os.unlink(aside, dir_fd=directory)
    except (OSError, Refused):
        return


def load(code: bytes) -> ctypes.CDLL:
    """The library of these bytes, from memory without a name or a directory that only this user can open.

    Raises:
        OSError: they are no library that this machine can load.
    """
    try:
        descriptor = os.memfd_create("inl-native", os.MFD_CLOEXEC)
        with open(descriptor, "wb", closefd=False) as file:
            file.write(code)
        # It stays open: the loader knows libraries by their path, and another one must never get this one's.
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    except (AttributeError, OSError):  # a Python or a system without; no /proc
        with tempfile.TemporaryDirectory(prefix="inl-") as private:
            path = Path(private) / "native.so"
            path.write_bytes(code)
            return ctypes.CDLL(str(path))  # stays in memory when its file is gone


def cache_directory() -> Path:
    """Where the files are; a relative $XDG_CACHE_HOME is ignored, as its standard demands. OSError without a home."""
    try:
        chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
        return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "inl"
    except RuntimeError as error:
        raise OSError(str(error)) from error


@contextmanager
def _directory(*, make: bool = False) -> Iterator[tuple[Path, int]]:
    """The cache's directory, open; with `make` it is made, or closed to others where it is this user's."""
    path = cache_directory()
    if make:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
    except OSError as error:
        raise _explained(path, error) from None
    try:
        found = os.fstat(descriptor)
        if make and found.st_uid == os.getuid() and _is_open_to_others(found):
            os.fchmod(descriptor, 0o700)
            found = os.fstat(descriptor)
        _check_owner(path, found)
        yield path, descriptor
    finally:
        os.close(descriptor)


def _read(path: Path, directory: int) -> bytes:
    """The code of one file of the open directory."""
    try:
        descriptor = os.open(path.name, os.O_RDONLY | _FLAGS, dir_fd=directory)
    except OSError as error:
        raise _explained(path, error) from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise Refused(f"{path}: not a file; remove it")
        _check_owner(path, found)
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(_MOST_BYTES)
    finally:
        os.close(descriptor)
    code, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if checksum != _checksum(path.name, code):
        raise Refused(f"{path}: damaged; remove it")
    return code


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.getuid():
        raise Refused(f"{path}: belongs to another user; set XDG_CACHE_HOME to a directory of your own")
    if _is_open_to_others(found):
        raise Refused(f"{path}: other users may write to it; chmod go-w it")


def _is_open_to_others(found: os.stat_result) -> bool:
    return bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))


def _explained(path: Path, error: OSError) -> Exception:
    """The reason for a link, which is refused; the error itself for anything else."""
    if error.errno in (errno.ELOOP, errno.ENOTDIR) and path.is_symlink():
        return Refused(f"{path}: a link; put the directory or file itself there, or set XDG_CACHE_HOME")
    return error


def _checksum(name: str, code: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + code).digest()


def _warn(refused: Refused) -> None:
    warnings.warn(f"compiled code is not taken from {refused}", ExecutionWarning, stacklevel=4)
