"""Attention in C++ against the textbook's, written out in double precision."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inl_core.model import IntegratorLanguageModel
from inl_core.model.attention import first_of_document, plan_attention, rotary_tables
from inl_core.model.backends import native
from inl_core.model.native import attention, attention_traced  # noqa: F401  # the operations exist once it is imported
from inl_core.model.native.attention import Given, PackedAttention, attend
from inl_core.recipe import ModelConfig

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no compiler here, or torch has other threads")


def case(
    batch: int, length: int, heads: int, key_heads: int, size: int, *, documents: float = 0.0, seed: int = 0
) -> Given:
    """Drawn queries, keys and values in double precision; a document begins at each token with these odds."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, length, (heads + 2 * key_heads) * size, generator=generator, dtype=torch.float64)
    tables = [table[None].double() for table in rotary_tables(length, size, 10_000.0)]
    ids = (torch.rand(batch, length, generator=generator) < documents).cumsum(1)
    return Given(packed, *tables, first_of_document(ids) if documents else None, heads, key_heads)


def textbook(given: Given) -> Tensor:
    """One query at a time."""
    (batch, length, width), (heads, key_heads) = given.packed.shape, given[4:]
    size = width // (heads + 2 * key_heads)
    parts = given.packed.view(batch, length, -1, size)

    def turned(x: Tensor, b: int, i: int) -> Tensor:
        if given.cosines is None or given.sines is None:
            return x
        row = b % given.cosines.shape[0]
        cos, sin = given.cosines[row, i], given.sines[row, i]
        first, second = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    rows = []
    for b in range(batch):
        for i in range(length):
            seen = range(0 if given.first is None else int(given.first[b, i]), i + 1)
            for h in range(heads):
                k = heads + h // (heads // key_heads)
                query = turned(parts[b, i, h], b, i)
                keys = torch.stack([turned(parts[b, j, k], b, j) for j in seen])
                weights = torch.softmax(keys @ query / math.sqrt(size), 0)
                rows.append(weights @ parts[b, seen.start : i + 1, k + key_heads])
    return torch.stack(rows).view(batch, length, heads * size)


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 70),
    groups=st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]),
    half=st.integers(1, 9),
    documents=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    rotates=st.booleans(),
    seed=st.integers(0, 99),
)
def test_output_and_gradient_are_the_textbooks(batch, length, groups, half, documents, rotates, seed):
    given = case(batch, length, *groups, 2 * half, documents=documents, seed=seed)
    if not rotates:
        given = given._replace(cosines=None, sines=None)
    upstream = torch.randn(
        batch, length, groups[0] * 2 * half, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    found = []
    for function in (attend, textbook):
        own = given._replace(packed=given.packed.clone().requires_grad_())
        out = function(own)
        found += [(out.detach(), *torch.autograd.grad(out, own.packed, upstream))]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("documents", [0.0, 0.004])
def test_more_keys_than_one_chunk(documents):
    """Beyond 512 keys the softmax is put together from parts; single precision against the library's in double."""
    exact = case(2, 1_100, 2, 1, 8, documents=documents)
    given = Given(*(None if value is None else value.float() for value in exact[:3]), *exact[3:])
    slots = torch.arange(1_100)
    first = torch.zeros(2, 1_100, dtype=torch.int64) if exact.first is None else exact.first
    mask = (first[:, :, None] <= slots) & (slots <= slots[:, None])
    own, packed = given.packed.requires_grad_(), exact.packed.requires_grad_()
    query, key, value = packed.view(2, 1_100, 4, 8).transpose(1, 2).split((2, 1, 1), dim=1)
    cos, sin = exact.cosines, exact.sines
    turned = [
        torch.cat((x[..., :4] * cos - x[..., 4:] * sin, x[..., 4:] * cos + x[..., :4] * sin), -1) for x in (query, key)
    ]
    wanted = torch.nn.functional.scaled_dot_product_attention(*turned, value, attn_mask=mask[:, None], enable_gqa=True)
    wanted = wanted.transpose(1, 2).flatten(2)
    out = attend(given._replace(packed=own))
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)
    ours, theirs = torch.autograd.grad(out.sum(), own)[0], torch.autograd.grad(wanted.sum(), packed)[0]
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-5)


def test_tables_of_each_row():
    shared = case(3, 20, 2, 1, 8)
    own = shared._replace(cosines=shared.cosines.repeat(3, 1, 1), sines=shared.sines.repeat(3, 1, 1))
    assert torch.equal(attend(shared), attend(own))
    own.cosines[1] = own.cosines[1].flip(0)
    torch.testing.assert_close(attend(own), textbook(own), rtol=1e-10, atol=1e-12)


def test_it_is_a_proper_operation_of_a_compiled_graph():
    own = case(2, 20, 4, 2, 8, documents=0.1)
    own.packed.requires_grad_()
    found = torch.library.opcheck(torch.ops.inl.attend, tuple(own))
    assert set(found.values()) == {"SUCCESS"}


def test_gradcheck():
    own = case(2, 7, 4, 2, 4, documents=0.3)
    own.packed.requires_grad_()
    assert torch.autograd.gradcheck(lambda packed: PackedAttention.apply(packed, *own[1:]), own.packed)


def test_threads_and_runs_have_the_same_bits():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            given = case(3, 150, 4, 2, 16, documents=0.02)
            packed = given.packed.float().requires_grad_()
            given = Given(packed, *(table.float() for table in given[1:3]), *given[3:])
            out = attend(given)
            found.append((out.detach(), torch.autograd.grad(out.square().sum(), packed)[0]))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


def test_nothing_passes_from_the_future_or_another_document():
    given = case(1, 40, 2, 1, 8)
    given = given._replace(first=first_of_document(torch.arange(40)[None] // 13))
    changed = given.packed.clone()
    changed[:, 26:] *= -1e3
    changed[:, :13] += 7
    before, after = attend(given), attend(given._replace(packed=changed))
    assert torch.equal(before[:, 13:26], after[:, 13:26])
    assert (before[:, :13] != after[:, :13]).any(-1).all()


def test_what_is_not_a_number_stays_so():
    given = case(1, 40, 2, 1, 8)
    given.packed[0, 20, 3] = float("nan")  # a query
    out = attend(given)
    assert out[0, 20, :8].isnan().all()
    assert out.isnan().sum() == 8


def test_a_first_token_out_of_bounds_reads_nothing_beyond_them():
    given = case(1, 5, 1, 1, 4)
    for wrong, right in ((-7, 0), (99, None)):
        first = torch.full((1, 5), wrong)
        legal = torch.arange(5)[None] if right is None else torch.full((1, 5), right)
        assert torch.equal(attend(given._replace(first=first)), attend(given._replace(first=legal)))


def test_scores_too_large_for_exp_are_not_infinite():
    given = case(1, 40, 1, 1, 8)
    given = given._replace(
        packed=(100 * given.packed).float(), cosines=given.cosines.float(), sines=given.sines.float()
    )
    exact = Given(*(None if value is None else value.double() for value in given[:3]), *given[3:])
    torch.testing.assert_close(attend(given).double(), textbook(exact), rtol=1e-3, atol=1e-2)


def test_a_model_trains_alike_by_either_way(monkeypatch):
    """Documents, positions that restart, grouped queries."""
    keys = {"preset": "v4", "d_model": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 50}
    config = ModelConfig.model_validate({**keys, "max_seq_len": 80})
    ids = torch.randint(0, 50, (3, 80), generator=torch.Generator().manual_seed(0))
    documents = torch.arange(80).expand(3, 80) // torch.tensor([[17], [80], [1]])
    positions = torch.arange(80) - first_of_document(documents)
    found = []
    for is_native in (True, False):
        monkeypatch.setattr("inl_core.model.attention.has_native", lambda is_native=is_native: is_native)
        model = IntegratorLanguageModel(config)
        model.initialise(0)
        hidden = model.train()(ids, positions=positions, document_ids=documents).hidden
        model.loss_sum(hidden, ids).backward()
        found.append([hidden.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)


def test_who_attends_where():
    ids = torch.zeros(1, 4, dtype=torch.int64)
    rest = {"positions": None, "document_ids": ids, "cache": None}
    assert plan_attention(ids, torch.float32, **rest).is_native
    assert not plan_attention(ids, torch.bfloat16, **rest).is_native
    assert not plan_attention(ids.to("meta"), torch.float32, **{**rest, "document_ids": None}).is_native
    with torch.autocast("cpu", torch.bfloat16):
        plan = plan_attention(ids, torch.float32, **rest)
    assert not plan.is_native
    assert plan.mask is not None
    assert torch.equal(plan.mask[0, 0], torch.ones(4, 4).tril().bool())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": 3}, "are not 3 queries"),
        ({"cosines": torch.zeros(1, 9, 4, dtype=torch.float64)}, "cosines is"),
        ({"sines": torch.zeros(1, 10, 4)}, "sines is torch.float32"),
        ({"first": torch.zeros(2, 9, dtype=torch.int64)}, "first is"),
        ({"first": torch.zeros(2, 10)}, "first is torch.float32"),
        ({"packed": torch.zeros(2, 10, 4 * 7, dtype=torch.float64)}, "heads of 7 numbers"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(change, message):
    with pytest.raises(ValueError, match=f"attention: .*{message}"):
        attention.forward(case(2, 10, 2, 1, 8)._replace(**change))


def test_no_tokens_at_all():
    given = case(2, 10, 2, 1, 8)
    empty = Given(given.packed[:0], given.cosines, given.sines, None, 2, 1)
    assert attend(empty).shape == (0, 10, 16)
