"""Every backend against the plain loop: results, gradients, memory, precision, and when each is taken."""

import itertools
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from inl_core.model import IntegratorLanguageModel, by_rows
from inl_core.model import integrator as integrator_module
from inl_core.model.backends import compiled, fused, native, select
from inl_core.model.backends.rule import Inputs, Rule
from inl_core.model.controller import Controller
from inl_core.model.integrator import Integrator
from inl_core.recipe import IntegratorConfig, ModelConfig
from tests.model.test_integrator import WIDTH, build
from tests.plain_loop import the_plain_loop

SWITCHES = {
    "v4": {},
    "controller candidate": {"candidate": "controller"},
    "no candidate": {"candidate": "none"},
    "hierarchical mu": {"mu": {"form": "hierarchical", "group_size": 4}},
    "fixed mu": {"mu": {"form": "fixed", "init": 0.3}},
    "sparse excitation": {"excitation": {"sparsity": 0.4}},
    "channel modulation": {"controller": {"width": WIDTH, "modulation": "channel"}},
    "own controller": {"controller": {"width": WIDTH, "shared": False}},
    "gelu": {"controller": {"width": WIDTH, "activation": "gelu"}},
    "silu": {"controller": {"width": WIDTH, "activation": "silu"}},
    "tanh": {"controller": {"width": WIDTH, "activation": "tanh"}},
    "plain alpha": {"dynamic_alpha": False},
    "low beta_max": {"beta_max": 0.4},
    "high beta_max": {"beta_max": 9.0},
    "no beta_max": {"beta_max": None, "num_iterations": 2},
    "five iterations": {"num_iterations": 5, "dt": 0.1},
    "one iteration": {"num_iterations": 1},
    "full stride": {"dt": 1.0, "velocity_scale": 1.0},
}
BY_HAND = ["eager", pytest.param("native", marks=pytest.mark.skipif(not native.is_available(), reason="no compiler"))]
RUN = {"eager": fused.run, "native": native.run}
WITHOUT = [{}, {"velocity"}, {"velocity", "fraction", "power"}, {"fraction"}, {"power"}]


def outcome(changes: dict, without: set, dtype: torch.dtype, *, tokens: int = 6) -> list[torch.Tensor]:
    """Results and the gradient of everything that can have one, for random weights on the results."""
    torch.manual_seed(0)  # a Linear draws from the global generator
    layer, controller = build(**changes)
    layer, controller = layer.to(dtype), controller.to(dtype)
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    h, x, v, candidate = (draw(2, tokens // 2, 8) for _ in range(4))
    amplitude, fraction = (torch.tensor(value, dtype=dtype, requires_grad=True) for value in (0.2, 0.3))
    given = layer.config.candidate == "feed_forward"
    output = layer(
        h,
        x,
        None if "velocity" in without else v,
        amplitude=amplitude,
        candidate=candidate if given else None,
        controller=controller,
        last_fraction=None if "fraction" in without else fraction,
        energy_power=None if "power" in without else 3.0,
    )
    results = [output.state, output.velocity, output.speed, output.energy]
    results = [value for value in results if value is not None]
    loss = sum((value * draw(*value.shape)).sum() for value in results)
    leaves = [h, x, v, candidate, amplitude, fraction, *layer.parameters(), *controller.parameters()]
    found = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [*results, *(torch.zeros(()) if gradient is None else gradient for gradient in found)]


@pytest.mark.parametrize("backend", BY_HAND)
@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES.keys())
def test_the_recomputing_backward_pass_equals_autograds(changes, backend):
    for without in WITHOUT:
        own = outcome({**changes, "backend": backend}, without, torch.float64)
        with the_plain_loop():
            plain = outcome(changes, without, torch.float64)
        for ours, theirs in zip(own, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", BY_HAND)
@pytest.mark.parametrize("changes", SWITCHES.values(), ids=SWITCHES.keys())
def test_in_float32_it_stays_within_a_millionth(changes, backend):
    """Relative to each tensor's size, and next to what float32 costs the plain loop itself."""
    own = outcome({**changes, "backend": backend}, {"fraction", "power"}, torch.float32)
    with the_plain_loop():
        plain = outcome(changes, {"fraction", "power"}, torch.float32)
        exact = outcome(changes, {"fraction", "power"}, torch.float64)
    for ours, theirs, true in zip(own, plain, exact, strict=True):
        size = true.abs().max().clamp(min=1.0)
        rounding = ((theirs - true).abs().max() / size).item()
        assert ((ours - theirs).abs().max() / size).item() <= 1e-6 + 2 * rounding


def flat_inputs(num_tokens: int, *, groups: int, velocity: bool, candidate: bool, fraction: bool) -> list:
    generator = torch.Generator().manual_seed(7)
    dim, width, iterations = 3, 4, 3

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    return [
        draw(num_tokens, dim),
        draw(num_tokens, dim) if velocity else None,
        draw(num_tokens, width),
        draw(num_tokens, dim) if candidate else None,
        draw(width, 2 * dim),
        draw(groups * dim, width),
        draw(groups * dim),
        draw(dim),
        draw(iterations, dim),
        torch.tensor(0.4, dtype=torch.float64, requires_grad=True) if fraction else None,
    ]


RULES = itertools.product((None, 1.3), (None, 1.1), ("relu", "tanh"), (None, 2.0))


@pytest.mark.parametrize(("kappa", "beta_max", "activation", "power"), list(RULES))
@pytest.mark.parametrize("velocity", [True, False])
@pytest.mark.parametrize("backend", BY_HAND)
def test_gradients_equal_finite_differences(kappa, beta_max, activation, power, velocity, backend):
    rule = Rule(3, 0.6, kappa, beta_max, activation, power)
    for groups, candidate, fraction in ((3, True, False), (4, False, False), (3, False, True)):
        inputs = flat_inputs(2, groups=groups, velocity=velocity, candidate=candidate, fraction=fraction)

        def run(*tensors):
            return tuple(value for value in RUN[backend](rule, Inputs(*tensors)) if value is not None)

        assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("backend", BY_HAND)
def test_chunks_do_not_change_a_gradient(monkeypatch, backend):
    changes = {"backend": backend}
    whole = outcome(changes, set(), torch.float64, tokens=120)
    monkeypatch.setattr(fused, "_CHUNK_BYTES", 8 * 8 * 17)
    monkeypatch.setattr(by_rows, "_MOST_CHUNKS", 1000)
    monkeypatch.setattr(native, "_TILE_BYTES", 8 * 8 * 17)
    monkeypatch.setattr(native, "_FEWEST_ROWS", 1)
    assert len(list(fused.chunks(torch.empty(120, 8, dtype=torch.float64)))) == 8
    for one, other in zip(whole, outcome(changes, set(), torch.float64, tokens=120), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def kept_bytes(num_iterations: int, dim: int = 128, num_tokens: int = 256) -> int:
    """What autograd keeps of one layer, its inputs included."""
    config = IntegratorConfig(num_iterations=num_iterations)
    layer, controller = Integrator(config, dim), Controller(config, dim)
    layer.initialise()
    layer.excitation.reset_buffers()
    h, x, v, candidate = (torch.randn(1, num_tokens, dim, requires_grad=True) for _ in range(4))
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(h, x, v, amplitude=torch.tensor(0.1), candidate=candidate, controller=controller)
    del output
    return sum(seen.values())


def test_what_is_kept_for_the_backward_pass_does_not_grow_with_the_iterations():
    with the_plain_loop():
        assert kept_bytes(8) > 3 * kept_bytes(2)
        plain = kept_bytes(2)
    assert kept_bytes(8) <= 1.02 * kept_bytes(2)
    assert kept_bytes(2) < 0.4 * plain


def test_under_bfloat16_autocast_both_round_alike():
    def bf16(plain: bool) -> list[torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            if plain:
                with the_plain_loop():
                    return outcome({}, {"fraction", "power"}, torch.float32)
            return outcome({}, {"fraction", "power"}, torch.float32)

    exact = outcome({}, {"fraction", "power"}, torch.float64)
    for ours, theirs, true in zip(bf16(False), bf16(True), exact, strict=True):
        assert ours.dtype == theirs.dtype
        size = true.abs().max().clamp(min=1.0)
        error, usual = ((ours - true).abs().max() / size).item(), ((theirs - true).abs().max() / size).item()
        assert error <= 0.01 + 2 * usual


def test_a_gradient_of_the_state_alone_and_of_nothing_else():
    layer, controller = build()
    h, x, v, candidate = (torch.randn(1, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(4))
    arguments = {"amplitude": torch.tensor(0.2), "candidate": candidate, "controller": controller}
    for name in ("state", "velocity"):
        own = torch.autograd.grad(getattr(layer(h, x, v, **arguments), name).sum(), [h, x, v, candidate])
        with the_plain_loop():
            plain = torch.autograd.grad(getattr(layer(h, x, v, **arguments), name).sum(), [h, x, v, candidate])
        torch.testing.assert_close(own, plain)


def test_without_gradients_nothing_is_kept_and_the_result_is_the_same():
    layer, controller = build()
    h, x, v, candidate = (torch.randn(1, 4, 8, dtype=torch.float64) for _ in range(4))
    arguments = {"amplitude": torch.tensor(0.2), "candidate": candidate, "controller": controller}
    with torch.no_grad():
        evaluated = layer(h, x, v, **arguments)
    trained = layer(h, x, v, **arguments)
    assert evaluated.state.grad_fn is None
    torch.testing.assert_close(evaluated.state, trained.state, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(evaluated.velocity, trained.velocity, rtol=1e-12, atol=1e-12)


@contextmanager
def compiled_without_code_generation():
    """The whole of torch.compile but for inductor's C++, which takes half a minute a function."""
    original = torch.compile
    compiled._function.cache_clear()
    with patch.object(torch, "compile", partial(original, backend="aot_eager")):
        yield
    compiled._function.cache_clear()


COMPILED = ["v4", "controller candidate", "no candidate", "tanh", "plain alpha", "low beta_max", "no beta_max"]


@pytest.mark.parametrize("name", [COMPILED[0], *(pytest.param(name, marks=pytest.mark.slow) for name in COMPILED[1:])])
def test_the_compiled_loop_equals_the_plain_one(name):
    torch._dynamo.reset()
    changes = SWITCHES[name]
    for without in (set(), {"velocity", "fraction", "power"}):
        with the_plain_loop():
            plain = outcome(changes, without, torch.float64)
        with compiled_without_code_generation():
            own = outcome({**changes, "backend": "compiled"}, without, torch.float64)
        for ours, theirs in zip(own, plain, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_the_compiled_loop_is_compiled_once_whatever_the_step_and_the_number_of_tokens():
    torch._dynamo.reset()
    layer, controller = build(backend="compiled")
    with compiled_without_code_generation():
        for step in range(4):
            h, x, v, candidate = (
                torch.randn(1, 4 + 3 * step, 8, dtype=torch.float64, requires_grad=True) for _ in range(4)
            )
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                amplitude = torch.tensor(0.1 * step, dtype=torch.float64)
                output = layer(h, x, v, amplitude=amplitude, candidate=candidate, controller=controller)
                output.state.sum().backward()


def test_the_compiled_loop_keeps_nothing_of_its_iterations():
    torch._dynamo.reset()
    with compiled_without_code_generation(), patch.object(integrator_module, "find_backend", lambda *_: compiled.run):
        two, eight = kept_bytes(2), kept_bytes(8)
    assert eight <= 1.02 * two
    assert two < 1.1 * kept_bytes(2)


def compiled_model(preset: str) -> IntegratorLanguageModel:
    keys = {"d_model": 32, "num_layers": 10, "num_heads": 4, "vocab_size": 50, "max_seq_len": 16}
    model = IntegratorLanguageModel(ModelConfig.model_validate({"preset": preset} | keys))
    model.initialise(0)
    for block in model.train().blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    return model


@pytest.mark.parametrize("preset", ["v1", "v4"])
def test_a_compiled_block_has_no_graph_breaks_and_is_not_compiled_again_as_the_run_goes_on(preset):
    """fullgraph raises at a break. Two graphs: the layers above the first have a velocity, if it is carried."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = compiled_model(preset)
    for step in range(3):
        model.excitation_amplitude.fill_(0.02 * step)  # as a cycle does
        ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(step))
        with torch._dynamo.config.patch(error_on_recompile=step > 0):
            model.loss_sum(model(ids).hidden, ids).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == (2 if model.carries_velocity else 1)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert all(block.integrator.excitation.gamma.grad.any() for block in model.blocks)


def test_a_compiled_block_gives_the_gradients_of_an_eager_one():
    torch._dynamo.reset()
    model, ids = compiled_model("v4"), torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    plain = IntegratorLanguageModel(model.config)
    plain.load_state_dict(model.state_dict())
    for either in (model, plain):
        either.loss_sum(either(ids).hidden, ids).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)


def test_which_backend_runs_and_what_the_plan_says():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for setting, device, installed, expected, missing in (
        ("auto", cpu, True, "native", ""),
        ("auto", cpu, False, "eager", "native needs a CPU, fp32, a C++ compiler"),
        ("auto", gpu, True, "triton", ""),
        ("auto", gpu, False, "eager", "triton needs a GPU and the triton package"),
        ("triton", gpu, True, "triton", ""),
        ("triton", cpu, True, "eager", "triton needs a GPU"),
        ("native", cpu, True, "native", ""),
        ("native", cpu, False, "eager", "native needs a CPU, fp32, a C++ compiler"),
        ("native", gpu, True, "eager", "native needs a CPU"),
        ("eager", gpu, True, "eager", ""),
        ("eager", cpu, True, "eager", ""),
        ("compiled", cpu, True, "compiled", ""),
    ):
        config = IntegratorConfig(backend=setting)
        with (
            patch.object(select, "has_triton", lambda found=installed: found),
            patch.object(select, "has_native", lambda found=installed: found),
        ):
            assert select.backend_name(config, device) == expected
            said = select.describe_backend(config, device, is_compiled=False)
        assert said.startswith(expected)
        assert missing in said
        assert (" needs " in said) == bool(missing)
    experts = IntegratorConfig.model_validate({"controller": {"experts": 2}})
    assert select.backend_name(experts, gpu) == "plain"
    assert select.describe_backend(experts, cpu, is_compiled=False) == "plain on cpu, all iterations kept"
    assert select.describe_backend(None, cpu, is_compiled=False) is None


def test_which_backend_a_compiler_traces_and_which_runs_in_low_precision():
    cpu, gpu, traced = torch.device("cpu"), torch.device("cuda"), "plain, traced with the block by training.compile"
    both = patch.multiple(select, has_triton=lambda: True, has_native=lambda: True)
    for setting, device, is_compiled, is_low_precision, expected in (
        ("auto", cpu, True, False, "native on cpu, iterations recomputed in the backward pass, one operation of"),
        ("native", cpu, True, False, "native on cpu"),
        ("auto", cpu, True, True, traced),
        ("native", cpu, False, True, "eager on cpu, iterations recomputed in the backward pass; native needs a CPU"),
        ("eager", cpu, True, False, traced),
        ("compiled", cpu, True, False, traced),
        ("auto", gpu, True, True, traced),
        ("auto", gpu, False, True, "triton on cuda"),
    ):
        how = {"is_compiled": is_compiled, "is_low_precision": is_low_precision}
        config = IntegratorConfig(backend=setting)
        with both:
            assert select.describe_backend(config, device, **how).startswith(expected)
            assert select.backend_name(config, device, **how) == expected.split()[0].rstrip(",")
    experts = IntegratorConfig.model_validate({"controller": {"experts": 2}})
    assert select.describe_backend(experts, cpu, is_compiled=True) == traced


def test_a_cpu_run_does_not_import_triton():
    code = (
        "import sys, torch\n"
        "from tests.model.test_integrator import build, inputs\n"
        "layer, controller = build(backend='triton')\n"
        "h, x, v, c = inputs()\n"
        "layer(h, x, v, amplitude=torch.tensor(0.1), candidate=c, controller=controller).state.sum().backward()\n"
        "assert 'inl_core.model.backends.fused' in sys.modules\n"
        "assert 'inl_core.model.backends.triton_launch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
