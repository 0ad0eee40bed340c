"""Which backend computes the iterations: the setting, the machine and the tensors decide.

- `plain`, the loop of inl_core/model/integrator.py under autograd, is what the others must equal. It runs where a
  compiler traces the whole block, and wherever gains, single states or experts are wanted.
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from inl_core.model.backends.rule import Inputs, Result, Rule
from inl_core.recipe import IntegratorConfig

Run = Callable[[Rule, Inputs], Result]


def backend_name(config: IntegratorConfig, device: torch.device) -> str:
    """`eager`, `native`, `compiled` or `triton`, as training and evaluation run it on this device; `plain` for experts.

    A model trained with triton or native is evaluated anywhere: where they cannot run, eager takes their place.
    """
    if config.controller.experts > 1:
        return "plain"
    if config.backend in ("eager", "compiled"):
        return config.backend
    if device.type == "cuda":
        return "triton" if config.backend != "native" and has_triton() else "eager"
    return "native" if device.type == "cpu" and config.backend != "triton" and has_native() else "eager"


_NEEDS = {
    "triton": "triton needs a GPU and the triton package",
    "native": "native needs a CPU, a C++ compiler, and a torch with MKL and GNU's OpenMP",
}


def describe_backend(config: IntegratorConfig | None, device: torch.device, *, is_compiled: bool) -> str | None:
    """What a plan says of it; `is_compiled` where a compiler traces the whole block."""
    if config is None:
        return None
    if is_compiled:
        return "plain, traced with the block by training.compile"
    name = backend_name(config, device)
    note = "all iterations kept" if name == "plain" else "iterations recomputed in the backward pass"
    best = "triton" if device.type == "cuda" else "native"
    wanted = best if config.backend == "auto" else config.backend
    missing = "" if name in ("plain", wanted) else f"; {_NEEDS[wanted]}"
    return f"{name} on {device.type}, {note}{missing}"


def has_triton() -> bool:
    """Whether Triton is installed, found without importing it."""
    return find_spec("triton") is not None


def has_native() -> bool:
    """Whether the steps in C++ run here; the first call of a machine compiles them."""
    from inl_core.model.backends import native

    return native.is_available()


def find_backend(config: IntegratorConfig, state: Tensor, mu: Tensor) -> Run | None:
    """The function that runs the iterations; None is the plain loop, which alone mixes precisions of state and mu."""
    if torch.compiler.is_compiling() or state.dtype != mu.dtype:
        return None
    name = backend_name(config, state.device)
    if name == "plain":
        return None
    if name == "triton":
        from inl_core.model.backends import triton_launch

        return triton_launch.run
    if name == "native":
        from inl_core.model.backends import native

        return native.run
    from inl_core.model.backends import fused

    if name == "compiled":
        from inl_core.model.backends import compiled

        return compiled.run
    return fused.run
