"""A norm and its product in one pass against the two modules, one after the other."""

import pytest
import torch
from torch import nn

from inl_core.analysis.planning.activations import saved_bytes
from inl_core.model.normed_linear import NormedLinear, normed_linear
from inl_core.model.norms import RMSNorm


def build(bias: bool = False) -> tuple[RMSNorm, nn.Linear]:
    """A norm over 16 and a product to 24."""
    torch.manual_seed(0)
    norm = RMSNorm(16, eps=1e-6)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    return norm, nn.Linear(16, 24, bias=bias)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    shapes = ((5, 4), (4,), (3, 4))
    x, scale_weight, weight = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    assert torch.autograd.gradcheck(
        lambda *given: NormedLinear.apply(given[0], given[1], 1e-6, given[2]), (x, scale_weight, weight)
    )


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_numbers_are_those_of_the_two_modules(bias, bf16):
    norm, linear = build(bias)
    x = torch.randn(2, 37, 16, requires_grad=True)
    parameters = [x, norm.weight, *linear.parameters()]
    found = []
    for together in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = normed_linear(norm, linear, x) if together else linear(norm(x))
        found.append((out, *torch.autograd.grad(out.float().square().sum(), parameters)))
    tolerance = 0.02 if bf16 else 1e-6
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        size = plain.detach().float().abs().max().item()
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance * size)


def test_the_norm_s_output_is_not_kept(either_way):
    norm, linear = build()
    x = torch.randn(70, 16, requires_grad=True)
    both, scales = nn.ModuleList((norm, linear)), 0 if either_way else 70
    assert sum(saved_bytes(both, lambda: normed_linear(norm, linear, x))) == (70 * 16 + scales) * 4
    assert sum(saved_bytes(both, lambda: linear(norm(x)))) == (2 * 70 * 16 + scales) * 4


def test_under_autocast_the_two_modules_run(either_way):
    norm, linear = build()
    together = "ProjectedBackward" if either_way else "NormedLinearBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert together not in _history(normed_linear(norm, linear, torch.randn(70, 16)).grad_fn)
    assert together in _history(normed_linear(norm, linear, torch.randn(70, 16)).grad_fn)


def _history(node) -> set[str]:
    """The names of a graph's nodes."""
    return set() if node is None else {node.name()}.union(*(_history(parent) for parent, _ in node.next_functions))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("shape", [(3, 16), (2, 35, 16), (2, 0, 16)])
def test_another_norm_is_applied_as_it_is_and_none_is_none(shape):
    _, linear = build()
    norm, x = nn.LayerNorm(16), torch.randn(shape)
    torch.testing.assert_close(normed_linear(norm, linear, x), linear(norm(x)), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(normed_linear(None, linear, x), linear(x), rtol=1e-6, atol=1e-6)
