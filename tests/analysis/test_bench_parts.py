"""Time by part: forward and backward go to the part that caused them, and the parts make the whole."""

import time
from typing import Any

import pytest
import torch
from torch import nn

from inl_core.analysis.bench import BenchSettings, Choice, first_candidate
from inl_core.analysis.bench.inl_work import build_inl_work
from inl_core.analysis.bench.parts import part, profile_parts, ranges
from inl_core.analysis.bench.work import Work

CPU = torch.device("cpu")
TINY = {"d_model": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "feedforward_dim": 96, "vocab_size": 300}


def tiny_work(preset: str, task: Any = "train", **changes: Any) -> Work:
    settings = BenchSettings(task, batch_size=2, sequence_length=16, prompt_tokens=5, new_tokens=4, **changes)
    choice = Choice(preset=preset, model=TINY, batch_size=2, sequence_length=16)
    return build_inl_work(first_candidate(choice), settings, compiled=False)


class Sleeps(torch.autograd.Function):
    """The identity, which takes its time; with `again` the backward pass computes the forward pass once more."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: float, backward: float, again: bool) -> torch.Tensor:
        ctx.seconds, ctx.again = backward, again
        ctx.save_for_backward(x)
        time.sleep(forward)
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        time.sleep(ctx.seconds)
        if ctx.again:
            (x,) = ctx.saved_tensors
            with torch.enable_grad():
                inner = x.detach().requires_grad_()
                outer = Sleeps.apply(inner, 0.02, 0.03, False)
                torch.autograd.grad(outer, inner, *gradients)
        return gradients[0], None, None, None


class Sleeper(nn.Module):
    def __init__(self, forward: float, backward: float, again: bool = False) -> None:
        super().__init__()
        self.arguments = (forward, backward, again)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Sleeps.apply(x * self.scale, *self.arguments)


def test_backward_time_goes_to_the_part_whose_forward_recorded_it() -> None:
    attention, integrator, inner = Sleeper(0.04, 0.08), Sleeper(0.06, 0.02, again=True), Sleeper(0.05, 0.07)
    x = torch.ones(4, requires_grad=True)

    def run() -> None:
        y = attention(x)
        time.sleep(0.03)  # in no range
        y = integrator(y)
        with part("head"):
            y = inner(y)  # a range inside another counts for itself
            time.sleep(0.02)
        y.sum().backward()
        with part("optimizer"):
            time.sleep(0.01)

    modules = [(attention, "attention"), (integrator, "integrator"), (inner, "feed-forward")]
    with ranges(modules, []):
        run()
        start = time.perf_counter()
        found = profile_parts(run, CPU)
        wall = time.perf_counter() - start
    expected = {"attention": 0.12, "integrator": 0.13, "feed-forward": 0.12, "head": 0.02, "other": 0.03}
    for name, seconds in {**expected, "optimizer": 0.01}.items():
        # A busy machine adds to any of them; what is counted for the wrong part is missing in its own.
        assert found.by_part[name] >= seconds - 0.001, name
    assert sum(found.by_part.values()) == pytest.approx(found.seconds, rel=1e-6)
    assert found.seconds < wall


@pytest.mark.parametrize("preset", ["v4", "v3", "transformer"])
def test_the_parts_of_a_training_step_add_up_to_its_time(preset: str) -> None:
    work = tiny_work(preset)
    work.run()
    with ranges(work.parts, work.functions):
        work.run()
        start = time.perf_counter()
        found = profile_parts(work.run, CPU, repetitions=2)
        wall = time.perf_counter() - start
    assert sum(found.by_part.values()) == pytest.approx(found.seconds, rel=1e-6)
    assert sum(found.shares.values()) == pytest.approx(1.0, rel=1e-6)
    assert found.seconds < wall
    assert min(found.by_part.values()) > 0
    expected = {"attention", "feed-forward", "embedding", "head", "optimizer", "data", "other"}
    assert set(found.by_part) == expected | ({"integrator"} if preset != "transformer" else set())


def test_the_model_is_as_before_when_the_ranges_are_gone() -> None:
    work = tiny_work("v4")
    with ranges(work.parts, work.functions):
        assert all(module._forward_hooks for module, _ in work.parts)
        assert "loss_sum" in vars(work.model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in work.model.modules())
    assert "loss_sum" not in vars(work.model)


def test_a_prefill_and_a_generation_have_their_parts_too() -> None:
    for task in ("prefill", "decode"):
        work = tiny_work("v4", task)
        with ranges(work.parts, work.functions):
            found = profile_parts(work.run, CPU)
        assert {"attention", "integrator", "feed-forward", "embedding", "head", "other"} <= set(found.by_part)
        assert sum(found.by_part.values()) == pytest.approx(found.seconds, rel=1e-6)
