"""Errors a user can cause, each with what went wrong, where, and the fix.

- `inl_cli` maps the classes to exit codes (docs/commands.md); nothing in `inl_core` exits or prints.
- The message is one line, or one line per problem: it is shown to the user exactly as it stands.
"""


class InlError(ValueError):
    """Base of every error the user is meant to read (exit code 1)."""

    is_shared = False
    """Whether this is rank 0's error, which it passed on to this rank: it need not be shown twice."""


class RecipeError(InlError):
    """A recipe, an override or an argument that cannot be used (exit code 2)."""


class NonFiniteError(InlError):
    """The loss or the gradient became NaN or infinite (exit code 3)."""


class ArtefactError(InlError):
    """A data set, tokenizer, checkpoint or run that is missing, damaged or incompatible (exit code 4)."""


class Interrupted(InlError):
    """A signal stopped the work after its state was saved; it can be continued (exit code 75)."""
