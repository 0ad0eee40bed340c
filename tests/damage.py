"""Ways to damage files: whole files of any kind, single values of JSON, and headers of safetensors files.

for name, damage in WHOLE_FILE.items():
    damage(path)                                    # any file: cut short, a FIFO, a link to /dev/zero ...
put(path, "model.d_model", 10**9)                   # one value of a JSON file
edit_header(path, lambda header: header.popitem())  # a safetensors file, its data left as it is
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

Damage = Callable[[Path], None]


def replaced_by(content: bytes) -> Damage:
    """Puts other content into the file."""

    def damage(path: Path) -> None:
        _make_room(path).write_bytes(content)

    return damage


def linked_to(target: str) -> Damage:
    """Puts a symbolic link in the place of the file."""
    return lambda path: _make_room(path).symlink_to(target)


def cut_in_half(path: Path) -> None:
    """Cuts the file, as a full disk or a broken copy does."""
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path: Path) -> None:
    """Changes one bit, as a bad disk does; the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def append_a_byte(path: Path) -> None:
    """Adds a byte at the end."""
    path.write_bytes(path.read_bytes() + b"x")


def remove(path: Path) -> None:
    """Removes the file."""
    _make_room(path)


def fifo(path: Path) -> None:
    """Puts a FIFO in the place of the file: whoever opens it waits for a writer that never comes."""
    os.mkfifo(_make_room(path))


def directory(path: Path) -> None:
    """Puts a directory in the place of the file."""
    _make_room(path).mkdir()


def sparse_terabyte(path: Path) -> None:
    """Makes the file 10^12 bytes long; it takes no room on the disk."""
    path.write_bytes(b"")
    os.truncate(path, 10**12)


WHOLE_FILE: dict[str, Damage] = {
    "removed": remove,
    "empty": replaced_by(b""),
    "cut in half": cut_in_half,
    "a bit flipped": flip_a_bit,
    "a byte more": append_a_byte,
    "fifo": fifo,
    "directory": directory,
    "sparse terabyte": sparse_terabyte,
    "link to /dev/zero": linked_to("/dev/zero"),
    "link to itself": lambda path: linked_to(path.name)(path),
    "link to nothing": linked_to("no-such-file"),
}
"""Damage to a file of any kind."""

NOT_A_RECORD: dict[str, Damage] = {
    "not UTF-8": replaced_by(b'{"a": "\xff\xfe"}'),
    "array": replaced_by(b"[]"),
    "null": replaced_by(b"null"),
    "number": replaced_by(b"5"),
    "empty object": replaced_by(b"{}"),
    "deep array": replaced_by(b"[" * 100_000),
    "deep object": replaced_by(b'{"a":' * 100_000),
    "long number": replaced_by(b'{"a": ' + b"9" * 5_000 + b"}"),
    "NUL bytes": replaced_by(bytes(1_000)),
}
"""Content in the place of a JSON record that is not one."""


def put(path: Path, key: str, value: Any) -> None:
    """Set a value of a JSON file. `key` is a dotted path; names in it may hold dots: "files.config.json.bytes"."""
    record = json.loads(path.read_text(encoding="utf-8"))
    place: Any = record
    while (name := _next_key(place, key)) != key:
        place, key = place[_index(place, name)], key[len(name) + 1 :]
    place[_index(place, key)] = value
    path.write_text(json.dumps(record), encoding="utf-8")


def drop(path: Path, key: str) -> None:
    """Remove one top-level key of a JSON file."""
    record = json.loads(path.read_text(encoding="utf-8"))
    del record[key]
    path.write_text(json.dumps(record), encoding="utf-8")


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the header of a safetensors file, and keep the data that follows it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    write_header(path, json.dumps(header).encode(), content[8 + length :])


def write_header(path: Path, header: bytes, data: bytes = b"", *, length: int | None = None) -> None:
    """Write a safetensors file of these bytes; it says that its header is `length` long, by default the truth."""
    claimed = len(header) if length is None else length
    path.write_bytes(claimed.to_bytes(8, "little") + header + data)


def _make_room(path: Path) -> Path:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    return path


def _next_key(place: Any, rest: str) -> str:
    """The next key in the dotted path `rest`: of an object the longest that it has, otherwise up to the first dot."""
    if isinstance(place, dict):
        known = [name for name in place if rest == name or rest.startswith(name + ".")]
        if known:
            return max(known, key=len)
        return rest
    return rest.split(".")[0]


def _index(place: Any, name: str) -> int | str:
    return int(name) if isinstance(place, list) else name
