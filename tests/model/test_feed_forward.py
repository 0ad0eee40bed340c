"""The feed-forward's hand-written pass against autograd's of the plain operations."""

import pytest
import torch
from torch import nn

from inl_core.analysis.planning.activations import saved_bytes
from inl_core.model import by_rows, feed_forward
from inl_core.model.feed_forward import FeedForward, gated_down, plain_gated_down
from inl_core.model.norms import RMSNorm
from inl_core.recipe import ModelConfig
from tests.plain_loop import the_plain_loop


@pytest.fixture(autouse=True)
def _many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in chunks of 16."""
    monkeypatch.setattr(feed_forward, "_CHUNK_BYTES", 1)
    monkeypatch.setattr(by_rows, "_MOST_CHUNKS", 1000)


def test_gradients_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    gate_up = torch.randn(19, 6, dtype=torch.float64, requires_grad=True)
    down = nn.Linear(3, 4, bias=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda gate_up, *_: gated_down(gate_up, down), (gate_up, *down.parameters()))


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bf16", [False, True])
def test_the_numbers_are_those_of_the_plain_operations(bias: bool, bf16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = FeedForward(ModelConfig.model_validate({"preset": "v4", "d_model": 32, "num_heads": 2, "bias": bias}))
    x = torch.randn(2, 35, 32, requires_grad=True)
    found = []
    for function in (gated_down, plain_gated_down):
        monkeypatch.setattr(feed_forward, "gated_down", function)
        if function is plain_gated_down:
            monkeypatch.setattr(feed_forward, "supports", lambda _: False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out, _ = network(x)
        found.append((out, *torch.autograd.grad(out.float().square().sum(), (x, *network.parameters()))))
    tolerance = {"atol": 0.02, "rtol": 0.02} if bf16 else {"atol": 1e-5, "rtol": 1e-5}
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        torch.testing.assert_close(ours, plain, **tolerance)


def test_only_gate_and_up_are_kept() -> None:
    network = FeedForward(ModelConfig.model_validate({"preset": "v4", "d_model": 32, "num_heads": 2}))
    gate_up = torch.randn(40, network.up.out_features, requires_grad=True)

    def kept() -> int:
        return sum(saved_bytes(network, lambda: feed_forward.gated_down(gate_up, network.down)))

    assert kept() == gate_up.numel() * 4
    with the_plain_loop():
        assert kept() == 2 * gate_up.numel() * 4


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("wants_norm", [False, True])
def test_with_a_norm_it_is_the_norm_and_then_the_feed_forward(wants_norm: bool) -> None:
    """Both results, and gradients that come back from both."""
    torch.manual_seed(0)
    network = FeedForward(ModelConfig.model_validate({"preset": "v4", "d_model": 32, "num_heads": 2}))
    norm, x = RMSNorm(32, eps=1e-6), torch.randn(2, 150, 32, requires_grad=True)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    upstream, found = torch.randn(2, 2, 150, 32), []
    for together in (True, False):
        product, normed = network(x, norm, wants_norm=wants_norm) if together else (network(norm(x))[0], norm(x))
        assert (normed is not None) == (wants_norm or not together)
        total = (product * upstream[0]).sum()
        if wants_norm:
            total = total + (normed * upstream[1]).sum()
        found.append((product, *torch.autograd.grad(total, (x, norm.weight, *network.parameters()))))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=2e-4)
