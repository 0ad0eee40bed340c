"""One table for embedding and head: its gradient is the plain one, and there is no second one of its size."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from inl_core.model import IntegratorLanguageModel
from inl_core.model.shared_table import share
from inl_core.recipe import ModelConfig

VOCAB, WIDTH = 50, 6
SMALL = {"preset": "v4", "d_model": 32, "num_layers": 2, "num_heads": 2}


def build(**more: object) -> IntegratorLanguageModel:
    """A small model with its starting weights."""
    model = IntegratorLanguageModel(ModelConfig.model_validate({**SMALL, **more}).with_vocab_size(VOCAB))
    model.initialise(0)
    return model


class _Tables(TorchDispatchMode):
    """The storages as large as the table that operations wrote."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.layout == torch.strided:
            storage = out.untyped_storage()
            if storage.nbytes() == 4 * VOCAB * WIDTH:
                self.found[storage.data_ptr()] = storage  # held: an address must stay taken
        return out


def test_both_gradients_are_summed_in_the_head_s():
    torch.manual_seed(0)
    weight, ids = torch.randn(VOCAB, WIDTH, requires_grad=True), torch.randint(VOCAB, (9,))
    at, by = torch.randn(9, WIDTH), torch.randn(VOCAB, WIDTH)
    lookup, head = share(weight) or (weight, weight)
    loss = (F.embedding(ids, lookup, sparse=True) * at).sum() + (head * by).sum()
    with _Tables() as tables:
        loss.backward()
    assert len(tables.found) == 1
    expected = by.index_add(0, ids, at)
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, expected)


@pytest.mark.parametrize("more", [{}, {"embedding_rank": 8}, {"tie_head": False}])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_model_s_gradients_are_those_without_a_shared_table(more, passes, monkeypatch):
    ids = torch.randint(VOCAB, (3, 8), generator=torch.Generator().manual_seed(0))
    found = []
    for plain in (False, True):
        model = build(**more)
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr("inl_core.model.language_model.share", lambda weight: None)
            for _ in range(passes):
                output = model(ids)
                assert (output.table is None) == (plain or more == {"tie_head": False})
                model.loss_sum(output.hidden, ids, output.table).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        assert gradient is not None
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-5)


def test_a_loss_that_leaves_out_the_table_still_gives_dense_gradients():
    model, ids = build(), torch.arange(8)[None]
    output = model(ids)
    model.loss_sum(output.hidden, ids).backward()
    once = model.embedding.table.weight.grad.clone()
    model.zero_grad()
    output = model(ids)
    output.hidden.square().sum().backward()
    assert model.embedding.table.weight.grad.layout == torch.strided
    model.zero_grad()
    output = model(ids)
    model.loss_sum(output.hidden.detach(), ids, output.table).backward()  # the head's alone
    head_alone = model.embedding.table.weight.grad
    assert 0 < head_alone.norm() < once.norm() + head_alone.norm()


def test_without_gradients_or_off_the_cpu_nothing_is_shared():
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    with torch.no_grad():
        assert share(weight) is None
    assert share(weight.detach()) is None
    assert share(torch.empty(VOCAB, WIDTH, device="meta", requires_grad=True)) is None
