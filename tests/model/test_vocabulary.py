"""The chunked loss alone: its gradients, what it leaves out, logits at the edge of the precision."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from inl_core.model.vocabulary import ChunkedCrossEntropy, cross_entropy_sum

TOKENS, WIDTH, VOCAB = 7, 5, 11


def factors(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z, W and targets, one of which does not count."""
    torch.manual_seed(0)
    z, weight = torch.randn(TOKENS, WIDTH, dtype=dtype), torch.randn(VOCAB, WIDTH, dtype=dtype)
    targets = torch.randint(VOCAB, (TOKENS,))
    targets[2] = -100
    return z.requires_grad_(), weight.requires_grad_(), targets


@pytest.mark.parametrize("rows", [1, 3, TOKENS, 100])
def test_the_chunked_loss_and_its_gradients_are_the_plain_ones(rows):
    (z, weight, targets), (plain_z, plain_weight, _) = factors(), factors()
    loss = ChunkedCrossEntropy.apply(z, weight, targets, rows, True)
    plain = F.cross_entropy(plain_z @ plain_weight.T, targets, reduction="sum")
    (loss / 3).backward()
    (plain / 3).backward()
    for one, two in ((loss, plain), (z.grad, plain_z.grad), (weight.grad, plain_weight.grad)):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_a_target_of_probability_zero_costs_what_its_logit_says():
    z, weight, targets = factors(torch.float32)
    with torch.no_grad():
        z.mul_(200.0)  # probabilities far below the smallest float32
    plain = F.cross_entropy(z @ weight.T, targets, reduction="sum")
    assert plain > 100
    torch.testing.assert_close(cross_entropy_sum(z, weight, targets), plain, rtol=1e-6, atol=0.0)


def test_without_a_counted_target_the_loss_and_its_gradients_are_zero():
    z, weight, targets = factors()
    loss = cross_entropy_sum(z, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0
    assert z.grad is not None
    assert weight.grad is not None
    assert z.grad.abs().sum() + weight.grad.abs().sum() == 0


def test_logits_that_are_not_finite_give_a_loss_that_is_not():
    z, weight, targets = factors()
    with torch.no_grad():
        z[0] = torch.nan
    assert cross_entropy_sum(z, weight, targets).isnan()


class _Products(TorchDispatchMode):
    """How many matrix products ran."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("frozen", "expected"), [((), 3), (("weight",), 2), (("z",), 2), (("z", "weight"), 1)])
def test_only_the_gradients_that_are_asked_for_are_computed(frozen, expected):
    z, weight, targets = factors()
    z.requires_grad_("z" not in frozen)
    weight.requires_grad_("weight" not in frozen)
    with _Products() as products:
        loss = cross_entropy_sum(z, weight, targets)
    assert products.count == expected
    if expected > 1:
        loss.backward()
    assert (z.grad is None, weight.grad is None) == ("z" in frozen, "weight" in frozen)
    with _Products() as products, torch.no_grad():
        cross_entropy_sum(z, weight, targets)
    assert products.count == 1


def test_a_second_backward_pass_fails_rather_than_counting_twice():
    z, weight, targets = factors()
    loss = cross_entropy_sum(z, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()
