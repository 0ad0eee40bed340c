"""The iterations in C++ against the model's own loop, which autograd differentiates."""

import itertools
import threading
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from inl_core.kernels import integrator as operation
from inl_core.model.dynamics import Drive, Dynamics
from inl_core.recipe import IntegratorConfig
from tests.kernels.native import PRODUCTS, draw, needs_library

pytestmark = needs_library

TENSORS = ("x", "v", "hoisted", "candidate", "inner", "outer", "bias", "mu", "forcing", "fraction")


class Case(NamedTuple):
    """What the operation is given, without the product and whether it keeps anything for a backward pass."""

    x: Tensor
    v: Tensor
    hoisted: Tensor
    candidate: Tensor | None
    inner: Tensor
    outer: Tensor
    bias: Tensor
    mu: Tensor
    forcing: Tensor
    fraction: Tensor | None = None
    stride: float = 0.7
    kappa: float | None = 1.0
    beta_max: float | None = 2.0
    activation: str = "relu"
    power: float | None = None


def make_case(
    tokens: int = 33,
    dim: int = 19,
    *,
    iterations: int = 2,
    candidate: str = "given",
    fraction: bool = False,
    dtype: torch.dtype = torch.float32,
    **numbers,
) -> Case:
    """Drawn tensors; the candidate is `given`, the controller's `own` or `none`."""
    groups, width = 4 if candidate == "own" else 3, 5
    shapes = [(tokens, dim), (tokens, dim), (tokens, width), (tokens, dim), (width, 2 * dim)]
    shapes += [(groups * dim, width), (groups * dim,), (dim,), (iterations, dim)]
    tensors = [draw(*shape, dtype=dtype, seed=index) for index, shape in enumerate(shapes)]
    tensors[3] = tensors[3] if candidate == "given" else None
    tensors[4], tensors[5] = tensors[4] / 4, tensors[5] / 4  # or six iterations would make any rounding large
    return Case(*tensors, torch.tensor(0.3, dtype=dtype) if fraction else None, **numbers)


def saying(value: Tensor, dim: int, **numbers) -> Case:
    """One iteration whose controller says `value` (3 D,) to every token: its weights are zero, its bias speaks."""
    zeros = [torch.zeros(shape, dtype=value.dtype) for shape in ((3, 1), (1, 2 * dim), (3 * dim, 1))]
    x, v, candidate = (draw(3, dim, seed=seed, dtype=value.dtype) for seed in (1, 2, 3))
    rest = (draw(dim, seed=4, dtype=value.dtype), draw(1, dim, seed=5, dtype=value.dtype))
    return Case(x, v, zeros[0], candidate, zeros[1], zeros[2], value, *rest, **numbers)


def ours(case: Case, product: str = "MKL") -> list[Tensor]:
    """x_T, v_T and, where a power is given, the two terms."""
    found = torch.ops.inl.integrator(*case, product, torch.is_grad_enabled())
    return list(found[: 2 if case.power is None else 4])


def plain(case: Case) -> list[Tensor]:
    """The same by the model's own loop."""
    config = IntegratorConfig.model_validate({"controller": {"activation": case.activation}})
    dynamics = Dynamics(config)
    dynamics.kappa, dynamics.beta_max, dynamics.stride = case.kappa, case.beta_max, case.stride
    drive = Drive(case.hoisted, case.inner, case.outer, case.bias, case.candidate, case.mu)
    found = dynamics(drive, case.x, case.v, case.forcing, case.fraction, case.power)
    return [value for value in found if value is not None]


def with_gradients(run, case: Case, *extra) -> list[Tensor]:
    """The results, and the gradient of every tensor for random weights on the results."""
    case = differentiable(case)
    results = run(case, *extra)
    loss = sum((value * draw(*value.shape, seed=50, dtype=value.dtype)).sum() for value in results)
    return [*(value.detach() for value in results), *torch.autograd.grad(loss, tensors_of(case))]


def differentiable(case: Case) -> Case:
    found = {name: getattr(case, name) for name in TENSORS}
    found = {name: None if value is None else value.detach().requires_grad_() for name, value in found.items()}
    return case._replace(**found)


def tensors_of(case: Case) -> list[Tensor]:
    return [value for name in TENSORS if (value := getattr(case, name)) is not None]


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("candidate", ["given", "own", "none"])
def test_results_and_gradients_are_autograds_of_the_plain_loop(candidate, activation):
    counts = itertools.cycle(range(1, 7))
    for kappa, beta_max, fraction, power in itertools.product(
        (None, 1.3), (None, 1.1), (False, True), (None, 1.0, 2.0, 3.0)
    ):
        numbers = {"kappa": kappa, "beta_max": beta_max, "power": power, "activation": activation}
        shape = {"candidate": candidate, "fraction": fraction, "iterations": next(counts), "dtype": torch.float64}
        case = make_case(21, 8, **shape, **numbers)
        for found, expected in zip(with_gradients(ours, case), with_gradients(plain, case), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("candidate", ["given", "own", "none"])
def test_in_single_precision_it_rounds_no_worse_than_the_plain_loop(candidate, product):
    """Relative to each tensor's size, and next to what single precision costs the plain loop itself."""
    exact = make_case(candidate=candidate, dtype=torch.float64, power=2.0, fraction=True)
    case = exact._replace(**{name: value.float() for name in TENSORS if (value := getattr(exact, name)) is not None})
    found = with_gradients(ours, case, product), with_gradients(plain, case), with_gradients(plain, exact)
    for own, theirs, true in zip(*found, strict=True):
        size = true.abs().max().clamp(min=1.0)
        rounding = ((theirs - true).abs().max() / size).item()
        assert ((own - true).abs().max() / size).item() <= 2e-6 + 3 * rounding


@pytest.mark.parametrize(("candidate", "power"), [("given", 2.0), ("own", None), ("none", 3.0)])
def test_gradients_equal_finite_differences(candidate, power):
    shape = {"iterations": 3, "candidate": candidate, "fraction": True, "dtype": torch.float64}
    case = differentiable(make_case(3, 4, **shape, activation="tanh", power=power))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        names = [name for name in TENSORS if getattr(case, name) is not None]
        return tuple(ours(case._replace(**dict(zip(names, tensors, strict=True)))))

    assert torch.autograd.gradcheck(run, tensors_of(case), fast_mode=True)


def test_it_is_a_proper_operation_of_torch():
    case = differentiable(make_case(power=2.0, candidate="none"))
    found = torch.library.opcheck(torch.ops.inl.integrator, (*case, "MKL", True))
    assert set(found.values()) == {"SUCCESS"}
    held = make_case(power=2.0, fraction=True)
    *results, hidden = torch.ops.inl.integrator(*held, "MKL", True)
    grads = [torch.ones_like(result) for result in results]
    found = torch.library.opcheck(torch.ops.inl.integrator_backward, (*held, "MKL", hidden, grads))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("value", [0.0, 1e-8, 1e-3, 0.5, 5.0, 19.9, 20.1, 50.0, 87.5, 200.0, 1e30, float("inf")])
def test_every_size_of_the_controllers_output_gives_what_torch_gives(value):
    """exp, log1p and sigmoid are polynomials here: within a few roundings of torch's, and nowhere infinite or NaN."""
    for sign, beta_max in itertools.product((1, -1), (2.0, 50.0, None)):
        said = torch.full((24,), sign * value)
        said[8:16].clamp_(max=1e4)  # unbounded, beta is that number itself
        case = saying(said, 8, beta_max=beta_max)
        torch.testing.assert_close(ours(case), plain(case), rtol=2e-6, atol=1e-6)


def test_beta_is_relatively_exact_where_it_is_small():
    """softplus(b) of b << 0 is exp(b): no 1 + exp(b) may swallow it."""
    b, zeros = torch.linspace(-80, 3, 160), torch.zeros(3, 160)
    case = saying(torch.cat([torch.full_like(b, -200.0), b, torch.zeros_like(b)]), 160, kappa=None, beta_max=None)
    case = case._replace(x=zeros, v=zeros, candidate=zeros, mu=torch.ones(160), forcing=torch.zeros(1, 160))
    velocity = ours(case)[1]  # beta (mu - x) = beta
    exact = torch.nn.functional.softplus(b.double(), threshold=100)
    assert ((velocity.double() - exact) / exact).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["x", "v", "candidate", "hoisted"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_what_is_not_a_number_stays_so(name, activation):
    """A run must see that it has failed: no clamp may turn NaN into a number. The other tokens are as they were."""
    case = make_case(activation=activation)
    getattr(case, name)[0, 0] = float("nan")
    case = differentiable(case)
    state = ours(case)[0]
    assert state[0].isnan().any()
    assert not state[1:].isnan().any()
    of_x, of_bias = torch.autograd.grad(state.sum(), [case.x, case.bias])
    assert of_x[0].isnan().any()
    assert not of_x[1:].isnan().any()
    assert of_bias.isnan().any()


def test_a_bias_that_is_not_a_number_reaches_the_state():
    for group in range(3):
        value = torch.zeros(24)
        value[8 * group + 3] = float("nan")
        assert ours(saying(value, 8))[0][:, 3].isnan().all()


def test_tokens_do_not_see_each_other():
    case = make_case()
    half = case._replace(**{name: getattr(case, name)[:16] for name in ("x", "v", "hoisted", "candidate")})
    torch.testing.assert_close(ours(case)[0][:16], ours(half)[0], rtol=1e-6, atol=1e-6)


def test_any_number_of_threads_and_any_tiles_give_the_same_up_to_rounding(monkeypatch):
    case, threads = make_case(300, dtype=torch.float64, power=2.0, fraction=True), torch.get_num_threads()
    found = [with_gradients(ours, case)]
    try:
        for count, tile_bytes in ((1, 1 << 17), (2, 1 << 17), (3, 1 << 17), (3, 8 * 19 * 17)):
            torch.set_num_threads(count)
            monkeypatch.setattr(operation, "_TILE_BYTES", tile_bytes)
            monkeypatch.setattr(operation, "_FEWEST_ROWS", 1)
            found.append(with_gradients(ours, case))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-9, atol=1e-9)


def test_threads_that_call_it_together_get_their_own_results():
    cases = [make_case(200)._replace(stride=0.1 * (index + 1)) for index in range(3)]
    found: dict[int, Tensor] = {}
    threads = [
        threading.Thread(target=lambda index=index: found.update({index: ours(cases[index])[0]})) for index in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, case in enumerate(cases):
        torch.testing.assert_close(found[index], plain(case)[0], rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_one_number_expanded():
    """sum() hands back a view whose rows are one and the same number in memory."""
    found = []
    for run in (ours, plain):
        case = differentiable(make_case())
        state, velocity = run(case)
        found.append(torch.autograd.grad(state.sum() + velocity.sum(), [case.x, case.outer]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", range(4))
def test_the_gradient_of_one_result_alone(which):
    found = []
    for run in (ours, plain):
        case = differentiable(make_case(power=2.0, dtype=torch.float64))
        result = run(case)[which]
        upstream = draw(*result.shape, seed=9)
        found.append(torch.autograd.grad(result, [case.x, case.v, case.mu, case.bias], upstream))
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)


def test_no_tokens_at_all():
    case = differentiable(make_case(0))
    state, _ = ours(case)
    assert state.shape == (0, 19)
    state.sum().backward()
    assert not case.bias.grad.any()


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_of_other_sizes_or_precision_are_refused_before_anything_is_read(name):
    case = make_case(fraction=True)
    tensor = getattr(case, name)
    if name != "x":
        with pytest.raises(ValueError, match=f"integrator: {name} is torch.float64"):
            ours(case._replace(**{name: tensor.double()}))
    bad = tensor[None] if name == "fraction" else tensor[1:].contiguous()
    with pytest.raises(ValueError, match=r"integrator: .* must be"):
        ours(case._replace(**{name: bad if name != "forcing" else tensor[:, 1:].contiguous()}))


def test_groups_that_do_not_fit_the_candidate_are_refused():
    own, given = make_case(candidate="own"), make_case()
    for bad in (own._replace(candidate=given.candidate), given._replace(outer=given.outer[:38], bias=given.bias[:38])):
        with pytest.raises(ValueError, match="output groups"):
            ours(bad)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
def test_a_velocity_of_zero_has_no_slope_in_the_energy(power):
    """Where mu and the state agree and nothing pushes, v stays at exactly zero; so does the gradient, as autograd's."""
    zeros = torch.zeros(3, 8)
    for run in (ours, plain):
        case = saying(torch.zeros(24), 8, power=power)._replace(x=zeros, v=zeros, candidate=None, mu=torch.zeros(8))
        case = case._replace(forcing=torch.zeros(1, 8).requires_grad_())
        (gradient,) = torch.autograd.grad(run(case)[3].sum(), case.forcing)
        assert not gradient.any()


def test_sums_over_many_tokens_keep_their_precision():
    """One running sum in single precision loses 3e-4 here."""
    found = []
    for dtype in (torch.float32, torch.float64):
        case = saying(torch.zeros(24, dtype=dtype), 8)
        tokens = {name: draw(100_000, 8, seed=i).float().to(dtype) for i, name in enumerate(("x", "v", "candidate"))}
        case = case._replace(**tokens, hoisted=torch.zeros(100_000, 1, dtype=dtype))
        single = {name: getattr(case, name).float().to(dtype) for name in ("mu", "forcing")}
        case = case._replace(**single)
        case.forcing.requires_grad_()
        state, velocity = ours(case)
        found.append(torch.autograd.grad(velocity.sum() + state.sum(), case.forcing)[0].double())
    torch.testing.assert_close(found[0], found[1], rtol=2e-6, atol=0)


def test_its_arithmetic_is_counted():
    case = differentiable(make_case(33, 19, iterations=3))
    with FlopCounterMode(display=False) as counter:
        ours(case)[0].sum().backward()
    once = 2 * 33 * 5 * (2 * 19 + 3 * 19) * 3  # tokens, C, [x; v] to C and C to G D, iterations
    assert counter.get_total_flops() == 4 * once


def test_without_gradients_nothing_is_kept_and_the_result_is_the_same():
    case = make_case()
    assert torch.ops.inl.integrator(*case, "MKL", False)[-1].numel() == 0
    assert torch.ops.inl.integrator(*case, "MKL", True)[-1].shape == (2, 33, 5)
    torch.testing.assert_close(
        torch.ops.inl.integrator(*case, "MKL", False)[0], torch.ops.inl.integrator(*case, "MKL", True)[0]
    )


def kept_bytes(run, iterations: int) -> int:
    """What autograd keeps of a case, its inputs included."""
    case = differentiable(make_case(256, 128, iterations=iterations))
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        results = run(case)
    del results
    return sum(seen.values())


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_iterations():
    assert kept_bytes(plain, 8) > 3 * kept_bytes(plain, 2)
    assert kept_bytes(ours, 8) <= 1.02 * kept_bytes(ours, 2)
    assert kept_bytes(ours, 2) < 0.4 * kept_bytes(plain, 2)
