"""Attention inside documents by flex_attention, against the same with a mask of every pair."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask

from inl_core.kernels import Choice, choose, put
from inl_core.kernels import documents as flex
from inl_core.kernels.apply import FLEX
from inl_core.kernels.documents import DocumentBlocks, block_mask
from inl_core.model.attention import InnerAttention, Visibility, first_of_document
from inl_core.model.derivatives import plain_operations
from tests.kernels.native import build_model, some_ids

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
TORCH = Choice("torch", "asked for by a test")


def some_documents(rows: int, length: int, chance: float = 0.02) -> torch.Tensor:
    """Numbers of documents, of about 1 / chance tokens each; the first row is one document."""
    starts = torch.rand(rows, length, generator=torch.Generator().manual_seed(0)) < chance
    starts[0] = False
    return starts.int().cumsum(1)


def dense(mask: BlockMask, first: torch.Tensor) -> torch.Tensor:
    """Which pairs the blocks let through: all of a whole block, of a part those that the mask's function lets."""
    length = first.shape[1]
    queries, keys = torch.arange(length)[:, None], torch.arange(length)
    rows = torch.arange(len(first))[:, None, None]
    allowed = mask.mask_mod(rows, torch.zeros_like(rows), queries, keys)

    def blocks(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        seen = torch.zeros(*indices.shape[:1], *indices.shape[2:], dtype=torch.bool)
        for row, query_block, place in (torch.arange(indices.shape[-1]) < counts[:, 0, :, None]).nonzero().tolist():
            seen[row, query_block, indices[row, 0, query_block, place]] = True
        return seen.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :length, :length]

    assert mask.full_kv_num_blocks is not None
    assert mask.full_kv_indices is not None
    return (blocks(mask.kv_num_blocks, mask.kv_indices) & allowed) | blocks(
        mask.full_kv_num_blocks, mask.full_kv_indices
    )


@pytest.mark.parametrize("length", [128, 700])
@pytest.mark.parametrize("chance", [0.0, 0.003, 0.05, 1.0])
def test_the_blocks_let_through_exactly_what_a_token_sees(length, chance):
    ids = some_documents(3, length, chance)
    mask = block_mask(first_of_document(ids))
    assert torch.equal(dense(mask, ids), Visibility()(ids, ids, None)[:, 0])


def test_blocks_that_nobody_sees_are_left_out():
    half = torch.arange(1024)[None] // 512  # two documents: of 8 x 8 blocks each sees its own lower triangle
    mask = block_mask(first_of_document(half))
    assert int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) == 2 * 10
    assert int(mask.full_kv_num_blocks.sum()) == 2 * 6


@torch.no_grad()  # on a CPU flex_attention has no backward pass
@pytest.mark.parametrize("preset", ["v5", "v4"])
@pytest.mark.parametrize("heads", [{}, {"num_kv_heads": 2}], ids=["as many key heads", "fewer key heads"])
def test_a_model_computes_the_same_as_with_a_mask_of_every_pair(preset, heads):
    model, ids = build_model(preset, d_model=64, max_seq_len=200, **heads), some_ids(3, 200)
    plain = dict.fromkeys(("attention", "integrator", "loss"), TORCH)
    for documents in (some_documents(3, 200), None):
        put(model, plain)
        expected = model(ids, document_ids=documents).hidden
        put(model, plain | {"attention": Choice(FLEX, "asked for by a test")})
        torch.testing.assert_close(model(ids, document_ids=documents).hidden, expected)


def test_what_flex_attention_cannot_do_is_done_with_the_usual_mask():
    model, ids = build_model("v5"), some_ids(2, 40)
    documents = some_documents(2, 40, 0.1)
    visibility = DocumentBlocks()
    with plain_operations():
        assert torch.equal(visibility(ids, documents, None), Visibility()(ids, documents, None))
    cache = model.new_cache(2, 64)
    cache.padding = torch.tensor([0, 3])
    assert torch.equal(visibility(ids, None, cache), Visibility()(ids, None, cache))
    assert visibility(ids, None, None) is None


@pytest.mark.parametrize(
    ("head_dim", "has_triton", "way"), [(16, True, FLEX), (8, True, "torch"), (16, False, "torch")]
)
def test_it_is_chosen_for_a_gpu_that_can_run_it(head_dim, has_triton, way, monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: has_triton)
    config = build_model("v5", d_model=4 * head_dim).config
    assert choose(config, torch.device("cuda"))["attention"].way == way
    assert choose(config, torch.device("cuda"), operations="plain")["attention"].way == "torch"
    assert flex.why_not_flex(head_dim) == "" if way == FLEX else flex.why_not_flex(head_dim)


def test_grouped_queries_of_one_token_are_those_of_each_head():
    model = build_model("v5", num_kv_heads=2)
    attention: InnerAttention = model.blocks[0].attention.inner_attention
    query, key, value = (torch.randn(2, heads, length, 8) for heads, length in ((4, 1), (2, 9), (2, 9)))
    found = attention.mix(query, key, value, None, 0.3)
    repeated = (tensor.repeat_interleave(2, 1) for tensor in (key, value))
    expected = F.scaled_dot_product_attention(query, *repeated, scale=0.3)
    torch.testing.assert_close(found.reshape(expected.shape), expected)
