"""The loop in C++: what they are given and refuse, values at the edges, and how the library is made and kept."""

import threading

import pytest
import torch

from inl_core.model import IntegratorLanguageModel
from inl_core.model.backends import fused, native
from inl_core.model.backends.rule import Around, Inputs, Rule
from inl_core.model.native import build as native_build
from inl_core.recipe import ModelConfig

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no compiler here, or torch has other threads")

RULE = Rule(2, 0.7, 1.0, 2.0, "relu")


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def flat_inputs(num_tokens: int = 33, dim: int = 19, dtype: torch.dtype = torch.float32) -> Inputs:
    shapes = [(num_tokens, dim)] * 2 + [(num_tokens, 5), (num_tokens, dim), (5, 2 * dim), (3 * dim, 5), (3 * dim,)]
    shapes += [(dim,), (2, dim)]
    return Inputs(*(draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes)), None)


def outputs_of(value: torch.Tensor, dim: int) -> Inputs:
    """One iteration whose controller says `value` (3 D,) to every token: its weights are zero, its bias speaks."""
    tokens = [draw(3, dim, seed=i) for i in (1, 2)]
    zeros = torch.zeros(3, 1), draw(3, dim, seed=3), torch.zeros(1, 2 * dim), torch.zeros(3 * dim, 1)
    return Inputs(*tokens, *zeros, value, draw(dim, seed=4), draw(1, dim, seed=5), None)


@pytest.mark.parametrize("value", [0.0, 1e-8, 1e-3, 0.5, 5.0, 19.9, 20.1, 50.0, 87.5, 200.0, 1e30, float("inf")])
def test_every_size_of_the_controllers_output_gives_what_torch_gives(value):
    """exp, log1p and sigmoid are polynomials here: within a few roundings of torch's, and nowhere infinite or NaN."""
    for sign in (1, -1):
        for beta_max in (2.0, 50.0, None):
            given = torch.full((24,), sign * value)
            given[8:16].clamp_(max=1e4)  # unbounded, beta is that number itself
            rule = RULE._replace(beta_max=beta_max, num_iterations=1)
            ours, theirs = (by.run(rule, outputs_of(given, 8)) for by in (native, fused))
            torch.testing.assert_close(ours.x, theirs.x, rtol=2e-6, atol=1e-6)
            torch.testing.assert_close(ours.v, theirs.v, rtol=2e-6, atol=1e-6)


def test_beta_is_relatively_exact_where_it_is_small():
    """softplus(b) of b << 0 is exp(b): no 1 + exp(b) may swallow it."""
    b = torch.linspace(-80, 3, 160)
    inputs = outputs_of(torch.cat([torch.full_like(b, -200.0), b, torch.zeros_like(b)]), 160)
    zeros = torch.zeros(3, 160)
    inputs = inputs._replace(x=zeros, v=zeros, candidate=zeros, mu=torch.ones(160), forcing=torch.zeros(1, 160))
    found = native.run(RULE._replace(kappa=None, beta_max=None, num_iterations=1), inputs).v  # beta (mu - x) = beta
    exact = torch.nn.functional.softplus(b.double(), threshold=100)
    assert ((found.double() - exact) / exact).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["x", "v", "candidate", "hoisted"])
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu", "tanh"])
def test_what_is_not_a_number_stays_so(name, activation):
    """A run must see that it has failed: no clamp may turn NaN into a number. The other tokens are as they were."""
    inputs = flat_inputs()
    getattr(inputs, name)[0, 0] = float("nan")
    inputs = Inputs(*(None if value is None else value.requires_grad_() for value in inputs))
    result = native.run(RULE._replace(activation=activation), inputs)
    assert result.x[0].isnan().any()
    assert not result.x[1:].isnan().any()
    of_x, of_bias = torch.autograd.grad(result.x.sum(), [inputs.x, inputs.bias])
    assert of_x[0].isnan().any()
    assert not of_x[1:].isnan().any()
    assert of_bias.isnan().any()


def test_a_bias_that_is_not_a_number_reaches_the_state():
    for group in range(3):
        value = torch.zeros(24)
        value[8 * group + 3] = float("nan")
        assert native.run(RULE._replace(num_iterations=1), outputs_of(value, 8)).x[:, 3].isnan().all()


def test_tokens_do_not_see_each_other_and_threads_change_nothing_but_sums():
    inputs = flat_inputs()
    whole = native.run(RULE, inputs)
    half = native.run(
        RULE, inputs._replace(**{key: getattr(inputs, key)[:16] for key in ("x", "v", "hoisted", "candidate")})
    )
    torch.testing.assert_close(whole.x[:16], half.x, rtol=1e-6, atol=1e-6)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gradients(300))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        for name, one, two in zip(Inputs._fields, found[0], other, strict=False):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-3 if name in ("inner", "outer", "bias") else 1e-4)


def gradients(num_tokens: int) -> list[torch.Tensor]:
    inputs = Inputs(*(None if value is None else value.requires_grad_() for value in flat_inputs(num_tokens)))
    result = native.run(RULE, inputs)
    return list(
        torch.autograd.grad(result.x.square().sum() + result.v.sum(), [value for value in inputs if value is not None])
    )


def test_a_second_run_has_the_same_bits():
    for one, two in zip(gradients(300), gradients(300), strict=True):
        assert torch.equal(one, two)


def test_tensors_it_cannot_be_handed_go_the_other_way():
    """Half precision, mixed precisions; views that are not contiguous are copied."""
    assert native.supports(flat_inputs())
    assert native.supports(flat_inputs(dtype=torch.float64))
    assert not native.supports(flat_inputs(dtype=torch.bfloat16))
    assert not native.supports(flat_inputs()._replace(mu=draw(19, dtype=torch.float64)))
    with torch.autocast("cpu", torch.bfloat16):
        assert not native.supports(flat_inputs())
    assert not native.supports(Inputs(*(None if t is None else t.to("meta") for t in flat_inputs())))
    inputs = flat_inputs()
    strided = inputs._replace(x=inputs.x.T.contiguous().T, v=torch.stack([inputs.v, inputs.v], 2)[..., 0])
    assert not strided.x.is_contiguous()
    assert torch.equal(native.run(RULE, strided).x, native.run(RULE, inputs).x)
    low = native.run(RULE, flat_inputs(dtype=torch.bfloat16))
    assert torch.equal(low.x, fused.run(RULE, flat_inputs(dtype=torch.bfloat16)).x)


def test_a_gradient_that_is_one_number_expanded():
    """sum() hands back a view whose rows are one and the same number in memory."""
    found = []
    for run in (native.run, fused.run):
        inputs = Inputs(*(None if value is None else value.requires_grad_() for value in flat_inputs()))
        result = run(RULE, inputs)
        found.append(torch.autograd.grad(result.x.sum() + result.v.sum(), [inputs.x, inputs.outer]))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_no_tokens_at_all():
    inputs = flat_inputs(0)
    assert native.run(RULE, inputs).x.shape == (0, 19)


def test_a_model_trains_alike_by_either_way():
    found = []
    for backend in ("native", "eager"):
        keys = {"preset": "v4", "d_model": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "max_seq_len": 16}
        config = ModelConfig.model_validate({**keys, "integrator": {"backend": backend}})
        model = IntegratorLanguageModel(config)
        model.initialise(0)
        ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
        model.loss_sum(model.train()(ids).hidden, ids).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", Inputs._fields)
def test_tensors_of_other_sizes_or_precision_are_refused_before_anything_is_read(name):
    inputs = flat_inputs()._replace(last_fraction=torch.tensor(0.5))
    tensor = getattr(inputs, name)
    if name != "x":
        with pytest.raises(ValueError, match=f"integrator: {name} is torch.float64"):
            native.forward(RULE, inputs._replace(**{name: tensor.double()}), keep=False)
    bad = tensor[None] if name == "last_fraction" else tensor[1:].contiguous()
    with pytest.raises(ValueError, match=r"integrator: .* must be"):
        native.forward(RULE, inputs._replace(**{name: bad}), keep=False)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0, 3.0])
def test_a_velocity_of_zero_has_no_slope_in_the_energy(power):
    """Where mu and the state agree and nothing pushes, v stays at exactly zero; so does the gradient, as autograd's."""
    rule, found = RULE._replace(num_iterations=1, energy_power=power), []
    for run in (native.run, fused.run):
        inputs = outputs_of(torch.zeros(24), 8)._replace(v=None, candidate=None, x=torch.zeros(3, 8), mu=torch.zeros(8))
        inputs = inputs._replace(forcing=torch.zeros(1, 8).requires_grad_())
        (gradient,) = torch.autograd.grad(run(rule, inputs).energy.sum(), inputs.forcing)
        found.append(gradient)
    assert not any(gradient.any() for gradient in found)


def test_sums_over_many_tokens_keep_their_precision():
    """One running sum in single precision loses 3e-4 here."""
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = outputs_of(torch.zeros(24, dtype=dtype), 8)
        tokens = {name: draw(100_000, 8, seed=i).to(dtype) for i, name in enumerate(("x", "v", "candidate"))}
        tokens["hoisted"] = torch.zeros(100_000, 1, dtype=dtype)
        inputs = Inputs(*(None if t is None else t.to(dtype) for t in inputs._replace(**tokens)))
        inputs.forcing.requires_grad_()
        result = native.run(RULE._replace(num_iterations=1), inputs)
        found.append(torch.autograd.grad(result.v.sum() + result.x.sum(), inputs.forcing)[0].double())
    torch.testing.assert_close(found[0], found[1], rtol=2e-6, atol=0)


def test_threads_that_call_it_together_get_their_own_results():
    inputs, found = flat_inputs(200), {}

    def run(index: int) -> None:
        found[index] = native.run(RULE, inputs)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[0].x, found[index].x) for index in (1, 2))


# What lies around the iterations.


def around(num_tokens: int = 33, dim: int = 19, context: int = 7, dtype: torch.dtype = torch.float64) -> Around:
    shapes = [(num_tokens, context), (5, context), (5,), (num_tokens, dim), (dim,)]
    return Around(*(draw(*shape, dtype=dtype, seed=10 + i).requires_grad_() for i, shape in enumerate(shapes)))


@pytest.mark.parametrize("iterations", [1, 2, 3, 5])
@pytest.mark.parametrize("reads", ["all", "context", "stream"])
def test_context_and_read_out_are_those_of_the_operations_one_by_one(iterations, reads):
    rule, given = RULE._replace(num_iterations=iterations), around()
    inputs = flat_inputs(dtype=torch.float64)._replace(forcing=draw(iterations, 19, dtype=torch.float64, seed=9))
    inputs = Inputs(*(None if value is None else value.requires_grad_() for value in inputs))
    context, weight, bias, stream, gain = given
    if reads == "context":
        given = given._replace(stream=None, gain=None)
    elif reads == "stream":
        given = Around(stream=stream, gain=gain)
    found = []
    for together in (True, False):
        hoisted = inputs.hoisted if reads == "stream" else context @ weight.T + bias
        if together:
            empty = inputs.hoisted.new_empty(0, 5)
            result = native.run_around(rule, inputs if reads == "stream" else inputs._replace(hoisted=empty), given)
            read = result.stream
        else:
            result = fused.run(rule, inputs._replace(hoisted=hoisted))
            read = None if reads == "context" else stream + gain * (result.x - inputs.x)
        total = result.x.square().sum() + result.v.sum() + (0 if read is None else read.pow(3).sum())
        wanted = [value for value in (*inputs, *given) if value is not None]
        wanted = [value for value in wanted if reads == "stream" or value is not inputs.hoisted]
        found.append((result.x, *(() if read is None else (read,)), *torch.autograd.grad(total, wanted)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_a_stream_that_nobody_reads_changes_nothing():
    inputs = Inputs(*(None if value is None else value.requires_grad_() for value in flat_inputs(dtype=torch.float64)))
    stream, gain = around()[3:]
    wanted = [value for value in inputs if value is not None]
    with_stream = native.run_around(RULE, inputs, Around(stream=stream, gain=gain))
    ours = torch.autograd.grad(with_stream.x.sum(), wanted)
    theirs = torch.autograd.grad(native.run(RULE, inputs).x.sum(), wanted)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", Around._fields)
def test_what_lies_around_must_fit_too(name):
    given = around(dtype=torch.float32)
    bad = given._replace(**{name: getattr(given, name)[1:].contiguous()})
    with pytest.raises(ValueError, match=r"integrator: .* must be"):
        native.forward(RULE, flat_inputs()._replace(hoisted=torch.empty(0, 5)), bad, keep=False)


# The libraries' products.


@pytest.mark.filterwarnings("ignore:TF32")
def test_products_are_the_same_by_either_library():
    """A model's loss and gradients by oneDNN's kernel and by MKL's; nothing remembers which it was."""
    found = []
    for enabled in (True, False, True):
        with torch.backends.mkldnn.flags(enabled=enabled):
            assert native_build.library().has_brgemm(torch.float32) in (enabled, False)
            config = ModelConfig.model_validate(
                {"preset": "v4", "d_model": 32, "num_layers": 2, "num_heads": 4, "vocab_size": 50, "max_seq_len": 40}
            )
            model = IntegratorLanguageModel(config)
            model.initialise(0)
            ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(0))
            loss = model.loss_sum(model.train()(ids).hidden, ids)
            loss.backward()
            found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, theirs, again in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours, again)
