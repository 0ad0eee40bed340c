"""A function's arguments -> a validated recipe section, with errors that name the arguments."""

import json
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from inl_core.errors import RecipeError
from inl_core.recipe.base import Section
from inl_core.recipe.problems import did_you_mean, dotted, find_problems

SectionType = TypeVar("SectionType", bound=Section)


def validated(
    section: type[SectionType], values: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> SectionType:
    """The section made of `values`, without conversions between types.

    Args:
        names: the section's dotted key -> what the caller calls it, where that differs. The key of a section inside
            stands for all keys below it.

    Raises:
        RecipeError: (a ValueError) one line per problem: the argument, the value, the nearest valid name.
    """
    try:
        return section.model_validate_json(json.dumps(values, default=_plain), strict=True)
    except ValidationError as error:
        problems = find_problems(error, section)
        raise RecipeError(
            "\n".join(
                f"{_argument(dotted(path), names or {})}: {message}".lstrip(": ") for path, message in problems.items()
            )
        ) from None


def check_name(kind: str, name: str, valid: Collection[str]) -> None:
    """Refuse a name that is not one of `valid` with a RecipeError (a ValueError), which names the nearest and all."""
    if name not in valid:
        hint = did_you_mean(str(name), valid) or ";"
        raise RecipeError(f"unknown {kind} {name!r}{hint} valid are {', '.join(valid)}")


def _argument(key: str, names: Mapping[str, str]) -> str:
    """What the caller calls the section's `key`."""
    if key in names:
        return names[key]
    section, dot, rest = key.rpartition(".")
    return f"{names[section]}.{rest}" if dot and section in names else key


def _plain(value: Any) -> Any:
    """A NumPy or torch scalar as a Python number."""
    if hasattr(value, "item"):
        return value.item()
    raise RecipeError(f"expected a number, text or a dictionary of them, got {type(value).__name__}")
