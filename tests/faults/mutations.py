"""Damages by chance, beside the fixed ones of tests/damage.py: bytes, values of JSON, lines, YAML, tensors, shards."""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tests.damage import NOT_A_RECORD, WHOLE_FILE, edit_header, replaced_by, write_header

Mutation = Callable[[Path, random.Random], object]


def certain(damage: Callable[[Path], None]) -> Mutation:
    """A damage that leaves nothing to chance."""
    return lambda path, dice: damage(path)


def edited(change: Callable[[bytearray, random.Random], object]) -> Mutation:
    """The file with its bytes changed in place."""

    def mutate(path: Path, dice: random.Random) -> None:
        content = bytearray(path.read_bytes())
        change(content, dice)
        path.write_bytes(content)

    return mutate


def _flip(content: bytearray, dice: random.Random) -> None:
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def _zero(content: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(content))
    end = min(len(content), start + max(1, len(content) // 8))
    content[start:end] = bytes(byte ^ 0x55 if byte == 0 else 0 for byte in content[start:end])  # never the same bytes


def _shift(content: bytearray, dice: random.Random) -> None:
    del content[dice.randrange(len(content))]
    content.append(dice.randrange(256))


def swapped_with(other: str) -> Mutation:
    """Another file of the same directory in its place."""
    return lambda path, dice: shutil.copy(path.parent / other, path)


BYTES: dict[str, Mutation] = {name: certain(damage) for name, damage in WHOLE_FILE.items()} | {
    "flip anywhere": edited(_flip),
    "zeros": edited(_zero),
    "a byte lost": edited(_shift),
    "cut anywhere": lambda path, dice: os.truncate(path, dice.randrange(path.stat().st_size)),
    "twice": edited(lambda content, dice: content.extend(content)),
    "noise": edited(lambda content, dice: content.__setitem__(slice(None), dice.randbytes(len(content)))),
}
"""For any file."""

_STRANGE = (
    *(None, True, -1, 0, 4_000_000_000, 10**400, 1e308, float("nan"), 0.5, "", "text", "../../etc/passwd", "/dev/zero"),
    *([], {}, [[]], [None], {"a": {}}, "\0", "9" * 6000, [0] * 1000),
)


def strange_value(path: Path, dice: random.Random) -> None:
    """One value, anywhere in a JSON file, becomes one that nobody wrote."""
    record = json.loads(path.read_text(encoding="utf-8"))
    places = list(_places(record))
    place, key = dice.choice(places)
    place[key] = dice.choice(_STRANGE)
    path.write_text(json.dumps(record), encoding="utf-8")


def lost_value(path: Path, dice: random.Random) -> None:
    """One key or element, anywhere in a JSON file, is gone."""
    record = json.loads(path.read_text(encoding="utf-8"))
    place, key = dice.choice(list(_places(record)))
    del place[key]
    path.write_text(json.dumps(record), encoding="utf-8")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place below a JSON value, shallow ones as often as the many deep ones of a long list."""
    items = list(value.items()) if isinstance(value, dict) else list(enumerate(value[:20]))
    for key, inner in items:
        yield value, key
        if isinstance(inner, dict | list) and inner:
            yield from _places(inner)


JSON: dict[str, Mutation] = {name: certain(damage) for name, damage in NOT_A_RECORD.items()}
JSON |= {f"strange value {number}": strange_value for number in range(1, 5)}
JSON |= {f"lost value {number}": lost_value for number in range(1, 3)}
"""For a file of one JSON object."""
RECORD: dict[str, Mutation] = BYTES | JSON
"""Everything for such a file."""


def _lines(change: Callable[[list[bytes], random.Random], object]) -> Mutation:
    def mutate(path: Path, dice: random.Random) -> None:
        lines = path.read_bytes().splitlines()
        change(lines, dice)
        path.write_bytes(b"\n".join(lines) + b"\n")

    return mutate


_BAD_LINES = {
    "a torn line": b'{"step": 7, "lo',
    "an array line": b"[1, 2]",
    "a null line": b"null",
    "a bytes line": b"\xff\xfe\x00",
    "a deep line": b"[" * 100_000,
    "a wrong step": b'{"step": "seven", "loss": 1.0}',
    "a huge step": b'{"step": 1e400, "loss": null, "text": 3}',
    "a list of step": b'{"step": [1], "validation_bits_per_byte": "x", "text": {}}',
    "no step": b'{"loss": 2.0}',
}
LINES: dict[str, Mutation] = BYTES | {
    name: _lines(lambda lines, dice, line=line: lines.insert(dice.randrange(len(lines)), line))
    for name, line in _BAD_LINES.items()
}
"""For a file of one JSON object a line."""

_HOSTILE_YAML = {
    "a tag of Python": "!!python/object/apply:os.system [echo hello]\n",
    "an integer of text": 'name: x\ntraining: {steps: !!int "abc"}\n',
    "a date": "name: 2020-13-45\n",
    "binary": "name: !!binary x\n",
    "5,000 digits": f"training: {{steps: {'9' * 5000}}}\n",
    "deep lists": "[" * 20_000 + "\n",
    "deep mappings": "{a: " * 5_000 + "\n",
    "an alias bomb": "a: &a [x,x,x,x,x,x,x,x,x]\n"
    + "".join(
        f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
    ),
    "an alias of itself": "a: &a [*a]\n",
    "two documents": "name: a\n---\nname: b\n",
    "a key twice": "name: a\nname: b\n",
    "a list for a key": "? [a, b]\n: c\n",
    "a tab": "name:\tx\n\ttraining: {}\n",
    "a huge width": "name: x\nmodel: {preset: v4, d_model: 1000000000000}\ntraining: {steps: 1}\n",
    "huge iterations": "name: x\nmodel: {preset: v4, integrator: {num_iterations: 1000000000}}\ntraining: {steps: 1}\n",
    "not a number": "name: x\ntraining: {steps: 10, optimizer: {learning_rate: .nan}}\n",
    "an infinity": "name: x\ntraining: {steps: .inf}\n",
    "a merge of text": "<<: text\nname: x\n",
}
YAML: dict[str, Mutation] = BYTES | {name: certain(replaced_by(text.encode())) for name, text in _HOSTILE_YAML.items()}
"""For a recipe."""

TENSORS: dict[str, Mutation] = BYTES | {
    "header too long": certain(lambda path: write_header(path, b"{}", length=1 << 62)),
    "header of nothing": certain(lambda path: write_header(path, b"{}")),
    "header cut": certain(lambda path: write_header(path, b'{"a": {"dtype"', b"x" * 100)),
    "header deep": certain(lambda path: write_header(path, b"[" * 100_000)),
    "a tensor lost": certain(lambda path: edit_header(path, lambda header: header.popitem())),
    "another type": certain(lambda path: edit_header(path, lambda h: _first(h).update(dtype="I32"))),
    "another shape": certain(lambda path: edit_header(path, lambda h: _first(h).update(shape=[1 << 40, 1 << 40]))),
    "offsets astray": certain(lambda path: edit_header(path, lambda h: _first(h).update(data_offsets=[0, 1 << 50]))),
}
"""For a safetensors file."""


def _first(header: dict[str, Any]) -> dict[str, Any]:
    return next(value for key, value in header.items() if key != "__metadata__")


def _tokens_changed(change: Callable[[np.ndarray], np.ndarray]) -> Mutation:
    """A shard that is a valid Arrow file of the same shape, with other tokens."""

    def mutate(path: Path, dice: random.Random) -> None:
        table = pa.ipc.open_file(pa.BufferReader(path.read_bytes())).read_all().combine_chunks()
        old = table["tokens"].chunk(0)
        tokens = pa.array(change(old.values.to_numpy().copy()))
        column = pa.LargeListArray.from_arrays(old.offsets, tokens)
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table.set_column(0, "tokens", column))

    return mutate


SHARD: dict[str, Mutation] = BYTES | {
    "one valid token everywhere": _tokens_changed(lambda tokens: np.full_like(tokens, 70)),
    "tokens beyond the vocabulary": _tokens_changed(lambda tokens: np.full_like(tokens, 65_535)),
    "tokens turned round": _tokens_changed(lambda tokens: tokens[::-1].copy()),
}
"""For a shard."""
