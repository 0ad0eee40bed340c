"""The feed-forward network against its formula."""

import math

import pytest
import torch
from torch import Tensor, nn

from inl_core.model.feed_forward import FeedForward
from inl_core.recipe import ModelConfig


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_the_feed_forward_is_its_formula(kind: str, bias: bool) -> None:
    values = {"preset": "v4", "d_model": 32, "num_heads": 2, "bias": bias, "feed_forward": kind}
    network = FeedForward(ModelConfig.model_validate(values)).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.0, 0.3, generator=generator)
    x = torch.randn(2, 5, 32, dtype=torch.float64, generator=generator)
    up = x @ network.up.weight.T + (network.up.bias if bias else 0.0)
    if kind == "swiglu":
        gate, up = up.split(network.down.in_features, dim=-1)
        up = gate / (1 + torch.exp(-gate)) * up
    else:
        up = gelu(up)
    expected = up @ network.down.weight.T + (network.down.bias if bias else 0.0)
    torch.testing.assert_close(network(x), expected, rtol=1e-12, atol=1e-12)
