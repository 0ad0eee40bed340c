"""torch.compile for the parts of a model that are functions of tensors alone.

- Compiled are the two halves of a block with an integrator (`Block.enter`, `Block.leave`) and the integrator's step
  (`Dynamics.step`), never the loop over T between them; and a block of the stream as a whole (`StreamBlock.forward`).
  So nothing is compiled again when T is drawn anew or divided by a budget, or when single states are looked at.
- Each part is compiled once with gradients, for the one shape of training, and once without, for any shape; all layers
  share it. With an attention mask and without, for a single row or token, and in inference mode, it is compiled
  separately. Compiling any of these again is worth a warning, and after a few times the part runs uncompiled.
"""

import warnings
from collections.abc import Callable, Hashable
from functools import lru_cache, partial
from typing import Any

import torch
import torch._functorch.config as compiler_config
from torch import Tensor
from torch.utils._pytree import tree_leaves

from inl_core.errors import ExecutionWarning, InlError
from inl_core.model import IntegratorLanguageModel
from inl_core.model.block import Block
from inl_core.model.dynamics import Dynamics
from inl_core.model.stream import StreamBlock

_ACTIVATION_BUDGET = 0.8
"""Of what the compiler would keep of a block for its backward pass; the rest it computes again, elementwise operations
first. A quarter of a v4 block less for one percent of the time; less than this costs more (docs/performance.md)."""
_MOST_COMPILATIONS = 6
"""Of one part for one kind of pass; torch itself gives up after eight."""
_MOST_KINDS = 64
"""Whose code is kept by `compiled_for`."""


def compile_parts(model: IntegratorLanguageModel, *, any_shape: bool = True) -> None:
    """Compile the parts of every layer, in place; the first forward pass of each kind then takes its time.

    Args:
        any_shape: False compiles evaluation, too, for the shapes of its first pass alone, which are then faster; the
            model must not change after it.
    """
    enter, leave = _Compiled(Block.enter, any_shape), _Compiled(Block.leave, any_shape)
    stream = _Compiled(StreamBlock.forward, any_shape)
    step, step_with_gains = _Compiled(Dynamics.step, any_shape), _Compiled(Dynamics.step_with_gains, any_shape)
    for block in model.blocks:
        if isinstance(block, StreamBlock):
            block.forward = partial(stream, block)  # type: ignore[method-assign]
            continue
        assert isinstance(block, Block)
        block.enter = partial(enter, block)  # type: ignore[method-assign]
        block.leave = partial(leave, block)  # type: ignore[method-assign]
        dynamics = block.integrator.dynamics
        if isinstance(dynamics, Dynamics) and not dynamics.branches_on_values:
            dynamics.step = partial(step, dynamics)  # type: ignore[method-assign]
            dynamics.step_with_gains = partial(step_with_gains, dynamics)  # type: ignore[method-assign]


@lru_cache(_MOST_KINDS)
def compiled_for(kind: Hashable, method: Callable[..., Any]) -> Callable[..., Any]:
    """A function of fixed shapes without gradients, compiled once for each kind of its calls, whoever makes them.

    Args:
        kind: what calls have in common: the model's configuration, shapes, types. A call that differs from an earlier
            one of its kind is compiled again, with a warning.
    """
    return _Kind(method, "decoding", any_shape=False, is_fixed=False)


class _Compiled:
    """A method as torch compiles it, once for each kind of pass."""

    def __init__(self, method: Callable[..., Any], any_shape: bool) -> None:
        self.method, self.any_shape = method, any_shape
        self.kinds: dict[tuple[bool, ...], _Kind] = {}

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling():  # a part inside of another one, as the step with gains is of the step
            return self.method(*args)
        trains, args = torch.is_grad_enabled(), tuple(map(_alone, args))
        # A mask or a cache that is not there, a single row or token, and inference mode make other code of one method.
        values = tree_leaves(args)
        kind = (trains, torch.is_inference_mode_enabled(), *(value is None for value in values), *map(_is_single, args))
        if kind not in self.kinds:
            purpose = "training" if trains else "evaluation"
            any_shape, is_fixed = self.any_shape and not trains, not self.any_shape and not trains
            self.kinds[kind] = _Kind(self.method, purpose, any_shape=any_shape, is_fixed=is_fixed)
        if not trains:
            return self.kinds[kind](*args)
        with compiler_config.patch(activation_memory_budget=_ACTIVATION_BUDGET):
            return self.kinds[kind](*map(_differentiable, args))

    def __getstate__(self) -> dict[str, Any]:
        """What was compiled cannot be written to a file; it is compiled again."""
        return {"method": self.method, "any_shape": self.any_shape, "kinds": {}}


def _alone(value: Any) -> Any:
    """A view of another tensor as a tensor of its own: code compiled for a view depends on what it is a view of.

    In training only a row (D,) of a table, which would be compiled for the table's length.
    """
    if not isinstance(value, Tensor) or value._base is None:
        return value
    return value.clone() if value.dim() == 1 else value if torch.is_grad_enabled() else value.detach()


def _is_single(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 3 and 1 in value.shape[:2]


def _differentiable(value: Any) -> Any:
    """A state (B, S, D) that needs no gradient, as one that needs one: else each would be compiled separately.

    The velocity that the first layer starts with is the only such state.
    """
    is_state = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3
    return value.detach().requires_grad_() if is_state and not value.requires_grad else value


class _Kind:
    """A method compiled for one kind of pass. Each compilation after the first is warned of, up to the last allowed."""

    def __init__(self, method: Callable[..., Any], purpose: str, *, any_shape: bool, is_fixed: bool) -> None:
        self.method, self.what, self.compilations = method, f"{method.__qualname__} is compiled for {purpose}", 0
        compiler: Any = torch.compile  # whose type stubs do not know isolate_recompiles
        # Checking at each token of a text that no module has changed takes a good part of the time.
        options = {"guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe} if is_fixed else None
        self.compiled = compiler(
            method, backend=self._generate, fullgraph=True, dynamic=any_shape, isolate_recompiles=True, options=options
        )

    def __call__(self, *args: Any) -> Any:
        return (self.compiled if self.compilations < _MOST_COMPILATIONS else self.method)(*args)

    def _generate(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        try:
            code = generate_code(graph, inputs)
        except Exception as error:
            from torch._dynamo.exc import BackendCompilerFailed, TorchDynamoException  # with torch.compile, late

            # By exceptions of its own torch asks for another graph. Anything else is a fault of the compiler, or its
            # processes were killed, and nothing need end for that.
            is_request = isinstance(error, TorchDynamoException) and not isinstance(error, BackendCompilerFailed)
            if is_request or isinstance(error, InlError):
                raise
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            warnings.warn(f"{self.what}, but that failed: {reason}; it runs uncompiled", ExecutionWarning, stacklevel=2)
            return graph.forward
        self.compilations += 1
        if self.compilations > 1:
            after = (
                "it runs uncompiled from now on" if self.compilations == _MOST_COMPILATIONS else "compiling takes time"
            )
            warnings.warn(
                f"{self.what} again, number {self.compilations}: something about it changes between calls "
                f"(TORCH_LOGS=recompiles says what); {after}",
                ExecutionWarning,
                stacklevel=2,
            )
        return code


def generate_code(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """A function that computes what the graph does, by torch's own compiler."""
    from torch._inductor.compile_fx import compile_fx  # imported here: it takes a second

    return compile_fx(graph, inputs)  # type: ignore[return-value]
