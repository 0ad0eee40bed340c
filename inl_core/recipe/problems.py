"""What pydantic finds wrong with a recipe -> a message for each problem: the value, what is expected, the nearest name.

For example `unknown key; did you mean 'num_iterations'?`, before which load.py puts the file, the line and the key.
"""

import json
import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import islice, takewhile
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from inl_core.files import shortened
from inl_core.recipe.yaml_text import KeyPath

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a file path",
    "literal_error": "{expected}",
    "greater_than": "a number greater than {gt}",
    "greater_than_equal": "a number of at least {ge}",
    "less_than": "a number less than {lt}",
    "less_than_equal": "a number of at most {le}",
    "string_pattern_mismatch": "text that matches {pattern}",
    "string_too_long": "at most {max_length} characters",
    "tuple_type": "a list",
    "list_type": "a list",
    "too_long": "at most {max_length} values",
    "too_short": "at least {min_length} values",
}
_SHOWN_CHARACTERS = 60

MOST_PROBLEMS = 30
"""The most problems of one recipe that are told."""


def find_problems(error: ValidationError, root: type[BaseModel]) -> dict[KeyPath, str]:
    """Path -> what is wrong there, for the first problems. What the members of a union say becomes one message."""
    findings: dict[KeyPath, list[ErrorDetails]] = {}
    for finding in error.errors(include_url=False):
        findings.setdefault(_without_union_tags(finding["loc"], root), []).append(finding)
    return {path: _message(path, group, root) for path, group in islice(findings.items(), MOST_PROBLEMS)}


def section_at(root: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    """The class of the section at `path`, or None when there is no section at this path."""
    section: type[BaseModel] | None = root
    for part in path:
        if section is None or part not in section.model_fields:
            return None
        section = _section_of(section.model_fields[str(part)].annotation)
    return section


def unknown_key(path: KeyPath, root: type[BaseModel]) -> str:
    """What to say of a key that does not exist: the nearest key in this section or another, or all keys of this one."""
    key, section = str(path[-1]), section_at(root, path[:-1])
    here = list(section.model_fields) if section else []
    elsewhere = [other for other in _all_paths(root) if other[:-1] != path[:-1]]
    names = [str(other[-1]) for other in elsewhere]
    if key not in names and (near := get_close_matches(key, here, n=1)):
        return f"unknown key; did you mean '{near[0]}'?"
    if near := get_close_matches(key, names, n=1, cutoff=0.7):  # the key itself where it is one of them
        candidates = [other for other in elsewhere if other[-1] == near[0]]
        shared = max(_num_shared(other, path) for other in candidates)
        nearest = [f"'{dotted(other)}'" for other in candidates if _num_shared(other, path) == shared]
        return f"unknown key; did you mean {' or '.join(nearest)}?"
    return f"unknown key; the keys here are {', '.join(here)}" if here else "unknown key"


def did_you_mean(name: str, valid: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`; did you mean 'small'?`, or nothing where no valid name is near. Capital letters count as small ones."""
    by_lower = {other.lower(): other for other in valid}
    near = get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return f"; did you mean '{by_lower[near[0]]}'?" if near else ""


def dotted(path: KeyPath) -> str:
    """A path as text: `model.integrator.dt`. Very long names, which no real key has, are cut."""
    return shortened(".".join(map(str, path)))


def shown(value: Any) -> str:
    """A value as a user would write it, on one line, and cut when it is long."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _message(path: KeyPath, group: list[ErrorDetails], root: type[BaseModel]) -> str:
    kind, value = group[0]["type"], group[0].get("input")
    if kind == "extra_forbidden":
        return unknown_key(path, root)
    if kind == "value_error":
        return "; ".join(str(finding.get("ctx", {}).get("error", finding["msg"])) for finding in group)
    section = section_at(root, path)
    if section is not None:
        keys = ", ".join(section.model_fields)
        found = (
            "missing" if kind == "missing" else "empty" if value is None else f"expected a section, got {shown(value)}"
        )
        return f"{found}; its keys are {keys}"
    if kind == "missing":
        return "missing: the list is too short" if isinstance(path[-1], int) else f"missing; {_purpose(path, root)}"
    expected = " or ".join(dict.fromkeys(_expected(finding) for finding in group))
    expected = expected.replace("true or false or ", "true, false, ")
    return f"expected {expected}, got {shown(value)}{_hint(value, group)}"


def _expected(finding: ErrorDetails) -> str:
    template = _EXPECTED.get(finding["type"])
    if template is None:
        return finding["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    return template.format(**finding.get("ctx", {}))


def _hint(value: Any, group: list[ErrorDetails]) -> str:
    kinds = {finding["type"] for finding in group}
    if not isinstance(value, str):
        return " (text goes in quotes)" if "string_type" in kinds and isinstance(value, (int, float)) else ""
    if kinds & {"int_type", "float_type"} and re.fullmatch(r"[-+]?[0-9_]*\.?[0-9]+([eE][-+]?[0-9]+)?", value):
        return " (text: remove the quotes)"
    if kinds & {"tuple_type", "list_type"}:
        return f"; write [{value}]"
    choices = " ".join(str(finding.get("ctx", {}).get("expected", "")) for finding in group)
    return did_you_mean(value, re.findall(r"'([^']*)'", choices), cutoff=0.5)


def _purpose(path: KeyPath, root: type[BaseModel]) -> str:
    section = section_at(root, path[:-1])
    field = section.model_fields.get(str(path[-1])) if section else None
    return f"it is required ({field.description})" if field and field.description else "it is required"


def _without_union_tags(location: tuple[int | str, ...], root: type[BaseModel]) -> KeyPath:
    """The path in the recipe. Pydantic adds which member of a union it tried, which is no key of a recipe."""
    path: list[int | str] = []
    section: type[BaseModel] | None = root
    for part in location:
        if section is not None:
            path.append(part)
            known = section.model_fields.get(str(part))
            section = _section_of(known.annotation) if known else None
        elif isinstance(part, int):
            path.append(part)
    return tuple(path)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _all_paths(section: type[BaseModel], above: KeyPath = ()) -> Iterator[KeyPath]:
    for name, field in section.model_fields.items():
        yield (*above, name)
        below = _section_of(field.annotation)
        if below is not None:
            yield from _all_paths(below, (*above, name))


def _num_shared(one: KeyPath, other: KeyPath) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
