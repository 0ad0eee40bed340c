"""A product over all tokens in C++, with a norm before and a bias after it, against the library's modules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inl_core.model.backends import native
from inl_core.model.native.feed_forward import Given as FeedForwardGiven
from inl_core.model.native.feed_forward import feed_forward
from inl_core.model.native.feed_forward import supports as feed_forward_supports
from inl_core.model.native.projection import Given, project, supports

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no compiler here, or torch has other threads")


def drawn(*shapes: tuple[int, ...] | None, seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    return [
        None
        if shape is None
        else torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 600),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    norm=st.booleans(),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_output_and_gradients_are_those_of_norm_and_linear(rows, inputs, outputs, norm, bias, seed):
    shapes = [(rows, inputs), (inputs,) if norm else None, (outputs, inputs), (outputs,) if bias else None]
    x, scale, weight, shift = drawn(*shapes, seed=seed)
    (upstream,) = drawn((rows, outputs), seed=seed + 1)
    wanted = [tensor for tensor in (x, scale, weight, shift) if tensor is not None]
    normed = x if scale is None else torch.nn.functional.rms_norm(x, (inputs,), scale, 1e-5)
    found = []
    for out in (project(Given(x, scale, weight, shift, 1e-5)), torch.nn.functional.linear(normed, weight, shift)):
        found.append((out, *torch.autograd.grad(out, wanted, upstream)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_gradcheck():
    x, scale, weight, shift = drawn((5, 4), (4,), (3, 4), (3,), seed=0)
    assert torch.autograd.gradcheck(lambda *tensors: project(Given(*tensors, 1e-5)), (x, scale, weight, shift))
    x, scale, up, down = drawn((5, 4), (4,), (6, 4), (4, 3), seed=0)
    assert torch.autograd.gradcheck(
        lambda *tensors: feed_forward(FeedForwardGiven(*tensors, 1e-5), wants_norm=True), (x, scale, up, down)
    )


def test_a_second_run_has_the_same_bits_and_threads_change_sums_alone():
    threads, found = torch.get_num_threads(), []
    try:
        for count in (2, 2, 3):
            torch.set_num_threads(count)
            x, weight = drawn((700, 24), (40, 24), seed=0, dtype=torch.float32)
            out = project(Given(x, None, weight, None))
            found.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
    finally:
        torch.set_num_threads(threads)
    for one, two, three in zip(*found, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-3)


def test_no_rows_at_all():
    x, weight, shift = drawn((0, 4), (3, 4), (3,), seed=0)
    out = project(Given(x, None, weight, shift))
    assert out.shape == (0, 3)
    assert all(not grad.any() for grad in torch.autograd.grad(out.sum(), (x, weight, shift)))


def test_a_product_whose_sums_would_be_large_is_the_librarys(monkeypatch):
    x, weight = drawn((80, 4), (3, 4), seed=0, dtype=torch.float32)
    assert supports(Given(x, None, weight, None))
    monkeypatch.setattr("inl_core.model.native.calls.MOST_SUMS_BYTES", torch.get_num_threads() * weight.nbytes - 1)
    assert not supports(Given(x, None, weight, None))


def test_a_few_rows_are_the_librarys():
    """A token at a time, turning the whole weight would cost more than the product."""
    x, weight, up, down = drawn((63, 4), (3, 4), (6, 4), (4, 3), seed=0, dtype=torch.float32)
    assert not supports(Given(x, None, weight, None))
    assert not feed_forward_supports(FeedForwardGiven(x, None, up, down))
    (more,) = drawn((64, 4), seed=0, dtype=torch.float32)
    assert supports(Given(more, None, weight, None))
    assert feed_forward_supports(FeedForwardGiven(more, None, up, down))


def test_without_gradients_nothing_is_kept_for_them(monkeypatch):
    found = []
    monkeypatch.setattr(
        "inl_core.model.native.calls.run", lambda name, call, tensors, what: found.append(dict(tensors))
    )
    given = FeedForwardGiven(*drawn((64, 4), None, (6, 4), (4, 3), seed=0))
    with torch.no_grad():
        feed_forward(given)
    feed_forward(given)
    assert [tensors["gate_up"] is None for tensors in found] == [True, False]


@pytest.mark.parametrize("name", ["norm", "weight", "bias"])
def test_tensors_of_other_sizes_are_refused_before_anything_is_read(name):
    given = Given(*drawn((64, 4), (4,), (3, 4), (3,), seed=0))
    bad = getattr(given, name)[..., 1:].contiguous()
    with pytest.raises(ValueError, match=f"a product: {name} is"):
        project(given._replace(**{name: bad}))
    of_feed_forward = FeedForwardGiven(*drawn((64, 4), (5,), (6, 4), (4, 3), seed=0))
    with pytest.raises(ValueError, match="a feed-forward: norm is"):
        feed_forward(of_feed_forward)
