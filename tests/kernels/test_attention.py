"""Attention in C++ against the textbook's, written out in double precision."""

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import inl_core.kernels.attention  # noqa: F401 - the operation exists once it is imported
from inl_core.kernels.attention import CppAttention, DocumentStarts
from inl_core.model import plain_operations
from inl_core.model.attention import first_of_document
from inl_core.recipe import ModelConfig
from tests.kernels.native import (
    PRODUCTS,
    OwnOperations,
    assert_alike,
    build_model,
    losses_and_gradients,
    needs_library,
    put_own,
    some_ids,
)
from tests.model.test_attention import Case, any_case, assert_alike_with_gradients, by_the_model, make_case, textbook

pytestmark = needs_library


def attend(case: Case, product: str = "MKL") -> Tensor:
    return torch.ops.inl.attention(*case, product)[0]


def in_single(case: Case) -> Case:
    return Case(*(None if value is None else value.float() for value in case[:3]), *case[3:])


@settings(max_examples=25, deadline=None)
@given(any_case(longest=40))
def test_output_and_gradient_are_the_textbooks(case):
    assert_alike_with_gradients(attend, textbook, case)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("documents", [0.0, 0.004])
def test_more_keys_than_one_chunk(documents, product):
    """Beyond 512 keys the softmax is put together from parts; in single precision against the model's in double."""
    exact = make_case(2, 1_100, 2, 1, 8, documents=documents)

    def ours(case: Case) -> Tensor:
        return attend(in_single(case), product).double()

    assert_alike_with_gradients(ours, by_the_model, exact, rtol=1e-4, atol=2e-5)


def test_tables_of_each_row():
    shared = make_case(3, 20, 2, 1, 8)
    own = shared._replace(cosines=shared.cosines.repeat(3, 1, 1), sines=shared.sines.repeat(3, 1, 1))
    torch.testing.assert_close(attend(shared), attend(own), rtol=1e-12, atol=1e-12)
    own.cosines[1] = own.cosines[1].flip(0)
    torch.testing.assert_close(attend(own), textbook(own), rtol=1e-10, atol=1e-12)


def test_it_is_a_proper_operation_of_torch():
    own = make_case(2, 20, 4, 2, 8, documents=0.1)
    own.packed.requires_grad_()
    found = torch.library.opcheck(torch.ops.inl.attention, (*own, "MKL"))
    assert set(found.values()) == {"SUCCESS"}
    out, log_sums = torch.ops.inl.attention(*own, "MKL")
    given = (own.packed.detach(), *own[1:], "MKL", out.detach(), log_sums.detach(), torch.ones_like(out))
    found = torch.library.opcheck(torch.ops.inl.attention_backward, given)
    assert set(found.values()) == {"SUCCESS"}


def test_gradcheck():
    own = make_case(2, 7, 4, 2, 4, documents=0.3)
    own.packed.requires_grad_()
    assert torch.autograd.gradcheck(lambda packed: attend(own._replace(packed=packed)), own.packed)


def test_any_number_of_threads_gives_the_same_up_to_rounding():
    threads, found = torch.get_num_threads(), []
    case = make_case(3, 150, 4, 2, 16, documents=0.02)
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            own = in_single(case)._replace(packed=case.packed.float().requires_grad_())
            out = attend(own)
            found.append((out.detach(), torch.autograd.grad(out.square().sum(), own.packed)[0]))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-6)


def test_nothing_passes_from_the_future_or_another_document():
    case = make_case(1, 40, 2, 1, 8)
    case = case._replace(first=first_of_document(torch.arange(40)[None] // 13))
    changed = case.packed.clone()
    changed[:, 26:] *= -1e3
    changed[:, :13] += 7
    before, after = attend(case), attend(case._replace(packed=changed))
    torch.testing.assert_close(before[:, 13:26], after[:, 13:26], rtol=1e-12, atol=1e-12)
    assert (before[:, :13] != after[:, :13]).any(-1).all()


def test_what_is_not_a_number_stays_so():
    case = make_case(1, 40, 2, 1, 8)
    case.packed[0, 20, 3] = float("nan")  # a query
    case.packed.requires_grad_()
    out = attend(case)
    assert out[0, 20, :8].isnan().all()
    assert out.isnan().sum() == 8
    (gradient,) = torch.autograd.grad(out.sum(), case.packed)
    assert gradient[0, 20].isnan().any()


def test_a_first_token_out_of_bounds_reads_nothing_beyond_them():
    case = make_case(1, 5, 1, 1, 4)
    for wrong, right in ((-7, 0), (99, None)):
        first = torch.full((1, 5), wrong)
        legal = torch.arange(5)[None] if right is None else torch.full((1, 5), right)
        torch.testing.assert_close(attend(case._replace(first=first)), attend(case._replace(first=legal)))


def test_scores_too_large_for_exp_are_not_infinite():
    case = make_case(1, 40, 1, 1, 8)
    case = in_single(case._replace(packed=100 * case.packed))
    exact = Case(*(None if value is None else value.double() for value in case[:3]), *case[3:])
    torch.testing.assert_close(attend(case).double(), textbook(exact), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_model_trains_alike_with_documents_and_positions_that_restart(product):
    model, ids = build_model("v4", num_kv_heads=2), some_ids(3, 60)
    documents = torch.arange(60).expand(3, 60) // torch.tensor([[17], [60], [1]])
    given = {"document_ids": documents, "positions": torch.arange(60) - first_of_document(documents)}
    plain = losses_and_gradients(model, ids, **given)
    assert_alike(losses_and_gradients(put_own(model, product), ids, **given), plain)


def test_documents_are_kept_apart_also_in_a_precision_that_the_operation_lacks():
    model, ids = build_model("v4", num_kv_heads=2), some_ids(2, 12)
    documents, found = torch.arange(12).expand(2, 12) // 5, []
    for way in (lambda model: model, put_own):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(way(model)(ids, document_ids=documents).hidden)
    torch.testing.assert_close(found[0], found[1], rtol=0.05, atol=0.05)


def module() -> CppAttention:
    """Two heads of 8 and one key head."""
    return CppAttention(ModelConfig.model_validate({"d_model": 16, "num_heads": 2, "num_kv_heads": 1}), "MKL")


@pytest.mark.parametrize("circumstance", ["double", "single", "bfloat16", "plain operations"])
def test_the_model_s_own_attention_computes_what_the_operation_cannot(circumstance):
    case, attention = make_case(2, 10, 2, 1, 8), module()
    packed = case.packed.float() if circumstance == "single" else case.packed
    packed = packed.bfloat16() if circumstance == "bfloat16" else packed
    rotary = (case.cosines.unsqueeze(-2), case.sines.unsqueeze(-2))
    with OwnOperations() as ran:
        if circumstance == "plain operations":
            with plain_operations():
                out = attention(packed, rotary, DocumentStarts()(torch.zeros(2, 10), None, None), None)
        else:
            out = attention(packed, rotary, None, None)
    assert ran.found == (["attention"] if circumstance in ("double", "single") else [])
    assert out.dtype == packed.dtype
    tolerance = {"double": 1e-10, "plain operations": 1e-10, "single": 1e-5}.get(circumstance, 0.05)
    torch.testing.assert_close(out.double(), textbook(case), rtol=tolerance, atol=tolerance)


def test_with_a_cache_the_model_s_own_attention_runs():
    model, ids = put_own(build_model("v4", num_kv_heads=2)).eval(), some_ids(1, 6)
    with OwnOperations() as ran, torch.no_grad():
        cached = model(ids, cache=model.new_cache(1, 6)).hidden
        assert "attention" not in ran.found
        torch.testing.assert_close(cached, model(ids).hidden, rtol=1e-4, atol=1e-5)


def test_the_mask_is_the_plain_one_where_a_cache_or_plain_operations_ask_for_it():
    ids, documents, starts = torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[0, 0, 1, 1]]), DocumentStarts()
    assert starts(ids, documents, None).tolist() == [[0, 0, 2, 2]]
    assert starts(ids, None, None).tolist() == [[0, 0, 0, 0]]
    with plain_operations():
        mask = starts(ids, documents, None)
    assert mask.dtype == torch.bool
    assert mask.shape == (1, 1, 4, 4)


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
        attend(make_case(2, 10, 2, 1, 8)._replace(**change))


def test_no_tokens_at_all():
    case = make_case(2, 10, 2, 1, 8)
    empty = Case(case.packed[:0].requires_grad_(), case.cosines, case.sines, None, 2, 1)
    out = attend(empty)
    assert out.shape == (0, 10, 16)
    out.sum().backward()


def test_its_arithmetic_is_counted():
    """As the library counts its own: scores and mixtures over all keys, and 2.5 times that in the backward pass."""
    case = make_case(2, 10, 4, 2, 8)
    own = case._replace(packed=case.packed.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        attend(own).sum().backward()
    assert counter.get_total_flops() == 4 * 2 * 10 * 10 * 32 * 7 // 2


def test_a_compiler_sees_the_same_operation():
    torch._dynamo.reset()
    attention, case, graphs = module(), make_case(2, 20, 2, 1, 8), []

    def backend(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    rotary = (case.cosines.unsqueeze(-2), case.sines.unsqueeze(-2))
    out = compiled(case.packed.requires_grad_(), rotary, None, None)
    out.sum().backward()
    torch.testing.assert_close(out, textbook(case), rtol=1e-10, atol=1e-12)
    assert len(graphs) == 1
    assert any("inl.attention" in name for name in graphs[0])
