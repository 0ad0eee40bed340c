"""Time by part of one repetition, from torch.profiler: which module's forward, and whose backward, took how long.

- Ranges are put around modules from outside, by hooks that are gone afterwards; the model knows nothing of them.
- Backward: autograd gives the operation that recorded a node, and the node, one sequence number. The operation ran
  inside some range, so the node's time is that range's part. Recomputation inside a node counts to the node. What has
  no number, the accumulation of a gradient, counts to the node before it.
- A range counts without the ranges inside it, so the parts add up to the repetition exactly; `other` is what lies in no
  range: norms, residual sums, the Python between.
- On a GPU the seconds are those of the kernels an operation launched, and `idle` is when none ran.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from inl_core.analysis.bench.measuring import synchronize

PARTS = ("attention", "integrator", "feed-forward", "embedding", "head", "optimizer", "data", "other", "idle")
_PREFIX = "inl.part/"
_BACKWARD = "autograd::engine::evaluate_function: "


@dataclass(frozen=True)
class PartTimes:
    """Seconds of a profiled repetition, and of each part in it."""

    seconds: float
    by_part: dict[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """Each part's share of the repetition."""
        return {part: seconds / self.seconds for part, seconds in self.by_part.items()}


def part(name: str) -> record_function:
    """A range: `with part("optimizer"): ...`."""
    return record_function(_PREFIX + name)


@contextmanager
def ranges(modules: list[tuple[nn.Module, str]], functions: list[tuple[Any, str, str]]) -> Iterator[None]:
    """Put ranges around every call of the modules, and of the functions (owner, attribute, part)."""
    with ExitStack() as stack:
        for module, name in modules:
            stack.enter_context(_hooked(module, name) if module._compiled_call_impl is None else _wrapped(module, name))
        for owner, attribute, name in functions:
            stack.enter_context(_replaced(owner, attribute, _ranged(getattr(owner, attribute), name)))
        yield


@contextmanager
def _hooked(module: nn.Module, name: str) -> Iterator[None]:
    running: list[record_function] = []

    def enter(*_: Any) -> None:
        running.append(part(name))
        running[-1].__enter__()

    def leave(*_: Any) -> None:
        running.pop().__exit__(None, None, None)

    first, last = module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        first.remove()
        last.remove()


@contextmanager
def _wrapped(module: nn.Module, name: str) -> Iterator[None]:
    """A compiled module's hooks would be compiled with it; the range goes around the compiled call instead."""
    compiled: Any = module._compiled_call_impl
    module._compiled_call_impl = _ranged(compiled, name)
    try:
        yield
    finally:
        module._compiled_call_impl = compiled


@contextmanager
def _replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    """The attribute of this one object, its class untouched."""
    own = vars(owner)
    was_own, before = attribute in own, own.get(attribute)
    own[attribute] = value
    try:
        yield
    finally:
        if was_own:
            own[attribute] = before
        else:
            del own[attribute]


def _ranged(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with part(name):
            return function(*args, **kwargs)

    return call


def profile_parts(run: Callable[[], None], device: torch.device, *, repetitions: int = 1) -> PartTimes:
    """Run under the profiler, inside the ranges that the caller has put up; the repetition of median time counts."""
    found = sorted((_profile_once(run, device) for _ in range(repetitions)), key=lambda times: times.seconds)
    return found[len(found) // 2]


def _profile_once(run: Callable[[], None], device: torch.device) -> PartTimes:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities, acc_events=True) as profiler, part("other"):
        run()
        synchronize(device)
    return attribute(list(profiler.events() or []), on_device=device.type == "cuda")


@dataclass
class _Open:
    """A range, or a backward node, that has begun."""

    end: float
    part: str


def attribute(events: list[Any], *, on_device: bool = False) -> PartTimes:
    """Parts of the profiler's events: on a CPU from the thread of the outermost range, on a GPU from the kernels."""
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU and not event.is_async]
    events.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    root = next(event for event in events if event.name.startswith(_PREFIX))
    times: dict[str, float] = defaultdict(float)
    stacks: dict[int, list[_Open]] = defaultdict(list)
    owners: dict[tuple[int, int], str] = {}
    last: dict[int, str] = {}  # the part of a thread's latest backward node
    for event in events:
        stack, begin, end = stacks[event.thread], event.time_range.start, event.time_range.end
        while stack and stack[-1].end <= begin:
            stack.pop()
        outer = stack[-1].part if stack else "other"
        inner = _part_of(event, outer, owners, last)
        if inner is None:
            if event.sequence_nr >= 0:  # the latest operation with a number is the one that recorded its node
                owners[event.thread, event.sequence_nr] = outer
        else:
            if event.thread == root.thread and not on_device:
                times[inner] += end - begin
                if stack:
                    times[outer] -= end - begin
            stack.append(_Open(end, inner))
        if on_device:
            times[inner or outer] += sum(kernel.duration for kernel in event.kernels)
    total = root.time_range.end - root.time_range.start
    if on_device:
        times["idle"] = max(0.0, total - sum(times.values()))
    return PartTimes(total / 1e6, {name: times[name] / 1e6 for name in PARTS if times.get(name)})


def _part_of(event: Any, outer: str, owners: dict[tuple[int, int], str], last: dict[int, str]) -> str | None:
    """The part an event begins; None when it begins none."""
    if event.name.startswith(_PREFIX):
        return event.name.removeprefix(_PREFIX)
    if not event.name.startswith(_BACKWARD):
        return None
    default = last.get(event.thread, outer) if event.sequence_nr < 0 else outer
    found = owners.get((event.fwd_thread, event.sequence_nr), default)
    last[event.thread] = found
    return found
