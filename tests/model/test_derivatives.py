"""Every derivative of a model is right, by the library's operations; our own refuse all but backward()'s first."""

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inl_core.model import IntegratorLanguageModel, Options, plain_operations
from inl_core.model.backends import fused, native
from inl_core.model.backends.rule import Around, Rule
from inl_core.model.feed_forward import GatedDown
from inl_core.model.native.attention import PackedAttention
from inl_core.model.native.feed_forward import GatedFeedForward
from inl_core.model.native.projection import Projected
from inl_core.model.normed_linear import NormedLinear
from inl_core.model.norms import FusedRMS
from inl_core.model.shared_table import SharedTable
from inl_core.model.vocabulary import ChunkedCrossEntropy
from inl_core.recipe import ModelConfig
from tests.model.test_native import flat_inputs

RULE = Rule(3, 0.7, 1.0, 2.0, "tanh", energy_power=2.0)
HAS_NATIVE = native.is_available()
needs_native = pytest.mark.skipif(not HAS_NATIVE, reason="no compiler here, or torch has other threads")


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def integrate(apply: Callable[..., tuple[Tensor, ...]], *extra: object) -> Callable[..., Tensor]:
    inputs = flat_inputs(5, 6, torch.float64)._replace(forcing=draw(3, 6))

    def call(x: Tensor, bias: Tensor) -> Tensor:
        given = inputs._replace(x=x, bias=bias)
        return sum(part.sum() for part in apply(RULE, *extra[:1], *given, *extra[1:]) if part is not None)

    return call


SCALE, BIAS, DOWN = draw(6), draw(4), draw(6, 4)
TARGETS = torch.tensor([3, -100, 0, 6, 5])
# name -> a function of two tensors (5, 6) and (K, 6) or (K,) by one of our own operations, and the second one's shape
OPERATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "norm": (lambda x, w: FusedRMS.apply(x, w, 1e-6), (6,)),
    "norm and linear": (lambda x, w: NormedLinear.apply(x, SCALE, 1e-6, w), (4, 6)),
    "gated feed-forward": (lambda x, w: GatedDown.apply(x, w, torch.float64), (4, 3)),
    "loss": (lambda z, w: ChunkedCrossEntropy.apply(z, w, TARGETS, 2, True), (7, 6)),
    "shared table": (
        lambda x, w: torch.stack([table.square().sum() for table in SharedTable.apply(w * x[:4])]).sum(),
        (4, 6),
    ),
    "integrator, eager": (integrate(fused.Recomputed.apply, torch.float64), (18,)),
}
NATIVE_OPERATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "projection": (lambda x, w: Projected.apply(x, SCALE, w, BIAS, 1e-6), (4, 6)),
    "feed-forward": (lambda x, w: GatedFeedForward.apply(False, True, x, SCALE, w, DOWN, 1e-6)[0], (8, 6)),
    "attention": (lambda x, w: PackedAttention.apply((x * w)[None], None, None, None, 1, 1), (6,)),
    "integrator": (integrate(native.Loop.apply, True, *Around()), (18,)),
}
ALL = [
    *(pytest.param(*case, id=name) for name, case in OPERATIONS.items()),
    *(pytest.param(*case, id=f"{name}, in C++", marks=needs_native) for name, case in NATIVE_OPERATIONS.items()),
]
every_operation = pytest.mark.parametrize(("function", "shape"), ALL)
refuses = pytest.raises((NotImplementedError, RuntimeError), match=r"inside `with inl_core\.model\.plain_operations")


@every_operation
def test_a_graph_for_second_derivatives_is_refused_also_where_the_incoming_gradient_is_constant(function, shape):
    x, weight = draw(5, 6).requires_grad_(), draw(*shape, seed=1).requires_grad_()
    with refuses:
        torch.autograd.grad(function(x, weight).sum(), x, create_graph=True)
    with refuses:
        function(x, weight).square().sum().backward(create_graph=True)


@every_operation
def test_torch_func_and_forward_mode_are_refused(function, shape):
    x, weight = draw(5, 6), draw(*shape, seed=1)

    def total(x: Tensor) -> Tensor:
        return function(x, weight).sum()

    with refuses:
        torch.func.grad(total)(x)
    with refuses:
        torch.func.vmap(total)(torch.stack([x, x]))
    with refuses:
        torch.func.jvp(total, (x,), (x,))
    with refuses, torch.autograd.forward_ad.dual_level():
        total(torch.autograd.forward_ad.make_dual(x, x))
    x.requires_grad_()
    out = function(x, weight)
    with refuses:
        torch.autograd.grad(out, x, torch.ones(2, *out.shape, dtype=out.dtype), is_grads_batched=True)


@every_operation
def test_a_retained_graph_gives_the_same_gradient_again(function, shape):
    x, weight = draw(5, 6).requires_grad_(), draw(*shape, seed=1).requires_grad_()
    found = []
    out = function(x, weight)
    pull = draw(*out.shape, seed=2)
    for retained in (True, True, False):
        found.append(torch.autograd.grad(out, (x, weight), pull, retain_graph=retained))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)
            assert one.data_ptr() != two.data_ptr()
    twice = function(x, weight)
    twice.backward(pull, retain_graph=True)
    twice.backward(pull)
    for tensor, gradient in zip((x, weight), found[0], strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient)


# Whole models.

MODELS = {
    "v4": {"preset": "v4"},
    "v4, eager": {"preset": "v4", "integrator": {"backend": "eager"}},
    "v4, low rank, biased": {"preset": "v4", "embedding_rank": 8, "bias": True, "positions": "sinusoidal"},
    "v3": {"preset": "v3", "integrator": {"mu": {"group_size": 8}, "budget": {"strategy": "uniform"}}},
    "v2, own head": {"preset": "v2", "tie_head": False, "integrator": {"mu": {"group_size": 8}}},
    "v1": {"preset": "v1"},
    "transformer": {"preset": "transformer", "norm": "layernorm", "feed_forward": "gelu"},
}
Loss = Callable[[dict[str, Tensor], Tensor], Tensor]


def build(name: str) -> tuple[IntegratorLanguageModel, Loss, dict[str, Tensor], Tensor]:
    """A model, its loss as a function of parameters and ids (3, 40), and both."""
    keys = {"d_model": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 23, "max_seq_len": 40, **MODELS[name]}
    model = IntegratorLanguageModel(ModelConfig.model_validate(keys)).double()
    model.initialise(0)
    model.train()
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for index, parameter in enumerate(parameters.values()):
            parameter += 0.1 * draw(*parameter.shape, seed=index)

    def loss(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        return torch.func.functional_call(_Loss(model), {f"model.{key}": value for key, value in values.items()}, ids)

    return model, loss, parameters, torch.randint(0, 23, (3, 40), generator=torch.Generator().manual_seed(0))


class _Loss(torch.nn.Module):
    def __init__(self, model: IntegratorLanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        output = self.model(ids, options=Options(energy_power=2.0))
        total = self.model.loss_sum(output.hidden, ids.roll(-1, -1), output.table) / ids.numel()
        return total + sum(0.1 * layer.speed.mean() + 0.1 * layer.energy.mean() for layer in output.layers)


def gradients(loss: Tensor, parameters: dict[str, Tensor], **options: bool) -> dict[str, Tensor]:
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values()), **options), strict=True))


def assert_alike(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-7, atol=1e-9, msg=lambda text, at=name: f"{at}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_torch_func_gives_a_model_s_derivatives(name):
    _, loss, parameters, ids = build(name)
    ours = gradients(loss(parameters, ids), parameters)
    held = {key: value.detach() for key, value in parameters.items()}
    assert_alike(torch.func.grad(loss)(held, ids), ours)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(held, ids[:, None])
    assert_alike({key: value.mean(0) for key, value in each.items()}, ours)
    direction = {key: draw(*value.shape, seed=7) for key, value in held.items()}
    _, slope = torch.func.jvp(lambda values: loss(values, ids), (held,), (direction,))
    torch.testing.assert_close(slope, sum((ours[key] * direction[key]).sum() for key in ours))


@pytest.mark.parametrize("name", MODELS)
def test_second_derivatives_are_those_of_forward_over_backward(name):
    _, loss, parameters, ids = build(name)
    held = {key: value.detach() for key, value in parameters.items()}
    direction = {key: draw(*value.shape, seed=7) for key, value in held.items()}

    def along(values: dict[str, Tensor]) -> dict[str, Tensor]:
        return torch.func.grad(loss)(values, ids)

    _, forward = torch.func.jvp(along, (held,), (direction,))
    with plain_operations():
        first = gradients(loss(parameters, ids), parameters, create_graph=True)
        slope = sum((first[key] * direction[key]).sum() for key in first)
        assert_alike(gradients(slope, parameters), forward)


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_for_second_derivatives_is_refused_unless_asked_for(name):
    _, loss, parameters, ids = build(name)
    with refuses:
        gradients(loss(parameters, ids), parameters, create_graph=True)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_s_retained_graph_gives_twice_the_gradient(name):
    _, loss, parameters, ids = build(name)
    once = gradients(loss(parameters, ids), parameters)
    total = loss(parameters, ids)
    total.backward(retain_graph=True)
    total.backward()
    assert_alike({key: parameter.grad for key, parameter in parameters.items()}, {k: 2 * v for k, v in once.items()})


def test_evaluation_that_stops_early_can_be_mapped_and_differentiated():
    model, _, _, ids = build("v4")
    stopping = model.integrators()[0].config.early_stopping.model_copy(update={"convergence_threshold": 0.5})
    for integrator in model.integrators():
        integrator.config = integrator.config.model_copy(update={"early_stopping": stopping, "num_iterations": 5})
    model.eval()
    whole = model(ids)
    assert 1 <= whole.iterations().min() < 5
    torch.testing.assert_close(torch.func.vmap(lambda row: model(row[None]).hidden[0])(ids), whole.hidden)


def test_asking_for_the_library_s_operations_ends_with_the_block():
    _, loss, parameters, ids = build("v4")
    with plain_operations():
        with contextlib.suppress(KeyError), plain_operations():
            raise KeyError
        plain = loss(parameters, ids)
    gradients(plain, parameters, create_graph=True)
    own = loss(parameters, ids)
    torch.testing.assert_close(own, plain)
    with refuses:
        gradients(own, parameters, create_graph=True)
