"""Which derivatives our own operations have, and the way to all others.

- An `OwnOperation` has a backward pass written by hand: first derivatives by backward(), and nothing else. It refuses
  everything that it would otherwise compute wrongly without a word.
- Where torch.func (grad, vmap, jvp, ...) or forward-mode differentiation is at work, `is_plain` says so, and the model
  takes the library's operations, which have every derivative. Second derivatives by backward() cannot be foreseen in
  the forward pass: who wants them asks for the library's operations with `plain_operations`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch.autograd import forward_ad

_asked: ContextVar[bool] = ContextVar("inl_plain_operations", default=False)


@contextmanager
def plain_operations() -> Iterator[None]:
    """Inside, models compute by the library's own operations: slower, in more memory, and with every derivative."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def is_plain() -> bool:
    """Whether the library's operations are to be taken for the sake of their derivatives; not asked of a compiler."""
    return not torch.compiler.is_compiling() and (_asked.get() or _is_transformed())


def _is_transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class OwnOperation(torch.autograd.Function):
    """An operation whose backward pass is written by hand, for first derivatives by backward() alone.

    Both passes raise NotImplementedError for any other derivative. torch's once_differentiable would not do: it lets
    gradients pass as constants where the incoming ones are, and second derivatives come out wrong without a word.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls.backward = staticmethod(_first_derivatives(cls.__name__, cls.backward))

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """The forward pass."""
        if _is_transformed():
            raise _refusal(cls.__name__)
        return super().apply(*arguments)


def _first_derivatives(name: str, backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass that is refused where its graph is kept for second derivatives, or many run as one."""

    @wraps(backward)
    def first(ctx: Any, *grads: Any) -> Any:
        if torch.is_grad_enabled() or _is_transformed() or any(map(_is_batch, grads)):
            raise _refusal(name)
        return backward(ctx, *grads)

    return first


def _is_batch(grad: Any) -> bool:
    """Whether it stands for many gradients at once: torch.autograd.grad(..., is_grads_batched=True)."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)  # type: ignore[attr-defined]


def _refusal(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name} has first derivatives by backward() alone: for second ones (create_graph=True), torch.func or forward "
        "mode run the forward pass inside `with inl_core.model.plain_operations():`"
    )
