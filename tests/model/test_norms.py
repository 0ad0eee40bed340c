"""The RMS norm's CPU form against the library's."""

import pytest
import torch
from torch import nn

from inl_core.analysis.planning.activations import saved_bytes
from inl_core.model.norms import FusedRMS, RMSNorm


@pytest.mark.usefixtures("either_way")
def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    assert torch.autograd.gradcheck(FusedRMS.apply, (x.requires_grad_(), weight.requires_grad_(), 1e-6))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("shape", [(7, 32), (2, 5, 32), (2, 3, 2, 32)])
@pytest.mark.parametrize("size", [1.0, 1e-4])
def test_the_numbers_are_the_library_s(shape: tuple[int, ...], size: float) -> None:
    torch.manual_seed(0)
    ours, library = RMSNorm(32, eps=1e-6), nn.RMSNorm(32, eps=1e-6)
    with torch.no_grad():
        ours.weight.normal_()
        library.weight.copy_(ours.weight)
    x, gradient = (torch.randn(shape) * size).requires_grad_(), torch.randn(shape)
    found = []
    for norm in (ours, library):
        out = norm(x)
        found.append((out, *torch.autograd.grad(out, (x, norm.weight), gradient)))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6 * theirs.detach().abs().max().item(), rtol=1e-5)


def test_what_is_not_float32_on_a_cpu_takes_the_library_s_way() -> None:
    x = torch.randn(3, 8)
    assert type(RMSNorm(8, eps=1e-6)(x).grad_fn).__name__ == "FusedRMSBackward"
    assert type(RMSNorm(8, eps=1e-6).bfloat16()(x.bfloat16()).grad_fn).__name__ != "FusedRMSBackward"


def test_only_the_input_and_at_most_a_number_a_row_are_kept(either_way: bool) -> None:
    norm, x = RMSNorm(32, eps=1e-6), torch.randn(10, 32, requires_grad=True)
    assert sum(saved_bytes(norm, lambda: norm(x))) == (10 * 32 + (0 if either_way else 10)) * 4
