"""The step in place against the plain one: values, gradients of every coefficient and state, second derivatives."""

import pytest
import torch

from inl_core.kernels.apply import apply
from inl_core.kernels.stream import MotionInPlace
from inl_core.model import plain_operations
from inl_core.model.stream import Motion, Step
from tests.model.test_language_model import build, some_ids
from tests.model.test_stream import VARIANTS

DOCUMENTS = {
    "one document": {},
    "documents": {
        "document_ids": torch.tensor([[0] * 5 + [1] * 7, [0] * 11 + [1]]),
        "positions": torch.tensor([[*range(5), *range(7)], [*range(11), 0]]),
    },
}


def put(model, kind: type[Motion]) -> None:
    for module in model.modules():
        if isinstance(module, Step):
            module.motion = kind()


def loss_and_gradients(model, kind: type[Motion], given: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    put(model, kind)
    model.zero_grad()
    hidden = model(some_ids(), **given).hidden
    (hidden * torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype)).pow(2).sum().backward()
    return [hidden.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.parametrize("given", DOCUMENTS.values(), ids=DOCUMENTS.keys())
@pytest.mark.parametrize("name", VARIANTS)
def test_values_and_gradients_are_the_plain_steps(name, given):
    model = build(**VARIANTS[name])
    plain, in_place = (loss_and_gradients(model, kind, given) for kind in (Motion, MotionInPlace))
    torch.testing.assert_close(in_place, plain, rtol=1e-9, atol=1e-9)


def test_second_derivatives_are_the_plain_steps():
    model = build("v5", d_model=8, num_layers=1, num_heads=2)
    found = []
    for kind in (Motion, MotionInPlace):
        put(model, kind)
        alpha = model.blocks[0].step_feed_forward.alpha
        with plain_operations():
            [first] = torch.autograd.grad(model(some_ids(1, 4)).hidden.pow(3).sum(), alpha, create_graph=True)
            found.append(torch.autograd.grad(first.sum(), alpha)[0])
    torch.testing.assert_close(found[1], found[0])


@torch.no_grad()
def test_in_place_the_cache_gives_what_the_whole_text_gives():
    model, ids = build("v5").eval(), some_ids(2, 9)
    put(model, MotionInPlace)
    cache = model.new_cache(2, 9)
    pieces = [model(ids[:, a:b], cache=cache).hidden for a, b in [(0, 5), (5, 8), (8, 9)]]
    torch.testing.assert_close(torch.cat(pieces, 1), model(ids).hidden, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("preset", "operations", "way"),
    [("v5", "auto", "torch in place"), ("v5", "plain", "torch"), ("transformer", "auto", None), ("v4", "auto", None)],
)
def test_it_is_put_where_there_are_terms(preset, operations, way):
    model = build(preset)
    choice = apply(model, operations=operations).get("stream")
    kinds = {type(module.motion) for module in model.modules() if isinstance(module, Step)}
    assert (choice and choice.way) == way
    if way is not None:
        assert kinds == {MotionInPlace if operations == "auto" else Motion}
