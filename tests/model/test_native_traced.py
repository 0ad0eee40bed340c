"""The C++ loop as an operation of a compiled block: what a compiler is told of it is so, and it runs no more often."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from inl_core.model import IntegratorLanguageModel
from inl_core.model import integrator as integrator_module
from inl_core.model.backends import native, native_traced
from inl_core.model.backends.rule import Inputs, Rule
from inl_core.recipe import ModelConfig, TrainingSettings
from inl_core.training.distributed import prepare_blocks
from tests.model.test_integrator import build, inputs
from tests.plain_loop import the_plain_loop

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no compiler here, or torch has other threads")

RULE = Rule(3, 0.7, 1.0, 2.0, "relu")
VARIANTS = {
    "all there": (RULE._replace(energy_power=2.0), set()),
    "no losses": (RULE, set()),
    "no velocity, no fraction": (RULE, {"v", "last_fraction"}),
    "no candidate, no bounds": (Rule(1, 0.5, None, None, "gelu"), {"candidate"}),
}


def flat(rule: Rule, without: set, num_tokens: int = 5, dim: int = 7, width: int = 3) -> Inputs:
    """Leaves in double precision; a controller without a candidate gives a fourth group."""
    generator = torch.Generator().manual_seed(0)
    groups = 4 if "candidate" in without else 3
    shapes = dict.fromkeys(("x", "v", "candidate"), (num_tokens, dim))
    shapes |= {"hoisted": (num_tokens, width), "inner": (width, 2 * dim), "outer": (groups * dim, width)}
    shapes |= {"bias": (groups * dim,), "mu": (dim,), "forcing": (rule.num_iterations, dim), "last_fraction": ()}
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return Inputs(**{name: None if name in without else drawn[name].requires_grad_() for name in Inputs._fields})


@pytest.mark.parametrize(("rule", "without"), VARIANTS.values(), ids=VARIANTS.keys())
def test_what_the_operation_declares_is_so(rule, without):
    """torch's own check: no input is written to or handed back, and shapes, strides and gradients are as traced."""
    torch.library.opcheck(native_traced.iterate, (*flat(rule, without), *rule, True))


@pytest.mark.parametrize(("rule", "without"), VARIANTS.values(), ids=VARIANTS.keys())
def test_it_gives_the_numbers_of_the_loop_itself(rule, without):
    found = []
    for run in (native_traced.run, native.run):
        leaves = flat(rule, without)
        results = [value for value in run(rule, leaves) if value is not None]
        there = [value for value in leaves if value is not None]
        loss = torch.stack([value.square().sum() for value in results]).sum()
        found.append([*results, *torch.autograd.grad(loss, there)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours, theirs)


def test_mu_may_move_before_the_backward_pass():
    found = []
    for shift in (0.0, 1.0):
        leaves = flat(RULE, set())
        x = native_traced.run(RULE, leaves).x
        with torch.no_grad():
            leaves.mu.add_(shift)
        found.append(torch.autograd.grad(x.square().sum(), [leaves.x, leaves.mu, leaves.outer]))
    for still, moved in zip(*found, strict=True):
        assert torch.equal(still, moved)


def test_nothing_is_kept_where_no_gradient_is_wanted():
    with torch.no_grad(), patch.object(native, "new_hidden", wraps=native.new_hidden) as new_hidden:
        native_traced.run(RULE, flat(RULE, set()))
    assert new_hidden.call_args.kwargs == {"keep": False}


def test_its_arithmetic_is_counted_as_the_plain_loops():
    layer, controller = build()
    h, x, v, candidate = inputs()
    counts = []
    for traced in (True, False):
        find = patch.object(integrator_module, "find_backend", lambda *_: native_traced.run)
        with find if traced else the_plain_loop(), FlopCounterMode(display=False) as counter:
            layer(h, x, v, amplitude=torch.tensor(0.1), candidate=candidate, controller=controller)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def model_of(backend: str) -> IntegratorLanguageModel:
    keys = {"preset": "v4", "d_model": 32, "num_layers": 3, "num_heads": 4, "vocab_size": 50, "max_seq_len": 16}
    model = IntegratorLanguageModel(ModelConfig.model_validate({**keys, "integrator": {"backend": backend}}))
    model.initialise(0)
    return model.train()


def gradients(model: IntegratorLanguageModel) -> list[torch.Tensor]:
    ids = torch.randint(0, 50, (2, 16), generator=torch.Generator().manual_seed(0))
    model.loss_sum(model(ids).hidden, ids).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("recomputation", ["none", "integrator", "block"])
def test_compiled_blocks_call_it_once_forward_and_once_backward(recomputation, monkeypatch):
    """The compiler's partition between the passes runs too, with the trainer's budget of what is kept."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager_decomp_partition", fullgraph=True))
    model = model_of("native")
    prepare_blocks(model.blocks, TrainingSettings(steps=1, compile=True, recomputation=recomputation))
    with (
        patch.object(native, "forward", wraps=native.forward) as forward,
        patch.object(native, "backward", wraps=native.backward) as backward,
    ):
        found = gradients(model)
    assert backward.call_count == 3
    assert forward.call_count == (6 if recomputation == "block" else 3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # the layers above the first have a velocity
    assert not torch._dynamo.utils.counters["graph_break"]
    for ours, theirs in zip(found, gradients(model_of("eager")), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_under_autocast_the_compiler_traces_the_plain_loop_instead(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager", fullgraph=True))
    model = model_of("native")
    prepare_blocks(model.blocks, TrainingSettings(steps=1, compile=True, precision="bf16"))
    with torch.autocast("cpu", torch.bfloat16), patch.object(native, "forward") as forward:
        assert all(gradient.isfinite().all() for gradient in gradients(model))
    assert not forward.called
