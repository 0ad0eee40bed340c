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


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize("rows", [1, 3, TOKENS, 100])
def test_the_chunked_loss_and_its_gradients_are_the_plain_ones(rows, is_small, monkeypatch):
    """Of a head that is small, and of one in chunks."""
    if not is_small:
        monkeypatch.setattr("inl_core.model.native.head.supports", lambda *_: False)
    (z, weight, targets), (plain_z, plain_weight, _) = factors(), factors()
    loss = ChunkedCrossEntropy.apply(z, weight, targets, rows, True)
    plain = F.cross_entropy(plain_z @ plain_weight.T, targets, reduction="sum")
    (loss / 3).backward()
    (plain / 3).backward()
    for one, two in ((loss, plain), (z.grad, plain_z.grad), (weight.grad, plain_weight.grad)):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("either_way")
def test_a_target_of_probability_zero_costs_what_its_logit_says():
    z, weight, targets = factors(torch.float32)
    with torch.no_grad():
        z.mul_(200.0)  # probabilities far below the smallest float32
    plain = F.cross_entropy(z @ weight.T, targets, reduction="sum")
    assert plain > 100
    torch.testing.assert_close(cross_entropy_sum(z, weight, targets), plain, rtol=1e-6, atol=0.0)


@pytest.mark.usefixtures("either_way")
def test_without_a_counted_target_the_loss_and_its_gradients_are_zero():
    z, weight, targets = factors()
    loss = cross_entropy_sum(z, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0
    assert z.grad is not None
    assert weight.grad is not None
    assert z.grad.abs().sum() + weight.grad.abs().sum() == 0


@pytest.mark.usefixtures("either_way")
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
def test_only_the_gradients_that_are_asked_for_are_computed(frozen, expected, monkeypatch):
    monkeypatch.setattr("inl_core.model.native.head.supports", lambda *_: False)
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


def test_a_second_backward_pass_fails_unless_the_graph_is_retained():
    z, weight, targets = factors()
    loss = cross_entropy_sum(z, weight, targets)
    once = torch.autograd.grad(loss, (z, weight), retain_graph=True)
    (3 * loss).backward()
    for gradient, one in zip((z.grad, weight.grad), once, strict=True):
        torch.testing.assert_close(gradient, 3 * one)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("frozen", [(), ("weight",), ("z",), ("z", "weight")])
def test_gradients_that_are_not_asked_for_are_not_there(frozen):
    z, weight, targets = factors()
    z.requires_grad_("z" not in frozen)
    weight.requires_grad_("weight" not in frozen)
    loss = cross_entropy_sum(z, weight, targets)
    if len(frozen) < 2:
        loss.backward()
    assert (z.grad is None, weight.grad is None) == ("z" in frozen, "weight" in frozen)
    torch.testing.assert_close(loss, F.cross_entropy(z @ weight.T, targets, reduction="sum"), rtol=1e-12, atol=0.0)


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("is_small", [True, False])
def test_a_target_beyond_the_vocabulary_is_refused(is_small, monkeypatch):
    if not is_small:
        monkeypatch.setattr("inl_core.model.native.head.supports", lambda *_: False)
    z, weight, targets = factors()
    targets[1] = VOCAB
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        cross_entropy_sum(z, weight, targets)


@pytest.mark.usefixtures("either_way")
def test_a_large_vocabulary_in_single_precision_is_the_plain_loss(monkeypatch):
    """Sums of many small probabilities, by tiles and by chunks."""
    torch.manual_seed(0)
    z, weight, targets = torch.randn(300, 32), torch.randn(3_000, 32), torch.randint(3_000, (300,))
    plain_z, plain_weight = z.double().requires_grad_(), weight.double().requires_grad_()
    plain = F.cross_entropy(plain_z @ plain_weight.T, targets, reduction="sum")
    plain.backward()
    for is_small in (True, False):
        if not is_small:
            monkeypatch.setattr("inl_core.model.native.head.supports", lambda *_: False)
        own_z, own_weight = z.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = cross_entropy_sum(own_z, own_weight, targets)
        loss.backward()
        torch.testing.assert_close(loss.double(), plain, rtol=1e-6, atol=0.0)
        torch.testing.assert_close(own_z.grad.double(), plain_z.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(own_weight.grad.double(), plain_weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("is_small", [True, False])
@pytest.mark.parametrize(
    "change",
    [lambda targets: targets.int(), lambda targets: targets[1:], lambda targets: targets[:, None].expand(-1, 2)],
    ids=["precision", "fewer", "more"],
)
def test_targets_that_are_not_one_for_each_row_are_refused(change, is_small, monkeypatch):
    if not is_small:
        monkeypatch.setattr("inl_core.model.native.head.supports", lambda *_: False)
    z, weight, targets = factors()
    with pytest.raises((ValueError, RuntimeError)):
        cross_entropy_sum(z, weight, change(targets))


@pytest.mark.usefixtures("either_way")
def test_factors_that_lie_otherwise_in_memory():
    z, weight, targets = factors()
    loss = cross_entropy_sum(z.T.contiguous().T, weight.T.contiguous().T, targets)
    of_z, of_weight = torch.autograd.grad(loss, (z, weight))
    plain = torch.autograd.grad(F.cross_entropy(z @ weight.T, targets, reduction="sum"), (z, weight))
    torch.testing.assert_close((of_z, of_weight), plain, rtol=1e-12, atol=1e-12)
