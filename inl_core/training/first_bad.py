"""Where the first number that is not finite comes from, in one more forward and backward pass of a batch.

    with watched(model) as found:
        ...                            # the passes
    found.forward, found.backward      # each a Place or None

- Every module's output is looked at when the module returns, so that an inner module is named before the outer one.
  Nothing can be watched inside of a compiled block, which is then named itself.
- Each look waits for the device. This is for a step that has failed, not for every step.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Place:
    """A tensor in which NaN or infinity was found."""

    what: str
    """`weight`, `output`, `loss`, `gradient of output`, `gradient of weight` or `gradient norm`."""
    name: str
    """The module whose output it is, the parameter, or the loss."""
    bad: int
    """How many of its numbers are not finite."""
    elements: int
    inputs_are_finite: bool | None = None
    """Of an output: whether everything that the module was called with was finite, so that it was made inside."""

    def __str__(self) -> str:
        inputs = {None: "", True: ", from finite inputs", False: ", from inputs that were not finite"}
        of = "of " if self.what.endswith("output") else ""
        return f"{self.what} {of}{self.name} ({self.bad:,} of {self.elements:,}{inputs[self.inputs_are_finite]})"


def count_bad(tensor: Tensor) -> int:
    """How many numbers of a tensor are NaN or infinite; of one in parts, all ranks must ask together."""
    bad = (~torch.isfinite(tensor.detach())).sum()
    return int(bad.full_tensor() if isinstance(bad, DTensor) else bad)


class Watch:
    """What was found in the passes of one batch."""

    def __init__(self) -> None:
        self.forward: Place | None = None
        self.backward: Place | None = None
        self.sizes: dict[str, float] = {}
        """The root mean square of the first tensor of each module's output: the largest one of several calls."""
        self._clean: list[bool] = []

    def enter(self, module: nn.Module, given: tuple[Any, ...]) -> None:
        """A hook before the module, which may overwrite what it is given."""
        self._clean.append(self.forward is None and not any(map(count_bad, _tensors(given))))

    def leave(self, name: str, module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
        """A hook after the module."""
        is_clean, tensors = self._clean.pop(), _tensors(output)
        for tensor in tensors:
            if self.forward is None and (bad := count_bad(tensor)):
                self.forward = Place("output", name, bad, tensor.numel(), is_clean)
            if tensor.requires_grad:
                tensor.register_hook(partial(self._look_at_gradient, name))
        if tensors:
            size, before = tensors[0].detach().float().square().mean().sqrt().item(), self.sizes.get(name, 0.0)
            self.sizes[name] = before if size <= before or math.isnan(before) else size

    def _look_at_gradient(self, name: str, gradient: Tensor | None) -> None:
        """A hook of the backward pass, in which a gradient that is all zeros may be None."""
        if self.backward is None and gradient is not None and (bad := count_bad(gradient)):
            self.backward = Place("gradient of output", name, bad, gradient.numel())


@contextmanager
def watched(model: nn.Module) -> Iterator[Watch]:
    """Watch all modules inside of a model until the end of the context."""
    watch = Watch()
    inner = [(name, module) for name, module in model.named_modules() if name]
    hooks = [module.register_forward_pre_hook(watch.enter) for _, module in inner]
    hooks += [module.register_forward_hook(partial(watch.leave, name)) for name, module in inner]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(values: Any) -> list[Tensor]:
    return [one for one in tree_leaves(values) if isinstance(one, Tensor) and one.is_floating_point()]
