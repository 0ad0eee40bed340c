"""The bytes of a file, decompressed: bounded in memory, and in time by refusing what expands absurdly.

- Damage (a broken or unfinished stream) and disappearance are ArtefactErrors that name the file.
- Text compresses 3 to 50 times. What comes out EXPANSION times larger than it went in is a decompression bomb or
  damage, and would keep a preparation busy for hours.
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
"""A file may expand 200-fold, and to 256 MiB in any case."""
REPLACE = "replace the file or leave it out of the sources"


class Expansion:
    """Counts what comes out of a file of `packed_size` bytes."""

    def __init__(self, name: str, packed_size: int) -> None:
        self.name, self.packed_size, self.total = name, packed_size, 0

    def add(self, count: int) -> None:
        """Count `count` bytes more; ArtefactError when the file expands absurdly."""
        self.total += count
        if self.total > max(EXPANSION_FREE, EXPANSION * self.packed_size):
            raise ArtefactError(
                f"{self.name}: {self.packed_size:,} bytes expand to more than {self.total >> 20:,} MiB, which no text "
                f"does; {REPLACE}"
            )


class _Unpacked(io.RawIOBase):
    """A decompressed stream that counts what comes out."""

    def __init__(self, stream: Any, expansion: Expansion) -> None:
        self._stream, self._expansion = stream, expansion

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._expansion.add(count)
        return count


class _Zstd:
    """zstd frames one after another. The library's own reader ends silently where a frame is cut short."""

    def __init__(self, raw: IO[bytes], decompressor: Any) -> None:
        self._raw, self._decompressor = raw, decompressor
        self._frame = decompressor.decompressobj()
        self._started, self._packed, self._out = False, b"", memoryview(b"")

    def readinto(self, buffer: Any) -> int:
        while not self._out:
            # One small piece at a time: what it expands to is held in memory.
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
    """The file's bytes, decompressed (`compression` is gz, zst or None); ArtefactError when it is damaged or gone."""
    try:
        with open_regular(path) as raw:
            if compression is None:
                yield raw
                return
            expansion = Expansion(name, path.stat().st_size)
            stream = gzip.GzipFile(fileobj=raw) if compression == "gz" else _Zstd(raw, _decompressor(name))
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
    """The optional zstandard module, or how to install it."""
    try:
        import zstandard
    except ImportError:
        raise RecipeError(f'{name}: reading .zst needs zstandard: pip install "inl[compression]"') from None
    return zstandard


def _decompressor(name: str) -> Any:
    return import_zstandard(name).ZstdDecompressor()
