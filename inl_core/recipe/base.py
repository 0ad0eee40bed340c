"""What the sections of a recipe are made of: the base class, and the types of numbers and paths with their bounds.

Every number has a generous lower and upper bound. So whatever a recipe may hold can be planned in bounded time, fits
into 64-bit integers, and neither vanishes nor overflows in float32.
"""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from inl_core.files import expand_home, refuse_remote


class Section(BaseModel):
    """A part of a recipe: it cannot be changed, takes no unknown keys, and its docstrings go into the JSON schema."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


Width = Annotated[int, Field(gt=0, le=1 << 20)]
"""A dimension of a tensor, or a number of heads."""

Length = Annotated[int, Field(gt=0, le=1 << 23)]
"""Tokens in one sequence."""

Vocabulary = Annotated[int, Field(gt=0, le=100_000_000)]
"""Different tokens."""

Iterations = Annotated[int, Field(gt=0, le=10_000)]
"""Integrator iterations of one layer."""

Count = Annotated[int, Field(gt=0, le=10**12)]
"""Steps, epochs, sequences, tokens in a batch."""

CountOrNone = Annotated[int, Field(ge=0, le=10**12)]
"""As Count, and 0 stands for never."""

Total = Annotated[int, Field(gt=0, le=10**18)]
"""Tokens or bytes in a whole run."""

Positive = Annotated[float, Field(ge=1e-30, le=1e30)]
"""A number above 0."""

NonNegative = Annotated[float, Field(ge=0, le=1e30)]
"""A number that is not negative."""

Text = Annotated[str, Field(min_length=1, max_length=128)]
"""A name in another program."""

Unit = Annotated[float, Field(ge=0, le=1)]
"""A share of something."""


def _whole_path(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value:
        raise ValueError("an empty path would be the working directory; write . if that is meant, or null")
    refuse_remote(value)
    return _home_expanded(value)


def _home_expanded(text: str) -> str:
    if "\0" in text:
        raise ValueError("no file name holds a NUL character")
    return str(expand_home(text)) if text.startswith("~") else text


def _source(text: str) -> str:
    if not text.startswith("file://"):  # how a name that is not UTF-8 is written
        refuse_remote(text)
    return _home_expanded(text)


FilePath = Annotated[Path, BeforeValidator(_whole_path)]
"""A path in a recipe; `~` at its start is the home directory."""

Source = Annotated[str, AfterValidator(_source)]
"""A source of text: a path or glob, where `~` at the start is the home directory, or the name of another source."""
