"""Which backend computes the iterations: the setting, the machine and the tensors decide.

- `plain`, the loop of inl_core/model/integrator.py under autograd, is what the others must equal. It runs where a
  compiler traces the whole block and native cannot, and wherever gains, single states, experts or derivatives that the
  others lack are wanted (derivatives.py).
"""

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from inl_core.model.backends.rule import Around, Inputs, Result, Rule
from inl_core.model.by_rows import matrix_dtype
from inl_core.model.derivatives import is_plain
from inl_core.recipe import IntegratorConfig

_FEWEST_TOKENS = 16

Run = Callable[[Rule, Inputs], Result]


def backend_name(
    config: IntegratorConfig, device: torch.device, *, is_compiled: bool = False, is_low_precision: bool = False
) -> str:
    """`eager`, `native`, `compiled`, `triton` or `plain`, as training and evaluation run it on this device.

    A model trained with triton or native is evaluated anywhere: where they cannot run, eager takes their place.

    Args:
        is_compiled: a compiler traces the whole block; it traces the plain loop too, but takes native as it is.
        is_low_precision: bfloat16 autocast, or a state in less than single precision.
    """
    if config.controller.experts > 1:
        return "plain"
    name = _uncompiled_name(config, device, is_low_precision=is_low_precision)
    return "plain" if is_compiled and name != "native" else name


def _uncompiled_name(config: IntegratorConfig, device: torch.device, *, is_low_precision: bool) -> str:
    if config.backend in ("eager", "compiled"):
        return config.backend
    if device.type == "cuda":
        return "triton" if config.backend != "native" and has_triton() else "eager"
    can_be_native = device.type == "cpu" and config.backend != "triton" and not is_low_precision
    return "native" if can_be_native and has_native() else "eager"


_NEEDS = {
    "triton": "triton needs a GPU and the triton package",
    "native": "native needs a CPU, fp32, a C++ compiler, and a torch with MKL and GNU's OpenMP",
}


def describe_backend(
    config: IntegratorConfig | None, device: torch.device, *, is_compiled: bool, is_low_precision: bool = False
) -> str | None:
    """What a plan says of it; the arguments are backend_name's."""
    if config is None:
        return None
    name = backend_name(config, device, is_compiled=is_compiled, is_low_precision=is_low_precision)
    if name == "plain" and is_compiled:
        return "plain, traced with the block by training.compile"
    note = "all iterations kept" if name == "plain" else "iterations recomputed in the backward pass"
    within = ", one operation of the compiled block" if is_compiled else ""
    best = "triton" if device.type == "cuda" else "native"
    wanted = best if config.backend == "auto" else config.backend
    missing = "" if name in ("plain", wanted) else f"; {_NEEDS[wanted]}"
    if missing and wanted == "native":
        from inl_core.model.native import build

        missing += build.failure()
    return f"{name} on {device.type}, {note}{within}{missing}"


def has_triton() -> bool:
    """Whether Triton is installed, found without importing it."""
    return find_spec("triton") is not None


def has_native() -> bool:
    """Whether the loop in C++ runs here; the first call of a machine compiles it."""
    from inl_core.model.backends import native

    return native.is_available()


# What torch.compiler.assume_constant_result does, which imports the compiler: a second of every command's start.
has_native._dynamo_marked_constant = True  # type: ignore[attr-defined]


def find_backend(config: IntegratorConfig, state: Tensor, mu: Tensor) -> Run | None:
    """The function that runs the iterations; None is the plain loop, which alone mixes precisions of state and mu."""
    if is_plain():
        return None
    is_compiled = torch.compiler.is_compiling()
    is_low = state.dtype not in (torch.float32, torch.float64) or matrix_dtype(state) != state.dtype
    name = backend_name(config, state.device, is_compiled=is_compiled, is_low_precision=is_low)
    if name == "native" and not is_compiled and state.numel() < _FEWEST_TOKENS * state.shape[-1]:
        name = "eager"  # native turns whole weights before it begins
    return None if name == "plain" or state.dtype != mu.dtype else _runner(name, is_compiled=is_compiled)


def takes_around(run: Run, inputs: Inputs, around: Around) -> bool:
    """Whether a backend that was found also does what lies around the iterations: the loop in C++, of such tensors."""
    if torch.compiler.is_compiling():
        return False
    from inl_core.model.backends import native

    return run is native.run and native.supports(inputs, around)


def run_around(rule: Rule, inputs: Inputs, around: Around) -> Result:
    """The loop in C++ with what lies around it."""
    from inl_core.model.backends import native

    return native.run_around(rule, inputs, around)


def _runner(name: str, *, is_compiled: bool) -> Run:
    """Imported here: each backend brings what only it needs."""
    if name == "triton":
        from inl_core.model.backends import triton_launch

        return triton_launch.run
    if name == "native" and is_compiled:
        from inl_core.model.backends import native_traced

        return native_traced.run
    if name == "native":
        from inl_core.model.backends import native

        return native.run
    if name == "compiled":
        from inl_core.model.backends import compiled

        return compiled.run
    from inl_core.model.backends import fused

    return fused.run
