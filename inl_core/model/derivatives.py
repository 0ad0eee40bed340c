"""When a model must compute with torch's own operations, because others lack the derivatives that are wanted.

An operation of our own (inl_core/kernels) has first derivatives by backward() and nothing else. Under torch.func and
forward-mode differentiation this is seen in the forward pass, and torch's operations run without being asked for.
Second derivatives by backward(create_graph=True) cannot be foreseen there: whoever wants them asks for torch's
operations with `plain_operations`.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

_asked: ContextVar[bool] = ContextVar("inl_plain_operations", default=False)


@contextmanager
def plain_operations() -> Iterator[None]:
    """Inside, models compute with torch's own operations: slower, in more memory, and with every derivative."""
    token = _asked.set(True)
    try:
        yield
    finally:
        _asked.reset(token)


def needs_plain_operations() -> bool:
    """Whether `plain_operations` was entered, or a transform of torch.func or forward-mode differentiation is at work.

    A compiler cannot trace the question: what it compiles is not asked.
    """
    if torch.compiler.is_compiling():
        return False
    return _asked.get() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def differentiable_attention() -> AbstractContextManager[Any]:
    """Inside, where every derivative is wanted, torch's attention is its slowest: the others have first ones alone."""
    return sdpa_kernel(SDPBackend.MATH) if needs_plain_operations() else nullcontext()
