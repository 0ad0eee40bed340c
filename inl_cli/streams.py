"""stdin, stdout and stderr as every command can rely on them, whatever the shell, the locale or the disk.

- A stream that the caller closed (`>&-`) is first of all opened on /dev/null. Otherwise the next file to be opened
  would get the stream's number, and what a library prints would land in that file.
- A failed write to stderr is ignored: a training run outlives the terminal it was started from.
- A failed write to stdout, where data goes, is an OSError that names stdout; nothing is written there after it.
"""

import codecs
import io
import os
import sys
from typing import Any, TextIO


def prepare_streams() -> None:
    """Open what is closed, and let stdout and stderr write any text."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one
            os.set_inheritable(descriptor, True)
    _start_again_in_utf8()
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - for the life of the process
    sys.stdout = _opened(_Output(1, "wb", closefd=False), sys.stdout)
    sys.stderr = _opened(_Remarks(2, "wb", closefd=False), sys.stderr)


class _Output(io.FileIO):
    """Bytes to stdout; the first failure is raised, and what is written after it is dropped."""

    has_failed = False

    def write(self, data: Any) -> int:
        if self.has_failed:
            return memoryview(data).nbytes
        try:
            return super().write(data)
        except OSError as error:
            self.has_failed = True
            error.filename = "stdout"
            raise


class _Remarks(io.FileIO):
    """Bytes to stderr; they are dropped when it is gone: a closed terminal, a full disk, a reader that left."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or memoryview(data).nbytes
        except OSError:
            return memoryview(data).nbytes


def _opened(raw: io.FileIO, before: TextIO | None) -> TextIO:
    """A text stream over `raw`: in the terminal's encoding, but UTF-8 for files and pipes, as in every file of ours."""
    is_terminal = raw.isatty()
    is_told = before is not None and (is_terminal or "PYTHONIOENCODING" in os.environ)
    return io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=before.encoding if before is not None and is_told else "utf-8",
        errors="backslashreplace",  # for an old terminal, or a file name that is not UTF-8
        line_buffering=is_terminal or raw.fileno() == 2,
    )


def _start_again_in_utf8() -> None:
    """Under an ASCII locale whose UTF-8 mode was switched off, start this process again with it on.

    The mode can only be chosen at the start, and only it covers arguments, file names and the files libraries open.
    """
    is_ascii = codecs.lookup(sys.getfilesystemencoding()).name == "ascii"
    if is_ascii and os.environ.get("PYTHONUTF8") != "1" and sys.executable:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"PYTHONUTF8": "1"})
