"""How files of JSON and text are read, and how small files are written, everywhere in this project.

- Only regular files are read (a FIFO or /dev/zero would never end), up to a limit of bytes, and always as UTF-8.
- Whatever is wrong with a file is told by an ArtefactError of one line that names the file.
- A file is written whole or not at all: a full disk or a kill leaves the file that was there before.
"""

import json
import os
import re
import select
import stat
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, TypeVar

from inl_core.errors import ArtefactError, RecipeError

if TYPE_CHECKING:
    from pydantic import BaseModel

    Record = TypeVar("Record", bound=BaseModel)

ASIDE = ".tmp"
"""The end of the name of a file that is not whole yet. Such a file that a kill left behind may be removed."""
RECORD_LIMIT = 64 << 20
"""Bytes. A JSON record may not be larger; real configurations, manifests and tokenizers are far smaller."""

_REMOTE = re.compile("[A-Za-z][A-Za-z0-9+.-]+:/")  # Path("s3://bucket") is written s3:/bucket
_LONGEST_SILENCE = 10
"""Seconds to wait for someone to write to a FIFO."""


def open_regular(path: Path, *, allow_pipe: bool = False) -> BufferedReader:
    """Open a regular file for reading, or a FIFO with `allow_pipe`; links are followed.

    Raises:
        ArtefactError: it is missing, cannot be read, or is a directory, a FIFO or a device.
    """
    try:
        # Without O_NONBLOCK, opening a FIFO that nobody writes to would wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ArtefactError(f"{path}: missing") from None
    except OSError as error:
        raise ArtefactError(f"{path}: cannot be read: {error.strerror or error}") from None
    except ValueError:  # a NUL byte in the name
        raise ArtefactError(f"{str(path)!r}: not a file name") from None
    mode = os.fstat(descriptor).st_mode
    if not (stat.S_ISREG(mode) or (allow_pipe and stat.S_ISFIFO(mode))):
        os.close(descriptor)
        raise ArtefactError(f"{path}: {_kind(mode)}, not a file; put the real file in its place")
    return os.fdopen(descriptor, "rb")


def is_directory(path: Path) -> bool:
    """Whether the path is a directory or a link to one; False also for impossible names and for loops of links."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_bytes(path: Path, *, limit: int = RECORD_LIMIT, allow_pipe: bool = False) -> bytes:
    """The bytes of a regular file, or with `allow_pipe` of a FIFO; ArtefactError when there are more than `limit`."""
    with open_regular(path, allow_pipe=allow_pipe) as file:
        try:
            is_pipe = stat.S_ISFIFO(os.fstat(file.fileno()).st_mode)
            # The size alone does not limit what is read: a file may grow, and files in /proc have no size.
            is_large = os.fstat(file.fileno()).st_size > limit
            data = _read_pipe(file.fileno(), path, limit) if is_pipe else (b"" if is_large else file.read(limit + 1))
        except OSError as error:
            raise ArtefactError(f"{path}: cannot be read: {error.strerror or error}") from None
    if is_large or len(data) > limit:
        raise ArtefactError(f"{path}: larger than {limit:,} bytes, which no such file is; put back the real one")
    return data


def read_text(path: Path, *, limit: int = RECORD_LIMIT) -> str:
    """The UTF-8 text of a regular file of at most `limit` bytes; ArtefactError when it is anything else."""
    try:
        return read_bytes(path, limit=limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ArtefactError(f"{path}: not UTF-8 text (byte {error.start:,}: {error.reason})") from None


def parse_json_object(text: str, source: str) -> dict[str, Any]:
    """The JSON object in a text; ArtefactError, which begins with `source`, when it is anything else."""
    try:
        value = json.loads(text, object_pairs_hook=without_repeated_keys)
    except RecursionError:
        raise ArtefactError(f"{source}: nested too deeply") from None
    except ValueError as error:
        raise ArtefactError(f"{source}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ArtefactError(f"{source}: holds a JSON {type(value).__name__} where an object belongs")
    return value


class RepeatedKey(ValueError):
    """A key stands twice in one JSON object."""


def without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For json's object_pairs_hook: RepeatedKey when two values have one key, as nothing says which was meant."""
    values = dict(pairs)
    if len(values) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise RepeatedKey(f"the key {key!r} stands twice in one object")
    return values


def read_json(path: Path, *, limit: int = RECORD_LIMIT) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes; ArtefactError when it is anything else."""
    return parse_json_object(read_text(path, limit=limit), str(path))


def read_record(path: Path, model: "type[Record]", *, limit: int = RECORD_LIMIT) -> "Record":
    """The JSON object in a file as a pydantic model; ArtefactError names the file and the first key that is wrong."""
    from pydantic import ValidationError

    values = read_json(path, limit=limit)
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise ArtefactError(f"{path}: damaged: {where}: {first['msg']}") from None


def entry_path(directory: Path, name: str) -> Path:
    """The path of the file that a manifest in `directory` calls `name`.

    Raises:
        ArtefactError: the name is absolute or leads out of the directory.
    """
    parts = PurePosixPath(name)
    is_outside = parts.is_absolute() or PureWindowsPath(name).drive or ".." in parts.parts or "\0" in name
    if is_outside or not parts.parts:
        raise ArtefactError(f"{directory}: its manifest names the file {name!r}, which is not inside the directory")
    return directory / parts


def refuse_filled(output: Path) -> None:
    """RecipeError where `--output` names something that is neither new nor an empty directory."""
    if os.path.lexists(output) and not (is_directory(output) and not any(output.iterdir())):
        raise RecipeError(f"--output {output}: exists and is not an empty directory; name a new one")


HTML = b"<!doctype html"
"""How a page begins, and with it what a page may replace."""
SCRIPT = b"#!"
"""How a job script begins."""


def output_file(path: Path, begins: bytes = b"") -> Path:
    """The file that `--output` names, behind all links: `write_whole` puts a new file in the place of what is there.

    Args:
        begins: how a file must begin to be replaced, case aside, so that no recipe is lost to a mistyped name.

    Raises:
        RecipeError: there is something else than such a file, which would be lost, or the place cannot be looked at.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):  # a new file; a directory that is missing is told on writing
        return Path(os.path.realpath(path))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written: {error.strerror or error}") from None
    if not stat.S_ISREG(mode):
        raise RecipeError(f"{path}: is {_kind(mode)}; --output names a file, which is replaced, or a new one")
    if begins:
        with open_regular(path) as file:
            start = file.read(len(begins))
        if start and start.lower() != begins:
            raise RecipeError(
                f"{path}: does not begin with {begins.decode()}, so it is no earlier output and is not replaced; "
                "name another file in --output, or remove it"
            )
    return Path(os.path.realpath(path))


def refuse_no_directory(path: Path, option: str) -> None:
    """RecipeError where `option` names a directory that cannot be made, as a file or a link to nothing is there."""
    there = next((place for place in (path, *path.parents) if os.path.lexists(place)), None)
    if there is not None and not is_directory(there):
        what = "a file" if there.exists() else "a link that leads nowhere"
        raise RecipeError(f"{there}: is {what}; {option} names a directory")


def expand_home(path: str | os.PathLike[str]) -> Path:
    """The path with the home directory for `~` or `~user` at its start, which shells keep behind `=` and in quotes.

    Raises:
        RecipeError: there is no such user, or no home directory is known; or the path is a URL.
    """
    refuse_remote(path)
    try:
        return Path(path).expanduser()
    except RuntimeError:
        name = shortened(str(path))
        raise RecipeError(f"{name}: no home directory is known for it; write ./{name} if a file is meant") from None


def refuse_remote(path: str | os.PathLike[str]) -> None:
    """RecipeError when the path is a URL: without this, s3://bucket/x would be taken for a directory named `s3:`."""
    text = os.fspath(path)
    if _REMOTE.match(text):
        raise RecipeError(
            f"{shortened(text)}: a URL; only paths of this machine are read and written, so mount that storage, or "
            "copy the files here"
        )


def shortened(text: str, longest: int = 200) -> str:
    """The text for a message, with its middle cut out when it is long."""
    return text if len(text) <= longest else f"{text[: longest // 2]}...{text[-longest // 4 :]}"


def write_whole(path: Path, data: str | bytes) -> None:
    """Write a small file under another name, bring it to the disk, and give it its name; text is written as UTF-8.

    Several processes may do this at once, as each has another name of its own.

    Raises:
        OSError: it could not be written; its `filename` is `path`, and what was there before is untouched.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    aside: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            prefix=f".{path.name[:100]}.", suffix=ASIDE, dir=path.parent, delete=False
        ) as file:
            aside = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.chmod(0o666 & ~umask())  # only its owner may read a temporary file
        aside.replace(path)
    except BaseException as error:
        if aside is not None:
            aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None
        raise
    sync_directory(path.parent)


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """Gives another name to write the file under. It is then brought to the disk and gets its name `path`.

    The file is removed if anything fails. Only one process may do this at a time; `write_whole` is for several.

    Raises:
        OSError: it could not be written; its `filename` is `path`.
    """
    aside = path.with_name(path.name + ASIDE)
    try:
        aside.unlink(missing_ok=True)  # if a link stood there, the file that it leads to would be written
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException as error:
        if isinstance(error, OSError) and error.filename in (None, str(aside)):
            error.filename, error.filename2 = str(path), None
        with suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def write_text_aside(path: Path, text: str) -> None:
    """Write a text file by `written_aside`, with line ends as they are in the text."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8", newline="\n")


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Gives any OSError in the block `path` for its file name: a library in C++ may give none."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


def describe_os_error(error: OSError) -> str:
    """The error as `file: what the system says`."""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}"


def append_line(path: Path, line: str) -> None:
    """Append one line of UTF-8 text, whole or not at all; where the last line was cut short, it is ended first.

    Raises:
        OSError: it could not be written; the file is as long as it was before.
    """
    with path.open("a+b", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        is_torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
        data = memoryview(b"\n" * is_torn + line.encode("utf-8") + b"\n")
        try:
            while data:  # a disk that fills up takes a part and refuses the rest
                data = data[file.write(data) :]
        except BaseException:
            file.truncate(end)
            raise


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def umask() -> int:
    """The rights that new files of this process lack."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _read_pipe(descriptor: int, path: Path, limit: int) -> bytes:
    """What is written to a FIFO until it is closed, or a little more than `limit`; ArtefactError when nobody writes."""
    poll, data = select.poll(), b""
    poll.register(descriptor, select.POLLIN)
    while len(data) <= limit:
        if not poll.poll(_LONGEST_SILENCE * 1000):
            raise ArtefactError(f"{path}: a FIFO to which nobody wrote for {_LONGEST_SILENCE} seconds")
        piece = os.read(descriptor, 1 << 16)
        if not piece:
            break
        data += piece
    return data


def _kind(mode: int) -> str:
    names = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    return names.get(stat.S_IFMT(mode), "a device")
