"""Time by part of one repetition, from torch.profiler: which module's forward, and whose backward, took how long.

- A range is what the profiler calls a named stretch of time. Ranges are put around the calls of modules and functions
  from outside, and are gone afterwards; the model knows nothing of them.
- Backward: autograd gives one sequence number both to the operation that recorded a node of its graph and to that node.
  The operation ran inside some range, so the time of the node counts to the part of that range, and so does what the
  node computes again. A node without a number (it adds up a gradient) counts to the part of the node before it.
- The time of a range does not include the ranges inside it, so the parts add up to the repetition exactly. `other` is
  the time outside of all ranges: norms, residual sums, the Python between.
- On a GPU the seconds are those of the kernels that an operation launched, and `idle` is the time when none ran.
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

PARTS = (
    "attention",
    "attention and feed-forward",
    "integrator",
    "feed-forward",
    "embedding",
    "head",
    "optimizer",
    "data",
    "other",
    "idle",
)
Timed = tuple[Any, str, str]
"""An object, the name of one of its attributes that is called, and the part that its time counts to."""

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
def ranges(timed: list[Timed]) -> Iterator[None]:
    """While open, every call of these modules and functions is a range of its part."""
    with ExitStack() as stack:
        for owner, attribute, name in timed:
            # What stands inside a compiled module would be compiled with it, so the range goes around the whole.
            is_compiled = isinstance(owner, nn.Module) and owner._compiled_call_impl is not None
            place = "_compiled_call_impl" if is_compiled and attribute == "forward" else attribute
            stack.enter_context(_replaced(owner, place, _ranged(getattr(owner, place), name)))
        yield


@contextmanager
def _replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    """The attribute of this object, which may be a class, is `value`; the class of an object is not touched."""
    missing = object()
    before = vars(owner).get(attribute, missing)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, attribute)
        else:
            setattr(owner, attribute, before)


def _ranged(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with part(name):
            return function(*args, **kwargs)

    return call


def profile_parts(run: Callable[[], None], device: torch.device, *, repetitions: int = 1) -> PartTimes:
    """The parts of the repetition of median time; the caller has opened `ranges`."""
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
    """A range, or a node of the backward pass, that has begun and not ended."""

    end: float
    part: str


def attribute(events: list[Any], *, on_device: bool = False) -> PartTimes:
    """The parts of a repetition, from the profiler's events.

    On a CPU the time of the thread that ran the repetition is divided; on a GPU that of the kernels.
    """
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU and not event.is_async]
    events.sort(key=lambda event: (event.time_range.start, -event.time_range.end))
    root = next(event for event in events if event.name.startswith(_PREFIX))
    times: dict[str, float] = defaultdict(float)
    stacks: dict[int, list[_Open]] = defaultdict(list)
    owners: dict[tuple[int, int], str] = {}
    last: dict[int, str] = {}  # by thread: the part of its latest backward node
    for event in events:
        stack, begin, end = stacks[event.thread], event.time_range.start, event.time_range.end
        while stack and stack[-1].end <= begin:
            stack.pop()
        outer = stack[-1].part if stack else "other"
        inner = _part_of(event, outer, owners, last)
        if inner is None:
            if event.sequence_nr >= 0:  # several may have one number; the last of them recorded the node
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
    """The part that an event begins; None for an operation, which belongs to the part it runs in."""
    if event.name.startswith(_PREFIX):
        return event.name.removeprefix(_PREFIX)
    if not event.name.startswith(_BACKWARD):
        return None
    default = last.get(event.thread, outer) if event.sequence_nr < 0 else outer
    found = owners.get((event.fwd_thread, event.sequence_nr), default)
    last[event.thread] = found
    return found
