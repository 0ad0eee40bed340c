"""Which way of computing a part is the fastest on this machine: measured once, then remembered.

- Forward and backward passes in the model's widths over few tokens, the ways in turn, so that a busy moment slows all
  of them; the least time of each counts. It takes some seconds at most, once for each number of threads.
- Remembered beside the compiled library (cpu/cache.py), for the same processor, compiler flags, torch and number of
  threads; where nothing can be kept it is measured anew. Times scatter, so a run that is resumed keeps the ways it was
  computed by before, unless another one is much faster here: it then goes on bit for bit.
- A way in C++ must be a twentieth faster than torch's own operations, or those stay.
"""

import json
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import lru_cache, partial

import torch
from torch import Tensor

from inl_core.kernels.apply import TORCH, Choice, build_attention, build_dynamics
from inl_core.kernels.cpu import cache
from inl_core.kernels.cpu.library import fingerprint, library, why_missing
from inl_core.model.dynamics import Drive
from inl_core.recipe import ModelConfig

_TURNS = 4
_ELEMENTS = 2**18
"""Of one tensor (tokens, D)."""
_MOST_HEADS, _WIDEST_HEAD, _WIDEST, _WIDEST_CONTROLLER, _MOST_ITERATIONS = 16, 128, 1024, 256, 8
_LEAST_GAIN = 1.05
_MUCH_FASTER = 1.3


def fastest(part: str, config: ModelConfig, before: str | None = None) -> Choice:
    """The fastest way of `attention` or `integrator` in a model, or the one `before` if that is nearly as fast.

    It is torch's where there are no operations in C++.
    """
    found = library()
    if found is None:
        return Choice(TORCH, f"no operations in C++: {why_missing()}")
    seconds = _remembered(part, _sizes(part, config), torch.get_num_threads(), found.products)
    best = min(seconds, key=lambda way: seconds[way])
    if before in seconds and seconds[before] < _MUCH_FASTER * seconds[best]:
        return Choice(before, "as before")
    ratio = seconds[TORCH] / seconds[best]
    if ratio < _LEAST_GAIN:
        return Choice(TORCH, f"C++ is {ratio:.2f} times as fast, measured here")
    return Choice(best, f"{ratio:.2f} times as fast as torch, measured here")


def _sizes(part: str, config: ModelConfig) -> tuple[int, ...]:
    """What the time depends on: heads, key-value heads and head size; or D, C and T.

    None is more than a CPU trains in earnest: a plan of any model must not take time or memory.
    """
    if part == "attention":
        shared = min(_MOST_HEADS, config.num_heads // config.key_value_heads)
        key_heads = max(1, min(_MOST_HEADS // shared, config.key_value_heads))
        return shared * key_heads, key_heads, min(_WIDEST_HEAD, config.head_dim)
    assert config.integrator is not None
    width, iterations = config.integrator.controller.width, config.integrator.num_iterations
    return min(_WIDEST, config.d_model), min(_WIDEST_CONTROLLER, width), min(_MOST_ITERATIONS, iterations)


@lru_cache
def _remembered(part: str, sizes: tuple[int, ...], threads: int, products: tuple[str, ...]) -> dict[str, float]:
    """way -> seconds, as kept on this machine or measured now."""
    what = (part, *map(str, (*sizes, threads)), *products)
    return remembered(what, _ways(products), lambda: measure(part, sizes, products))


def remembered(
    what: Iterable[str], ways: Collection[str], measured: Callable[[], dict[str, float]]
) -> dict[str, float]:
    """way -> seconds, as kept on this machine under the name of `what` was measured, or measured now and kept."""
    name = "-".join(("measured", fingerprint(), *what))
    found = _checked(cache.find(name, [".json"]), ways)
    if found is not None:
        return found
    found = measured()
    cache.keep(f"{name}.json", json.dumps(found).encode())
    return found


def _checked(kept: bytes | None, ways: Collection[str]) -> dict[str, float] | None:
    """What was kept, if it is a time for each way: another version may have written something else."""
    try:
        found = json.loads(kept or b"")
        is_sound = set(found) == set(ways) and all(0 < seconds < 3600 for seconds in found.values())
    except (ValueError, TypeError, AttributeError):
        return None
    return found if is_sound else None


def _ways(products: tuple[str, ...]) -> list[str]:
    return [TORCH, *(f"C++ with {product}" for product in products)]


def measure(part: str, sizes: tuple[int, ...], products: tuple[str, ...]) -> dict[str, float]:
    """way -> seconds of one forward and backward pass, the least of a few."""
    build = _attention_pass if part == "attention" else _integrator_pass
    return _time(partial(build, *sizes), _ways(products))


def _time(build: Callable[[str], Callable[[], Tensor]], ways: list[str]) -> dict[str, float]:
    def there_and_back(run: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: run().sum().backward()

    with torch.enable_grad():
        return least_seconds({way: there_and_back(build(way)) for way in ways}, _TURNS)


def least_seconds(runs: Mapping[str, Callable[[], object]], turns: int) -> dict[str, float]:
    """way -> the least seconds of some turns, in each of which every way runs once."""
    seconds = dict.fromkeys(runs, float("inf"))
    for turn in range(turns + 1):
        for way, run in runs.items():
            start = time.perf_counter()
            run()
            if turn:  # the first also makes kernels
                seconds[way] = min(seconds[way], time.perf_counter() - start)
    return seconds


def _random(*shape: int) -> Tensor:
    """The global generator is neither read nor moved."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def _attention_pass(heads: int, key_heads: int, size: int, way: str) -> Callable[[], Tensor]:
    """Rows of 256 tokens."""
    dim = heads * size
    config = ModelConfig.model_validate({"d_model": dim, "num_heads": heads, "num_kv_heads": key_heads})
    rows = max(1, _ELEMENTS // dim // 256)
    attention, packed = build_attention(config, way), _random(rows, 256, (heads + 2 * key_heads) * size)
    rotary = None if size % 2 else tuple(_random(2, rows, 256, 1, size // 2).detach())
    mask = None if way == TORCH else torch.zeros(rows, 256, dtype=torch.int64)
    return lambda: attention(packed, rotary, mask, None)


def _integrator_pass(dim: int, width: int, iterations: int, way: str) -> Callable[[], Tensor]:
    """Tokens one after another, of a layer whose candidate is given."""
    config = ModelConfig.model_validate({"preset": "v4", "d_model": dim}).integrator
    assert config is not None
    dynamics, tokens = build_dynamics(config, way), max(64, _ELEMENTS // dim)
    x, v, candidate = (_random(tokens, dim) for _ in range(3))
    inner, outer = (
        _random(*shape).detach().mul(0.05).requires_grad_() for shape in ((width, 2 * dim), (3 * dim, width))
    )
    drive = Drive(_random(tokens, width), inner, outer, _random(3 * dim), candidate, _random(dim))
    forcing = _random(iterations, dim)
    return lambda: dynamics(drive, x, v, forcing).state
