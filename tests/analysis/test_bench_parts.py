"""Time by part: forward and backward go to the part that caused them, and the parts make the whole.

Real times differ from run to run. So the test of who gets the time counts the profiler's events instead: the n-th begin
or end of an event is at time n.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from inl_core.analysis.bench import parts
from inl_core.analysis.bench.choosing import Choice, first_candidate
from inl_core.analysis.bench.inl_work import build_inl_work
from inl_core.analysis.bench.parts import PartTimes, Timed, part, profile_parts, ranges
from inl_core.analysis.bench.settings import BenchSettings
from inl_core.analysis.bench.work import Work

CPU = torch.device("cpu")
TINY = {"d_model": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "feedforward_dim": 96, "vocab_size": 300}


def tiny_work(preset: str, task: Any = "train") -> Work:
    settings = BenchSettings(task, batch_size=2, sequence_length=16, prompt_tokens=5, new_tokens=4)
    choice = Choice(preset=preset, model=TINY, batch_size=2, sequence_length=16)
    return build_inl_work(first_candidate(choice), settings, compiled=False)


def operations(x: torch.Tensor, count: int) -> torch.Tensor:
    """`count` operations that leave the values as they are."""
    for _ in range(count):
        x = x * 1.0
    return x


class Counted(torch.autograd.Function):
    """The identity, in a given number of operations forward and backward.

    With `again` the backward pass holds another forward and backward pass, as recomputation does.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: int, backward: int, again: bool) -> torch.Tensor:
        ctx.num_operations, ctx.again = backward, again
        return operations(x, forward)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        gradient = operations(gradients[0], ctx.num_operations)
        if ctx.again:
            with torch.enable_grad():
                inner = gradient.detach().requires_grad_()
                torch.autograd.grad(Counted.apply(inner, 40, 60, False), inner, gradient)
        return gradient, None, None, None


class Layer(nn.Module):
    def __init__(self, forward: int, backward: int, again: bool = False) -> None:
        super().__init__()
        self.arguments = (forward, backward, again)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Counted.apply(x * self.scale, *self.arguments)


@pytest.fixture
def counted_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are not microseconds, but how many events have begun or ended before."""
    attribute = parts.attribute

    def by_count(events: list[Any], **options: Any) -> PartTimes:
        times = sorted({time for event in events for time in (event.time_range.start, event.time_range.end)})
        number = {time: index for index, time in enumerate(times)}
        names = ("name", "thread", "fwd_thread", "sequence_nr", "device_type", "is_async")
        copies = []
        for event in events:
            span = SimpleNamespace(start=number[event.time_range.start], end=number[event.time_range.end])
            copies.append(SimpleNamespace(time_range=span, **{name: getattr(event, name) for name in names}))
        return attribute(copies, **options)

    monkeypatch.setattr(parts, "attribute", by_count)


def test_backward_time_goes_to_the_part_whose_forward_recorded_it(counted_events: None) -> None:
    attention, integrator, inner = Layer(100, 300), Layer(200, 100, again=True), Layer(0, 150)
    x = torch.ones(4, requires_grad=True)

    def run() -> None:
        y = operations(attention(x), 70)  # in no range
        y = integrator(y)
        with part("head"):
            y = operations(inner(y), 50)  # a range inside another counts for itself
        y.sum().backward()
        with part("optimizer"):
            operations(x, 20)

    timed: list[Timed] = [
        (attention, "forward", "attention"),
        (integrator, "forward", "integrator"),
        (inner, "forward", "feed-forward"),
    ]
    with ranges(timed):
        run()
        found = profile_parts(run, CPU)
    # In units of one operation. An operation outside of Counted has a backward node, which holds one operation.
    done = {"attention": 400, "integrator": 400, "feed-forward": 150, "head": 100, "other": 140, "optimizer": 20}
    scale = found.by_part["optimizer"] / 20
    for name, number in done.items():
        assert number - 5 < found.by_part[name] / scale < 1.3 * number, (name, found.by_part)
    assert sum(found.by_part.values()) == pytest.approx(found.seconds, rel=1e-6)


@pytest.mark.parametrize("preset", ["v4", "v3", "transformer"])
def test_the_parts_of_a_training_step_add_up_to_its_time(preset: str) -> None:
    work = tiny_work(preset)
    work.run()
    with ranges(work.timed):
        found = profile_parts(work.run, CPU, repetitions=2)
    assert sum(found.by_part.values()) == pytest.approx(found.seconds, rel=1e-6)
    assert sum(found.shares.values()) == pytest.approx(1.0, rel=1e-6)
    assert min(found.by_part.values()) > 0
    expected = {"attention", "feed-forward", "embedding", "head", "optimizer", "data", "other"}
    assert set(found.by_part) == expected | ({"integrator"} if preset != "transformer" else set())


def test_the_model_is_as_before_when_the_ranges_are_gone() -> None:
    work = tiny_work("v4")
    modules = [owner for owner, attribute, _ in work.timed if attribute == "forward"]
    assert modules
    with ranges(work.timed):
        assert all("forward" in vars(module) for module in modules)
        assert "loss_sum" in vars(work.model)
    assert not any("forward" in vars(module) for module in work.model.modules())
    assert "loss_sum" not in vars(work.model)


def test_a_prefill_and_a_generation_have_their_parts_too() -> None:
    for task in ("prefill", "decode"):
        work = tiny_work("v4", task)
        with ranges(work.timed):
            found = profile_parts(work.run, CPU)
        assert {"attention", "integrator", "feed-forward", "embedding", "head", "other"} <= set(found.by_part)
        assert sum(found.by_part.values()) == pytest.approx(found.seconds, rel=1e-6)
