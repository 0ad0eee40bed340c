"""Errors that a user can cause. Each says what went wrong, where, and what to do about it.

- `inl_cli` gives each class its exit code (docs/commands.md); nothing in `inl_core` exits or prints.
- A message is one line, or one line for each problem, and is shown to the user as it stands.
"""

from collections.abc import Iterator
from contextlib import contextmanager


class InlError(ValueError):
    """The base of all errors that are meant for the user (exit code 1)."""

    is_shared = False
    """Whether another process of the run has passed this error on, and shows it itself."""


class RecipeError(InlError):
    """A recipe, an override or an argument that cannot be used (exit code 2)."""


class RecipeWarning(UserWarning):
    """A recipe holds something that has no effect. `inl_cli` shows it as a line that begins with `warning:`."""


class ExecutionWarning(RuntimeWarning):
    """Something is computed more slowly than it could be. `inl_cli` shows it as it does a RecipeWarning."""


class NonFiniteError(InlError):
    """The loss or the gradient became NaN or infinite (exit code 3)."""


class ArtefactError(InlError):
    """A data set, tokenizer, checkpoint or run that is missing, damaged or incompatible (exit code 4)."""


class Interrupted(InlError):
    """A signal stopped the work after its state was saved; it can be continued (exit code 75)."""


@contextmanager
def naming_key(key: str) -> Iterator[None]:
    """The recipe's key stands before the message of whatever a user's path in it is refused for."""
    try:
        yield
    except InlError as error:
        if key not in str(error):
            error.args = (f"{key} {error}",)
        raise
