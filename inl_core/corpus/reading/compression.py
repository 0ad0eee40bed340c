"""The bytes of a file, unpacked where it is packed: in bounded memory, and in bounded time.

- A damaged or unfinished file, or one that disappears, raises an ArtefactError that names it.
- Text compresses 3 to 50 times. A file that unpacks to EXPANSION times its size is damaged or a decompression bomb,
  and would keep a preparation busy for hours: it is refused.
"""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from inl_core.errors import ArtefactError, RecipeError
from inl_core.files import open_regular

EXPANSION, EXPANSION_FREE = 200, 1 << 28
"""A file may unpack to 200 times its size, and to 256 MiB whatever its size."""
REPLACE = "replace the file or leave it out of the sources"


class Expansion:
    """Counts the bytes that come out of a file of `packed_size` bytes."""

    def __init__(self, name: str, packed_size: int) -> None:
        self.name, self.packed_size, self.total = name, packed_size, 0

    def add(self, count: int) -> None:
        """Count `count` bytes more; ArtefactError when they have become too many."""
        self.total += count
        if self.total > max(EXPANSION_FREE, EXPANSION * self.packed_size):
            raise ArtefactError(
                f"{self.name}: {self.packed_size:,} bytes expand to more than {self.total >> 20:,} MiB, which no text "
                f"does; {REPLACE}"
            )


class _Unpacked(io.RawIOBase):
    """A stream of unpacked bytes that counts them."""

    def __init__(self, stream: Any, expansion: Expansion) -> None:
        self._stream, self._expansion = stream, expansion

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._expansion.add(count)
        return count


class _Zstd:
    """Unpacks zstd frames that follow one another.

    The library's own reader ends without an error where a frame is cut short.
    """

    def __init__(self, raw: IO[bytes], decompressor: Any) -> None:
        self._raw, self._decompressor = raw, decompressor
        self._frame = decompressor.decompressobj()
        self._started, self._packed, self._out = False, b"", memoryview(b"")

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            # A small piece at a time, since all that it unpacks to is held in memory.
            self._packed = self._packed or self._raw.read(1 << 11)
            if not self._packed:
                if self._started:
                    raise EOFError("it ends inside a frame")
                return 0
            self._out = memoryview(self._frame.decompress(self._packed))
            self._started, self._packed = True, b""
            if self._frame.eof:
                self._packed = self._frame.unused_data
                self._frame, self._started = self._decompressor.decompressobj(), False
        count = min(len(buffer), len(self._out))
        buffer[:count] = self._out[:count]
        self._out = self._out[count:]
        return count


@contextmanager
def opened(path: Path, compression: str | None, name: str) -> Iterator[IO[bytes]]:
    """A stream of the file's unpacked bytes; `compression` is gz, zst or None.

    Raises:
        ArtefactError: the file is damaged, cannot be read or unpacks to too much.
    """
    try:
        with open_regular(path) as raw:
            if compression is None:
                yield raw
                return
            expansion = Expansion(name, path.stat().st_size)
            if compression == "gz":
                stream = gzip.GzipFile(fileobj=raw)
            else:
                stream = _Zstd(raw, import_zstandard(name).ZstdDecompressor())
            yield io.BufferedReader(_Unpacked(stream, expansion), 1 << 20)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        kind = "gzip" if compression == "gz" else "zstd"
        raise ArtefactError(f"{name}: damaged {kind} data ({error}); {REPLACE}") from None
    except OSError as error:
        raise ArtefactError(f"{name}: cannot be read: {error.strerror or error}") from None
    except Exception as error:
        if compression == "zst" and isinstance(error, import_zstandard(name).ZstdError):
            raise ArtefactError(f"{name}: damaged zstd data, or packed with --long ({error}); {REPLACE}") from None
        raise


def import_zstandard(name: str) -> Any:
    """The optional zstandard module; RecipeError says how to install it for the file `name`."""
    try:
        import zstandard
    except ImportError:
        raise RecipeError(f'{name}: reading .zst needs zstandard: pip install "inl[compression]"') from None
    return zstandard
