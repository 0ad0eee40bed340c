"""Running out of memory, told in one line: how much could not be allocated, and which settings need less."""

import functools
import inspect
import re
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from inl_cli.progress import amount
from inl_core.launcher import place_or_alone

if TYPE_CHECKING:
    from inl_core.recipe import Recipe

P = ParamSpec("P")
R = TypeVar("R")

# torch has an error class for a GPU's memory only; for everything else it raises RuntimeError with one of these.
_SIGNS = ("out of memory", "allocate memory", "not enough memory", "size calculation overflowed", "alloc_failed")
_ASKED_FOR = re.compile(r"allocate ([\d.]+) ?(bytes|[KMGTPE]i?B)", re.IGNORECASE)
_OPTIONS = ("batch_size", "window", "sequence_length", "num_samples", "max_new_tokens", "sample_tokens", "max_tokens")
_KEYS = (
    "training.micro_batch_size or training.sequence_length, or set training.recomputation to block, or choose a "
    "smaller model"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be allocated."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS))


def describe_out_of_memory(error: BaseException, command: Callable[..., Any]) -> str:
    """One line: what was asked for, and what to do about it.

    The advice is the error's own note where `explains_memory` has added one, else the options of `command` that matter.
    """
    found = _ASKED_FOR.search(str(error))
    asked = f" ({_readable(*found.groups())} more could not be allocated)" if found else ""
    notes = getattr(error, "__notes__", ())
    return f"out of memory{asked}: {notes[0] if notes else _advice(command)}"


def explains_memory(train: Callable[P, R]) -> Callable[P, R]:
    """Decorate a function that trains its argument `recipe`: an error for want of memory says what the plan needs."""
    signature = inspect.signature(train)

    @functools.wraps(train)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return train(*args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                # The frames hold the model in memory, and planning needs memory as well.
                traceback.clear_frames(error.__traceback__)
                error.add_note(_training_advice(signature.bind(*args, **kwargs).arguments["recipe"]))
            raise

    return run


def _training_advice(recipe: "Recipe") -> str:
    from inl_core.analysis.planning import plan_recipe
    from inl_core.analysis.planning.plan import find_vocabulary

    try:
        vocab_size = find_vocabulary(recipe).size
        plan = plan_recipe(recipe, vocab_size=vocab_size, world_size=place_or_alone().size)
    except Exception:  # a failing plan must not hide the error that is explained here
        return f"lower {_KEYS}"
    return (
        f"this training needs {amount(plan.state_bytes, 'B')} for weights, gradients and moments and about "
        f"{amount(plan.activation_bytes, 'B')} for activations; lower {_KEYS}"
    )


def _advice(command: Callable[..., Any]) -> str:
    known = inspect.signature(command).parameters
    options = [f"--{name.replace('_', '-')}" for name in _OPTIONS if name in known]
    if not options:
        return "free some, or use a machine with more"
    return f"lower {' or '.join(options)}, or use a machine with more"


def _readable(number: str, unit: str) -> str:
    return amount(float(number), "B") if unit.lower() == "bytes" else f"{number} {unit}"
