"""The loss over the vocabulary in chunks, and the one gradient of a table that is used twice."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from inl_core.corpus.loader import Batch
from inl_core.inference.evaluate import evaluate
from inl_core.kernels import apply
from inl_core.kernels import loss as losses
from inl_core.kernels.loss import ChunkedLoss, OwnLoss, SharedLookup
from inl_core.model.embedding import VocabularyLoss
from tests.kernels.native import assert_alike, build_model, draw, losses_and_gradients, some_ids

TOKENS, WIDTH, VOCAB = 7, 5, 11
every_loss = pytest.mark.parametrize(
    "loss", [VocabularyLoss(), ChunkedLoss(), OwnLoss()], ids=["plain", "torch", "own"]
)
of_chunks = pytest.mark.parametrize("loss", [ChunkedLoss(), OwnLoss()], ids=["torch", "own"])


def factors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """z, W and targets, one of which does not count."""
    generator = torch.Generator().manual_seed(0)
    z, weight = (torch.randn(rows, WIDTH, dtype=dtype, generator=generator) for rows in (TOKENS, VOCAB))
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    targets[2] = -100
    return z.requires_grad_(), weight.requires_grad_(), targets


def by_hand(z: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    counted = targets >= 0
    return -(z @ weight.T).log_softmax(-1)[counted, targets[counted]].sum()


@of_chunks
@pytest.mark.parametrize("rows", [1, 3, TOKENS, 100])
def test_the_loss_and_its_gradients_are_the_definition_s(rows, loss):
    z, weight, targets = factors()
    found = [loss.in_chunks(z, weight, targets, rows), by_hand(z, weight, targets)]
    gradients = [torch.autograd.grad(value / 3, (z, weight)) for value in found]
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)


@every_loss
def test_a_target_of_probability_zero_costs_what_its_logit_says(loss):
    z, weight, targets = factors(torch.float32)
    with torch.no_grad():
        z.mul_(200.0)  # probabilities far below the smallest float32
    plain = by_hand(z.double(), weight.double(), targets)
    assert plain > 100
    torch.testing.assert_close(loss(z, weight, targets).double(), plain, rtol=1e-6, atol=0.0)


@every_loss
def test_without_a_counted_target_the_loss_and_its_gradients_are_zero(loss):
    z, weight, targets = factors()
    found = loss(z, weight, torch.full_like(targets, -100))
    assert found == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(found, (z, weight)))


@every_loss
def test_logits_that_are_not_finite_give_a_loss_that_is_not(loss):
    z, weight, targets = factors()
    with torch.no_grad():
        z[0] = torch.nan
    assert loss(z, weight, targets).isnan()


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
        loss = OwnLoss()(z, weight, targets)
    assert products.count == expected
    if expected > 1:
        loss.backward()
    assert (z.grad is None, weight.grad is None) == ("z" in frozen, "weight" in frozen)
    with _Products() as products, torch.no_grad():
        OwnLoss()(z, weight, targets)
    assert products.count == 1


def test_a_second_backward_pass_fails_unless_the_graph_is_retained():
    z, weight, targets = factors()
    loss = OwnLoss()(z, weight, targets)
    once = torch.autograd.grad(loss, (z, weight), retain_graph=True)
    (3 * loss).backward()
    for gradient, one in zip((z.grad, weight.grad), once, strict=True):
        torch.testing.assert_close(gradient, 3 * one)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@every_loss
def test_a_target_beyond_the_vocabulary_is_refused(loss):
    z, weight, targets = factors()
    targets[1] = VOCAB
    with pytest.raises((IndexError, RuntimeError), match=r"out of (bounds|range)"):
        loss(z, weight, targets)


@of_chunks
def test_a_large_vocabulary_in_single_precision_is_the_plain_loss(loss):
    """Sums of many small probabilities."""
    generator = torch.Generator().manual_seed(0)
    z, weight = torch.randn(300, 32, generator=generator), torch.randn(3_000, 32, generator=generator)
    targets = torch.randint(3_000, (300,), generator=generator)
    exact = [value.double().requires_grad_() for value in (z, weight)]
    plain = by_hand(*exact, targets)
    found = loss(z.requires_grad_(), weight.requires_grad_(), targets)
    torch.testing.assert_close(found.double(), plain, rtol=1e-6, atol=0.0)
    pairs = zip(torch.autograd.grad(found, (z, weight)), torch.autograd.grad(plain, exact), strict=True)
    for gradient, expected in pairs:
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [lambda targets: targets.int(), lambda targets: targets[1:], lambda targets: targets.repeat(1, 2)],
    ids=["precision", "fewer", "more"],
)
@pytest.mark.parametrize("is_plain", [True, False])
def test_targets_that_are_not_one_for_each_state_are_refused(change, is_plain):
    model, ids = build_model(), some_ids()
    apply(model, operations="plain" if is_plain else "auto")
    with pytest.raises(ValueError, match="one for each row"):
        model.loss_sum(model(ids).hidden, change(ids))


def test_factors_that_lie_otherwise_in_memory():
    z, weight, targets = factors()
    loss = OwnLoss()(z.T.contiguous().T, weight.T.contiguous().T, targets)
    found = torch.autograd.grad(loss, (z, weight))
    torch.testing.assert_close(found, torch.autograd.grad(by_hand(z, weight, targets), (z, weight)))


@pytest.mark.parametrize("circumstance", ["bfloat16", "autocast", "another device"])
def test_what_our_own_loss_cannot_do_is_done_by_torch_s(circumstance, monkeypatch):
    monkeypatch.setattr(losses, "CrossEntropy", None)
    z, weight, targets = (value.detach() for value in factors(torch.float32))
    expected = by_hand(z, weight, targets)
    if circumstance == "bfloat16":
        found = OwnLoss()(z.bfloat16(), weight.bfloat16(), targets)
    elif circumstance == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            found = OwnLoss()(z, weight, targets)
    else:
        assert OwnLoss()(z.to("meta"), weight.to("meta"), targets.to("meta")).shape == ()
        return
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


def test_products_in_low_precision_are_summed_in_float32():
    """As on a GPU under autocast: each factor is rounded, and nothing else."""
    z, weight, targets = factors(torch.float32)
    loss = losses.CrossEntropy.apply(z, weight, targets, 3, True, torch.bfloat16)
    rounded = [value.detach().bfloat16().double().requires_grad_() for value in (z, weight)]
    expected = by_hand(*rounded, targets)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0.0)
    pairs = zip(torch.autograd.grad(loss, (z, weight)), torch.autograd.grad(expected, rounded), strict=True)
    for gradient, exact in pairs:  # which are sums of products of slopes, rounded to 8 bits
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient.double(), exact, rtol=1e-2, atol=1e-2 * exact.abs().max().item())


def test_on_a_gpu_the_factors_are_those_of_the_pass(monkeypatch):
    asked = []
    monkeypatch.setattr(losses.CrossEntropy, "apply", lambda *given: asked.append(given[-1]))
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    z, weight, targets = (_OnGpu(value.detach()) for value in factors(torch.float32))
    for is_autocast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda device, is_autocast=is_autocast: is_autocast)
        OwnLoss().in_chunks(z, weight, targets, 3)
        assert asked.pop() is expected


class _OnGpu:
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda")

    def __init__(self, tensor: Tensor) -> None:
        self.dtype, self.shape = tensor.dtype, tensor.shape


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation gave, and the storages of one size that operations wrote."""

    def __init__(self, table_bytes: int = -1) -> None:
        super().__init__()
        self.elements, self.table_bytes = 0, table_bytes
        self.tables: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
                storage = value.untyped_storage()
                if storage.nbytes() == self.table_bytes:
                    self.tables[storage.data_ptr()] = storage  # held: an address must stay taken
        return result


@pytest.mark.parametrize("tied", [True, False])
def test_training_and_evaluation_hold_the_logits_of_some_rows_only(monkeypatch, tied):
    monkeypatch.setattr(losses, "_FEWEST_ROWS", 8)
    monkeypatch.setattr(losses, "_CHUNK_BYTES", {"cpu": 64 * 4 * 5000})  # 64 rows
    model, ids = build_model("v4", tie_head=tied, vocab_size=5000), some_ids(8, 64)
    apply(model)
    with _Largest() as training:
        model.loss_sum(model(ids).hidden, ids).backward()
    with _Largest() as evaluation:
        evaluate(model.eval(), [Batch(ids.numpy(), ids.numpy())], np.ones(5000))
    for found in (training, evaluation):
        assert 64 * 5000 <= found.elements < ids.numel() * 5000 // 4


def test_more_room_than_the_smallest_chunk_is_used():
    assert losses.logit_rows(2048, torch.device("cpu")) == 4096  # 32 MiB of float32
    assert losses.logit_rows(50304, torch.device("cpu")) == 256
    assert losses.logit_rows(50304, torch.device("cuda")) == 1334


# One table for embedding and head.


def test_both_gradients_are_summed_in_the_head_s():
    weight, ids = draw(50, 6).float().requires_grad_(), some_ids(1, 9)[0]
    at, by = draw(9, 6, seed=1).float(), draw(50, 6, seed=2).float()
    rows, head = SharedLookup()(ids, weight)
    loss = (rows * at).sum() + (head * by).sum()
    with _Largest(table_bytes=4 * 50 * 6) as written:
        loss.backward()
    assert len(written.tables) == 1
    torch.testing.assert_close(weight.grad, by.index_add(0, ids, at))


@pytest.mark.parametrize("more", [{}, {"embedding_rank": 8}, {"tie_head": False}])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_model_s_gradients_are_those_without_a_shared_table(more, passes):
    found = []
    for operations in ("auto", "plain"):
        model, ids = build_model("v4", **more), some_ids()
        apply(model, operations=operations)
        assert (type(model.embedding.lookup) is SharedLookup) == (operations == "auto" and "tie_head" not in more)
        for _ in range(passes):
            output = model(ids)
            model.loss_sum(output.hidden, ids, output.table).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert None not in found[0].values()
    assert_alike(*found, rtol=1e-3, atol=1e-3)  # of losses that are sums


def test_a_loss_that_leaves_out_the_table_gives_the_same_gradient():
    model, ids = build_model(), some_ids()
    apply(model)
    with_table = losses_and_gradients(model, ids)
    model.zero_grad()
    (model.loss_sum(model(ids).hidden, ids) / ids.numel()).backward()
    gradient = model.embedding.table.weight.grad
    assert gradient.layout == torch.strided
    torch.testing.assert_close(gradient, with_table["embedding.table.weight"], rtol=1e-4, atol=1e-6)


def test_the_table_s_parts_may_be_used_alone():
    model, ids = build_model(), some_ids()
    apply(model)
    output = model(ids)
    output.hidden.square().sum().backward()  # the embedding's alone
    assert model.embedding.table.weight.grad.layout == torch.strided
    model.zero_grad()
    output = model(ids)
    model.loss_sum(output.hidden.detach(), ids, output.table).backward()  # the head's alone
    head_alone = model.embedding.table.weight.grad
    own = model.embedding.table.weight.detach().clone().requires_grad_()
    expected = by_hand(model.head_factors(output.hidden.detach())[0].flatten(0, -2), own, ids.flatten())
    torch.testing.assert_close(head_alone, torch.autograd.grad(expected, own)[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("circumstance", ["no gradients", "a frozen table", "another device"])
def test_without_gradients_or_off_the_cpu_nothing_is_shared(circumstance):
    weight, ids = torch.randn(50, 6, requires_grad=circumstance != "a frozen table"), torch.arange(9)
    if circumstance == "another device":
        weight, ids = torch.empty(50, 6, device="meta", requires_grad=True), ids.to("meta")
    with torch.set_grad_enabled(circumstance != "no gradients"):
        rows, table = SharedLookup()(ids, weight)
    assert table is weight
    if circumstance != "another device":
        torch.testing.assert_close(rows, F.embedding(ids, weight))


@every_loss
def test_a_negative_target_that_is_not_the_ignored_one_is_an_error(loss):
    z, weight = torch.randn(3, WIDTH, requires_grad=True), torch.randn(VOCAB, WIDTH)
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        loss(z, weight, torch.tensor([1, -1, 2]))


@every_loss
def test_weights_of_low_precision_give_a_sum_of_single_precision(loss):
    z, weight, targets = torch.randn(400, WIDTH), torch.randn(VOCAB, WIDTH), torch.randint(VOCAB, (400,))
    low = loss(z.bfloat16(), weight.bfloat16(), targets)
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(loss(z, weight, targets).item(), rel=5e-3)
