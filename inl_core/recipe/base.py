"""What recipe sections are made of: their base, typed, frozen, closed and documented field by field; paths."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from inl_core.files import expand_home


class Section(BaseModel):
    """A part of a recipe: immutable, no unknown keys, every field's docstring goes into the JSON schema."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
        protected_namespaces=(),
    )


def _whole_path(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if not value:
        raise ValueError("an empty path would be the working directory; write . if that is meant, or null")
    return _home_expanded(value)


def _home_expanded(text: str) -> str:
    if "\0" in text:
        raise ValueError("no file name holds a NUL character")
    return str(expand_home(text)) if text.startswith("~") else text


FilePath = Annotated[Path, BeforeValidator(_whole_path)]
"""A path in a recipe; `~` at its start is the home directory."""

Source = Annotated[str, AfterValidator(_home_expanded)]
"""A source of text: a path or glob, in which `~` at the start is the home directory, or another kind of source."""
