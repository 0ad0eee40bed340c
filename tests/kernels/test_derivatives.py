"""Every derivative of a model is right, by the library's operations; our own refuse all but backward()'s first."""

import contextlib
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from inl_core.kernels import apply
from inl_core.kernels.loss import CrossEntropy, TableLookup
from inl_core.model import IntegratorLanguageModel, Options, plain_operations
from inl_core.recipe import ModelConfig
from tests.kernels.native import PRODUCTS, assert_alike, draw, needs_library, put_own
from tests.kernels.test_attention import attend
from tests.kernels.test_integrator import make_case, ours
from tests.model.test_attention import Case

TARGETS = torch.tensor([3, -100, 0, 6, 5])


def integrate(x: Tensor, bias: Tensor) -> Tensor:
    case = make_case(5, 6, iterations=3, dtype=torch.float64, activation="tanh", power=2.0)
    return sum(part.sum() for part in ours(case._replace(x=x, bias=bias)))


# name -> a function of two tensors (5, 6) and (K, 6) or (K,) by one of our own operations, and the second one's shape
OPERATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "loss": (lambda z, w: CrossEntropy.apply(z, w, TARGETS, 2, True, z.dtype), (7, 6)),
    "table": (
        lambda x, w: torch.stack([part.square().sum() for part in TableLookup.apply(TARGETS % 4, w * x[:4])]).sum(),
        (4, 6),
    ),
}
NATIVE_OPERATIONS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...]]] = {
    "attention": (lambda x, w: attend(Case((x * w)[None], None, None, None, 1, 1)), (6,)),
    "integrator": (integrate, (18,)),
}
ALL = [
    *(pytest.param(*case, id=name) for name, case in OPERATIONS.items()),
    *(pytest.param(*case, id=name, marks=needs_library) for name, case in NATIVE_OPERATIONS.items()),
]
every_operation = pytest.mark.parametrize(("function", "shape"), ALL)
refuses = pytest.raises((NotImplementedError, RuntimeError), match=r"plain_operations|no autograd formula")


@every_operation
def test_second_derivatives_are_refused_also_where_the_incoming_gradient_is_constant(function, shape):
    x, weight = draw(5, 6).requires_grad_(), draw(*shape, seed=1).requires_grad_()
    with refuses:
        (first,) = torch.autograd.grad(function(x, weight).sum(), x, create_graph=True)
        torch.autograd.grad(first.square().sum(), x)


@every_operation
def test_a_retained_graph_gives_the_same_gradient_again(function, shape):
    x, weight = draw(5, 6).requires_grad_(), draw(*shape, seed=1).requires_grad_()
    out, found = function(x, weight), []
    pull = draw(*out.shape, seed=2)
    for retained in (True, True, False):
        found.append(torch.autograd.grad(out, (x, weight), pull, retain_graph=retained))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])
        assert all(one.data_ptr() != two.data_ptr() for one, two in zip(found[0], other, strict=True))
    twice = function(x, weight)
    twice.backward(pull, retain_graph=True)
    twice.backward(pull)
    for tensor, gradient in zip((x, weight), found[0], strict=True):
        torch.testing.assert_close(tensor.grad, 2 * gradient)


# Whole models.

MODELS = {
    "v4": {"preset": "v4"},
    "v4, low rank, biased": {"preset": "v4", "embedding_rank": 8, "bias": True, "positions": "sinusoidal"},
    "v3": {"preset": "v3", "integrator": {"mu": {"group_size": 8}, "budget": {"strategy": "uniform"}}},
    "v2, own head": {"preset": "v2", "tie_head": False, "integrator": {"mu": {"group_size": 8}}},
    "v1": {"preset": "v1"},
    "transformer": {"preset": "transformer", "norm": "layernorm", "feed_forward": "gelu"},
}
assert_close = partial(assert_alike, rtol=1e-7, atol=1e-9)
Loss = Callable[[dict[str, Tensor], Tensor], Tensor]


def build(name: str) -> tuple[IntegratorLanguageModel, Loss, dict[str, Tensor], Tensor]:
    """A model, its loss as a function of parameters and ids (3, 40), and both."""
    keys = {"d_model": 16, "num_layers": 2, "num_heads": 2, "vocab_size": 23, "max_seq_len": 40, **MODELS[name]}
    model = IntegratorLanguageModel(ModelConfig.model_validate(keys)).double()
    model.initialise(0)
    put_own(model.train()) if PRODUCTS else apply(model.train())
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


@pytest.mark.parametrize("name", MODELS)
def test_torch_func_gives_a_model_s_derivatives(name):
    _, loss, parameters, ids = build(name)
    ours = gradients(loss(parameters, ids), parameters)
    held = {key: value.detach() for key, value in parameters.items()}
    assert_close(torch.func.grad(loss)(held, ids), ours)
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(held, ids[:, None])
    assert_close({key: value.mean(0) for key, value in each.items()}, ours)
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
        assert_close(gradients(slope, parameters), forward)


@pytest.mark.parametrize("name", MODELS)
def test_a_graph_for_second_derivatives_is_refused_unless_asked_for(name):
    _, loss, parameters, ids = build(name)
    with refuses:
        first = gradients(loss(parameters, ids), parameters, create_graph=True)
        gradients(sum(value.square().sum() for value in first.values()), parameters)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_s_retained_graph_gives_twice_the_gradient(name):
    _, loss, parameters, ids = build(name)
    once = gradients(loss(parameters, ids), parameters)
    total = loss(parameters, ids)
    total.backward(retain_graph=True)
    total.backward()
    assert_close({key: parameter.grad for key, parameter in parameters.items()}, {k: 2 * v for k, v in once.items()})


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
