"""Attention against the textbook's, one query at a time in double precision."""

import math
from typing import NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inl_core.model.attention import InnerAttention, Visibility, first_of_document, rotary_tables
from inl_core.recipe import ModelConfig


class Case(NamedTuple):
    """What attention is given: [queries | keys | values] (B, S, (H + 2K) F), tables (1 or B, S, F/2), and sizes."""

    packed: Tensor
    cosines: Tensor | None
    sines: Tensor | None
    first: Tensor | None
    """(B, S) where each token's document begins; None where every earlier token is seen."""
    heads: int
    key_heads: int

    @property
    def size(self) -> int:
        """F."""
        return self.packed.shape[-1] // (self.heads + 2 * self.key_heads)


def make_case(
    batch: int, length: int, heads: int, key_heads: int, size: int, *, documents: float = 0.0, seed: int = 0
) -> Case:
    """Drawn queries, keys and values in double precision; a document begins at each token with these odds."""
    generator = torch.Generator().manual_seed(seed)
    packed = torch.randn(batch, length, (heads + 2 * key_heads) * size, generator=generator, dtype=torch.float64)
    tables = [table[None].double() for table in rotary_tables(length, size, 10_000.0)]
    ids = (torch.rand(batch, length, generator=generator) < documents).cumsum(1)
    return Case(packed, *tables, first_of_document(ids) if documents else None, heads, key_heads)


def textbook(case: Case) -> Tensor:
    """The heads' outputs side by side (B, S, H F), from loops over rows, queries and heads."""
    (batch, length, _), (heads, key_heads), size = case.packed.shape, case[4:], case.size
    parts = case.packed.view(batch, length, -1, size)

    def turned(x: Tensor, b: int, i: int) -> Tensor:
        if case.cosines is None or case.sines is None:
            return x
        row = b % case.cosines.shape[0]
        cos, sin = case.cosines[row, i], case.sines[row, i]
        first, second = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    rows = []
    for b in range(batch):
        for i in range(length):
            seen = range(0 if case.first is None else int(case.first[b, i]), i + 1)
            for h in range(heads):
                k = heads + h // (heads // key_heads)
                query = turned(parts[b, i, h], b, i)
                keys = torch.stack([turned(parts[b, j, k], b, j) for j in seen])
                weights = torch.softmax(keys @ query / math.sqrt(size), 0)
                rows.append(weights @ parts[b, seen.start : i + 1, k + key_heads])
    return torch.stack(rows).view(batch, length, heads * size)


def by_the_model(case: Case) -> Tensor:
    """The same by the model's own modules."""
    config = ModelConfig.model_validate(
        {"d_model": case.heads * case.size, "num_heads": case.heads, "num_kv_heads": case.key_heads}
    )
    ids = torch.zeros(case.packed.shape[:2], dtype=torch.int64)
    mask = Visibility()(ids, case.first, None)  # a token's first is as good a number for its document as any
    rotary = None
    if case.cosines is not None and case.sines is not None:
        rotary = (case.cosines.unsqueeze(-2), case.sines.unsqueeze(-2))
    return InnerAttention(config)(case.packed, rotary, mask, None)


@st.composite
def any_case(draw, *, longest: int) -> Case:
    """Some rows of up to `longest` tokens: heads of any even size, grouped or not, documents of any length."""
    batch, length, half = draw(st.integers(1, 3)), draw(st.integers(1, longest)), draw(st.integers(1, 9))
    groups = draw(st.sampled_from([(1, 1), (4, 2), (3, 1), (2, 2)]))
    documents = draw(st.sampled_from([0.0, 0.03, 0.3, 1.0]))
    case = make_case(batch, length, *groups, 2 * half, documents=documents, seed=draw(st.integers(0, 99)))
    return case if draw(st.booleans()) else case._replace(cosines=None, sines=None)


@settings(max_examples=15, deadline=None)
@given(any_case(longest=24))
def test_output_and_gradient_are_the_textbooks(case):
    assert_alike_with_gradients(by_the_model, textbook, case)


def assert_alike_with_gradients(one, two, case: Case, *, rtol: float = 1e-10, atol: float = 1e-12) -> None:
    """Two functions of a case give the same output and, for random weights on it, the same gradient."""
    shape = (*case.packed.shape[:2], case.heads * case.size)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for function in (one, two):
        own = case._replace(packed=case.packed.clone().requires_grad_())
        out = function(own)
        found.append((out.detach(), *torch.autograd.grad(out, own.packed, upstream)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
