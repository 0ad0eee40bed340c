"""Working files that a restart goes on from: each has its digest in a file beside it, and is read only if it fits.

A file that was damaged on the disk would otherwise become a data set that differs from its sources, while all that its
manifest says is true.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from inl_core.errors import ArtefactError
from inl_core.files import open_regular, read_record, read_text, write_whole, written_aside

Record = TypeVar("Record", bound=BaseModel)

_LONGEST_RECORD = 1 << 30
"""Bytes. A plan names every source file, of which there may be millions."""


class DamagedWork(ArtefactError):
    """A working file is not as it was written, so the work has to be done again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        super().__init__(f"{path}: damaged working file; delete {path.parent} and run again")


@contextmanager
def sealed_aside(path: Path) -> Iterator[Path]:
    """As `written_aside`, and the digest is on the disk before the file gets its name."""
    with written_aside(path) as aside:
        yield aside
        write_whole(_seal(path), _digest(aside))


def write_sealed(path: Path, text: str) -> None:
    """Write a text file with its digest."""
    with sealed_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


def remove_sealed(path: Path) -> None:
    """Remove a file and its digest."""
    path.unlink(missing_ok=True)
    _seal(path).unlink(missing_ok=True)


def check_seal(path: Path) -> None:
    """DamagedWork unless the file has the digest that it was written with."""
    try:
        is_whole = read_text(_seal(path), limit=1000) == _digest(path)
    except (ArtefactError, OSError):
        is_whole = False
    if not is_whole:
        raise DamagedWork(path)


def read_sealed(path: Path, model: type[Record]) -> Record | None:
    """A record, or None when there is no such file; DamagedWork when the file is not as it was written."""
    if not os.path.lexists(path):
        return None
    check_seal(path)
    try:
        return read_record(path, model, limit=_LONGEST_RECORD)
    except ArtefactError:  # another version of this code wrote it
        raise DamagedWork(path) from None


def _seal(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
