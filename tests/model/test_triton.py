"""The Triton kernels, through Triton's interpreter on a CPU and natively on a GPU, against the plain loop."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

# The interpreter is chosen when the kernels are defined, so it needs a process of its own.
SCRIPT = """
import sys
import torch
from inl_core.model.backends import compiled, triton_launch
from inl_core.model.backends.rule import Inputs, Rule

device = sys.argv[1]
torch.set_float32_matmul_precision("highest")
triton_launch._TOKENS_AT_ONCE = 45  # two launches of the backward kernel


def inputs(tokens, dim, width, groups, iterations, velocity, candidate, dtype):
    generator = torch.Generator().manual_seed(tokens + dim)

    def draw(*shape, scale=1.0):
        value = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return value.to(dtype).to(device).requires_grad_()

    mu = draw(dim)
    x = draw(tokens, dim)
    with torch.no_grad():
        x[0] = mu  # where the rms has no slope
    return Inputs(
        x, draw(tokens, dim) if velocity else None, draw(tokens, width), draw(tokens, dim) if candidate else None,
        draw(width, 2 * dim, scale=dim**-0.5), draw(groups * dim, width, scale=width**-0.5), draw(groups * dim), mu,
        draw(iterations, dim), None,
    )


def outcome(run, rule, tensors):
    result = run(rule, tensors)
    leaves = [value for value in tensors if value is not None]
    weight = torch.linspace(-1, 1, result.x.numel(), dtype=torch.float64).view_as(result.x).to(result.x)
    return [result.x, result.v, *torch.autograd.grad((result.x * weight).sum() + result.v.square().sum(), leaves)]


def plain(rule, tensors):
    return compiled.Result(*compiled.iterate(rule, tensors.x.dtype, *tensors))


CASES = [
    ((50, 40, 20, 3, 3, True, True), Rule(3, 0.7, 1.0, 1.1, "relu")),
    ((50, 40, 20, 3, 2, False, True), Rule(2, 1.0, 1.3, 2.0, "relu")),
    ((33, 70, 9, 4, 2, True, False), Rule(2, 0.7, 1.0, None, "silu")),
    ((5, 64, 64, 3, 1, True, False), Rule(1, 0.7, None, 2.0, "tanh")),
    ((5, 130, 16, 4, 2, False, False), Rule(2, 0.7, None, 0.5, "relu")),
]
for sizes, rule in CASES:
    tensors = inputs(*sizes, torch.float32)
    assert triton_launch.supports(rule, tensors)
    exact = outcome(plain, rule, inputs(*sizes, torch.float64))
    usual, own = outcome(plain, rule, tensors), outcome(triton_launch.run, rule, tensors)
    assert len(own) == len(exact)
    for place, (ours, theirs, true) in enumerate(zip(own, usual, exact)):
        size = true.abs().max().clamp(min=1.0)
        error, rounding = ((ours - true).abs().max() / size).item(), ((theirs - true).abs().max() / size).item()
        assert error <= 1e-6 + 3 * rounding, (sizes, rule, place, error, rounding)

total = triton_launch.run(rule, tensors).x.square().sum()
once, again = (torch.autograd.grad(total, tensors.x, retain_graph=True)[0] for _ in range(2))
assert torch.equal(once, again)
x = tensors.x.detach()


def state(x):
    return triton_launch.run(rule, tensors._replace(x=x)).x


for refused in (
    lambda: torch.autograd.grad(total, tensors.x, create_graph=True),
    lambda: torch.func.vmap(state)(x[None]),
    lambda: torch.func.jvp(state, (x,), (x,)),
):
    try:
        refused()
    except NotImplementedError as error:
        assert "plain_operations" in str(error), error
    else:
        raise AssertionError("not refused")
print("equal")
"""


def run_script(device: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, device],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith("equal")


def test_the_kernels_equal_the_plain_loop_and_refuse_other_derivatives_in_the_interpreter():
    run_script("cpu", TRITON_INTERPRET="1")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_kernels_equal_the_plain_loop_on_a_gpu():
    run_script("cuda", TRITON_INTERPRET="0")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernels_compile_for_a_gpu_within_its_shared_memory(dtype):
    """Without a GPU: Triton brings the whole compiler, for compute capability 9.0 and its 227 KiB."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from inl_core.model.backends import triton_kernel as kernels
    from inl_core.model.backends import triton_launch as launch

    blocks = {"BLOCK_N": launch.BLOCK_N, "BLOCK_D": launch.BLOCK_D, "BLOCK_C": 64}
    switches = {"CANDIDATE": 1, "DYNAMIC": True, "BOUNDED": True, "KIND": 0, "PRECISION": "tf32"}
    for kernel, more in ((kernels.forward, {}), (kernels.backward, {"G": 3})):
        constants = {"D": 512, "C": 64, **more, **blocks, **switches}
        kinds = dict.fromkeys(kernel.arg_names, "fp32") | dict.fromkeys(("N", "T"), "i32")
        kinds |= {name: "*fp32" for name in kernel.arg_names if name.endswith("_at")}
        kinds |= {name: f"*{dtype}" for name in ("inner_at", "outer_at", "bias_at", "outputs_at") if name in kinds}
        kinds |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, {name: kinds[name] for name in kernel.arg_names}, constants)
        built = compile(source, target=GPUTarget("cuda", 90, 32), options=launch.LAUNCH)
        assert 0 < built.metadata.shared <= 227 * 1024
