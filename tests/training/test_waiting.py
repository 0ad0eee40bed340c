"""Between two steps that write something, nobody asks the device for a number, so that on a GPU the host runs ahead.

A CPU cannot say where the host would wait for a GPU; here every way from a tensor to a number of Python is counted.
benchmarks/gpu.py asks torch on a GPU.
"""

from collections import Counter

import pytest
import torch
from torch import nn

from inl_core.kernels.apply import EVERY_TOKEN, Choice, put
from inl_core.recipe import OptimizerSettings
from inl_core.training.adaptation import adapt_equilibrium
from inl_core.training.interruption import StopSignal
from inl_core.training.muon import Muon
from inl_core.training.nonfinite import FiniteWatch
from inl_core.training.optimizers import build_optimizers
from tests.kernels.native import build_model

CPU = torch.device("cpu")
TORCH = Choice("torch", "asked for by a test")
CASES = {
    "v5, muon": {"model": {"preset": "v5"}, "training": {"optimizer": {"name": "muon"}}},
    "moving mu": {"model": {"preset": "v4", "integrator": {"mu": {"adaptation_rate": 0.1}}}},
    "a dynamic budget": {"model": {"preset": "v4", "integrator": {"budget": {"strategy": "dynamic"}}}},
    "experts": {"model": {"preset": "v4", "integrator": {"controller": {"experts": 3, "top_k": 2}}}},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_a_step_that_writes_nothing_asks_for_no_number(make_recipe, make_trainer, monkeypatch, changes):
    training = {"logging": {"every": 10, "dynamics_every": 0}} | changes.get("training", {})
    trainer, _ = make_trainer(make_recipe(model=changes["model"], training=training))
    every = Choice(EVERY_TOKEN, "asked for by a test")  # what the host would wait for is what makes a mixture slow
    put(trainer.model, {"attention": TORCH, "integrator": every if "experts" in str(changes) else TORCH, "loss": TORCH})
    trainer.stepper.watch = FiniteWatch(trainer.optimizers, CPU, deferred=True)
    assert trainer.optimizers.can_skip
    trainer.model.train()
    stop, asked = StopSignal(), Counter()
    for step in (0, 1):
        trainer.stepper.take(step, stop)
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "nonzero"):
        real = getattr(torch.Tensor, name)

        def counted(tensor, *given, name=name, real=real):
            if tensor.dtype != torch.uint8:  # the state of a generator, which the host has
                asked[name] += 1
            return real(tensor, *given)

        monkeypatch.setattr(torch.Tensor, name, counted)
    for step in (2, 3):
        trainer.stepper.take(step, stop)
    monkeypatch.undo()
    trainer.stepper.close()
    assert not asked


def some_matrices(seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((6, 4), (4, 8))]


def test_muon_leaves_out_what_the_flag_says_and_is_torch_s_otherwise():
    ours, theirs = some_matrices(), some_matrices()
    skipping = Muon(ours, lr=0.1, adjust_lr_fn="match_rms_adamw")
    plain = torch.optim.Muon(theirs, lr=0.1, adjust_lr_fn="match_rms_adamw")
    skipping.found_inf = torch.zeros(())
    for step in range(4):
        bad = step in (0, 2)
        for one, other, gradient in zip(ours, theirs, some_matrices(step + 1), strict=True):
            one.grad = gradient.detach() * (torch.nan if bad else 1.0)
            other.grad = gradient.detach()
        skipping.found_inf.fill_(float(bad))
        skipping.step()
        if not bad:
            plain.step()
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)
            assert torch.equal(
                skipping.state[one]["momentum_buffer"], plain.state[other].get("momentum_buffer", torch.zeros_like(one))
            )
    assert len(skipping.param_groups) == 1
    assert len(skipping.param_groups[0]["params"]) == 2


def test_a_bad_step_moves_no_weight_of_any_optimizer():
    model = build_model("v5")
    optimizers = build_optimizers(model, OptimizerSettings(name="muon"), CPU)
    watch = FiniteWatch(optimizers, CPU, deferred=True)
    for step, value in enumerate((0.1, torch.nan, 0.1)):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        watch.observe(step, torch.tensor(1.0), torch.tensor(value))
        optimizers.step()
        is_moved = [not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
        assert all(is_moved) if step == 0 else not any(is_moved)
    found = watch.first_bad()
    assert found
    assert found[0] == 1


def test_a_bad_step_does_not_move_mu():
    model = build_model("v4", integrator={"mu": {"adaptation_rate": 0.1}})
    moments = torch.full((2, len(model.blocks), model.config.d_model), 5.0)
    before = [integrator.equilibrium().detach().clone() for integrator in model.integrators()]
    adapt_equilibrium(model, {"moments": moments * torch.nan}, 1.0, torch.ones(()))
    assert all(torch.equal(layer.equilibrium(), mu) for layer, mu in zip(model.integrators(), before, strict=True))
    adapt_equilibrium(model, {"moments": moments}, 1.0, torch.zeros(()))
    for layer, mu in zip(model.integrators(), before, strict=True):
        torch.testing.assert_close(layer.equilibrium(), torch.lerp(mu, moments[0, 0], 0.1))


def test_an_allocation_that_changes_is_read_again():
    model = build_model("v4", integrator={"num_iterations": 3, "budget": {"strategy": "dynamic"}})
    budget = model.budget
    assert budget is not None

    def counts() -> list[int]:
        return [layer.num_iterations for layer in budget()]

    assert counts() == [3, 3]
    budget.reallocate(torch.tensor([1.0, 0.1]))
    assert counts() == budget.allocation.tolist() != [3, 3]
    budget.load_state_dict({"allocation": torch.tensor([2, 4])})
    assert counts() == [2, 4]
