"""YAML text <-> plain values, with the line of every key.

- YAML 1.2's core schema, not PyYAML's 1.1: `1e-3` is a number, `on` and `2024-01-01` are text.
- Underscores group digits (`2_500_000`), and a float without a fraction is a whole number, so `tokens: 1e9` is one.
- A key given twice is an error: YAML would silently keep the last.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from inl_core.errors import RecipeError

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


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2."""

    yaml_implicit_resolvers: dict[Any, Any] = {}  # noqa: RUF012 - PyYAML's own name and form


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would read as something else than text."""


for _tag, _pattern, _first in _SCALARS:
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))
    _Dumper.add_implicit_resolver(_tag, re.compile(_pattern), list(_first))


@dataclass(frozen=True)
class Document:
    """Plain values and where each of them was written."""

    values: Any
    lines: dict[KeyPath, int] = field(default_factory=dict)
    """Line (from 1) of every key and list item; the empty path is the document."""


def parse_yaml(text: str, source: str) -> Document:
    """Read one YAML document; RecipeError as `source:line: what is wrong`."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        reader = _Reader(loader, source)
        return Document(None if node is None else reader.read(node, ()), reader.lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise RecipeError(f"{place}: not valid YAML: {problem}") from None


def dump_yaml(values: Any) -> str:
    """Write plain values as YAML, keys in their order; `parse_yaml` reads the same values back."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Reader:
    """Turns YAML nodes into plain values and notes each key's line."""

    def __init__(self, loader: _Loader, source: str) -> None:
        self.loader = loader
        self.source = source
        self.lines: dict[KeyPath, int] = {}
        self._open: set[int] = set()

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        if id(node) in self._open:
            raise RecipeError(f"{self.source}:{node.start_mark.line + 1}: an alias contains itself")
        self._open.add(id(node))
        value = self._mapping(node, path) if isinstance(node, yaml.MappingNode) else self._sequence(node, path)
        self._open.discard(id(node))
        return value

    def _scalar(self, node: yaml.ScalarNode) -> Any:
        if node.tag == "tag:yaml.org,2002:int":
            return int(node.value.replace("_", ""))  # PyYAML's own reads 010 as 8 and 1:30 as 90
        if node.tag != "tag:yaml.org,2002:float":
            return self.loader.construct_object(node)
        value = float(self.loader.construct_object(node))
        whole = abs(value) <= _LARGEST_EXACT_FLOAT and value.is_integer()
        return int(value) if whole else value

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{self.source}:{line}: a key must be a plain word")
            key = key_node.value
            below = (*path, key)
            if key in values:
                dotted = ".".join(map(str, below))
                raise RecipeError(f"{self.source}:{line} {dotted}: given twice, first in line {self.lines[below]}")
            self.lines[below] = line
            values[key] = self.read(value_node, below)
        return values

    def _sequence(self, node: yaml.Node, path: KeyPath) -> list[Any]:
        return [self.read(item, (*path, index)) for index, item in enumerate(node.value)]
