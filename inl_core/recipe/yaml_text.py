"""YAML text <-> plain values, with the line of every key.

- The rules are those of YAML 1.2, not of 1.1 as in PyYAML: `1e-3` is a number, `on` and `2024-01-01` are text.
- Underscores may group digits (`2_500_000`), and a number without a fraction is a whole one, as in `tokens: 1e9`.
- A key that is given twice is an error, where YAML would keep the last. So is a tag such as `!!binary`.
- Time and memory are bounded, by a limit on the depth and on the number of values that aliases stand for: a text of 400
  bytes can stand for a billion values.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from inl_core.errors import RecipeError
from inl_core.files import shortened

KeyPath = tuple[str | int, ...]

_SCALARS = (
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ("~", "n", "N", "")),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        r"^[-+]?(?:\.[0-9][0-9_]*|[0-9][0-9_]*(?:\.[0-9_]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf|INF)$"
        r"|^\.(?:nan|NaN|NAN)$",
        "-+.0123456789",
    ),
)
_LARGEST_EXACT_FLOAT = 2**53
_MOST_DIGITS = 400  # more than any float has; Python itself refuses numbers of thousands of digits
_MOST_VALUES = 20_000
_DEEPEST = 50
_PATTERNS = {tag: re.compile(pattern) for tag, pattern, _ in _SCALARS}
_CORE_TAGS = {*_PATTERNS, *(f"tag:yaml.org,2002:{name}" for name in ("str", "seq", "map"))}


class _Loader(yaml.SafeLoader):
    """The safe loader of PyYAML, with the scalars of YAML 1.2 and a bounded depth."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own name and form
    depth = num_nodes = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node and all below it; PyYAML calls itself here, once for each level."""
        self.depth += 1
        self.num_nodes += 1
        if self.depth > _DEEPEST or self.num_nodes > _MOST_VALUES:
            problem = f"more than {_DEEPEST} levels deep, or more than {_MOST_VALUES:,} values"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Writes quotes around text that YAML 1.1 or 1.2 would read as something else."""


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


@dataclass(frozen=True)
class Document:
    """Plain values and where each of them was written."""

    values: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    """Line, counted from 1, of every key and list item; that of the document is under the empty path."""


def parse_yaml(text: str, source: str) -> Document:
    """Read one YAML document; RecipeError says `source:line: what is wrong`."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
    except (ValueError, OverflowError):  # PyYAML calls chr() with the number of the character
        raise RecipeError(f"{source}: not valid YAML: an escape like \\UFFFFFFFF stands for no character") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise RecipeError(f"{place}: not valid YAML: {shortened(problem)}") from None
    reader = _Reader(loader, source)
    return Document(None if node is None else reader.read(node, ()), reader.lines)


def dump_yaml(values: Any) -> str:
    """Write plain values as YAML, keys in their order; `parse_yaml` reads the same values back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Reader:
    """Turns YAML nodes into plain values, and notes the line of each key."""

    def __init__(self, loader: _Loader, source: str) -> None:
        self.loader = loader
        self.source = source
        self.lines: dict[KeyPath, int] = {}
        self.num_values = 0
        self._open: set[int] = set()

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        self.num_values += 1
        if self.num_values > _MOST_VALUES or len(path) > _DEEPEST:
            problem = f"aliases make more than {_DEEPEST} levels, or more than {_MOST_VALUES:,} values"
            raise self._error(node, path, problem)
        if node.tag not in _CORE_TAGS:
            raise self._error(node, path, f"tag {shortened(node.tag, 60)!r} means nothing here; write a plain value")
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, path)
        if id(node) in self._open:
            raise self._error(node, path, "an alias contains itself")
        self._open.add(id(node))
        value = self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._sequence(node, path)
        self._open.discard(id(node))
        return value

    def _error(self, node: yaml.Node, path: KeyPath, problem: str) -> RecipeError:
        place = f"{self.source}:{node.start_mark.line + 1} {shortened('.'.join(map(str, path)))}"
        return RecipeError(f"{place.strip()}: {problem}")

    def _text(self, node: yaml.ScalarNode, path: KeyPath) -> str:
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            raise self._error(node, path, "half of a surrogate pair is no character")
        return node.value

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        kind, text = node.tag.rpartition(":")[2], node.value
        pattern = _PATTERNS.get(node.tag)
        if pattern and not pattern.match(text):
            raise self._error(node, path, f"{shortened(text, 60)!r} is tagged {kind} and is none")
        if kind in ("bool", "null"):
            return {"t": True, "f": False}.get(text[:1].lower())
        if kind == "str":
            return self._text(node, path)
        if len(text) > _MOST_DIGITS:
            raise self._error(node, path, f"a number of {len(text):,} digits; no key takes that many")
        if kind == "int":
            return int(text.replace("_", ""))  # PyYAML's own reads 010 as 8 and 1:30 as 90
        value = float(self.loader.construct_object(node))
        whole = abs(value) <= _LARGEST_EXACT_FLOAT and value.is_integer()
        return int(value) if whole else value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _CORE_TAGS:
                raise self._error(key_node, path, "a key must be a plain word")
            key = self._text(key_node, path)
            below = (*path, key)
            if key in values:
                raise self._error(key_node, below, f"given twice, first in line {self.lines[below]}")
            self.lines[below] = line
            values[key] = self.read(value_node, below)
        return values

    def _sequence(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
