"""Which way of computing a part is the fastest on this machine: measured once, then remembered.

- Forward and backward passes of small, usual sizes, the ways in turn, so that a busy moment slows all of them; the
  least time of each counts. It takes some seconds at most, once for each number of threads.
- Remembered beside the compiled library (cpu/cache.py), for the same processor, compiler flags, torch and number of
  threads. So a run that is resumed on its machine finds the same answer; where nothing can be kept it is measured anew.
- C++ is taken where it is at least 1.05 times as fast as torch; a smaller gain is within the measurement's error. To be
  kept in the project, an operation must gain more: 1.15 (CONTRIBUTING.md, "An operation of our own").
"""

import json
import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from inl_core.kernels.apply import TORCH, Choice, build_attention, build_dynamics
from inl_core.kernels.cpu import cache
from inl_core.kernels.cpu.library import fingerprint, library, why_missing
from inl_core.model.dynamics import Drive
from inl_core.recipe import ModelConfig

_TURNS = 4
_LEAST_GAIN = 1.05


def fastest(part: str) -> Choice:
    """The fastest way of `attention` or `integrator`; torch's where there is no library in C++."""
    found = library()
    if found is None:
        return Choice(TORCH, f"no operations in C++: {why_missing()}")
    seconds = _remembered(torch.get_num_threads(), found.products)[part]
    best = min(seconds, key=lambda way: seconds[way])
    ratio = seconds[TORCH] / seconds[best]
    if ratio < _LEAST_GAIN:
        return Choice(TORCH, f"measured on this machine: C++ is not faster than torch ({ratio:.2f} times)")
    return Choice(best, f"measured on this machine: {ratio:.2f} times as fast as torch")


@lru_cache
def _remembered(threads: int, products: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """part -> way -> seconds, as kept on this machine or measured now."""
    name = f"measured-{fingerprint()}-{'-'.join(products)}-{threads}.json"
    kept = cache.find(name, [""])
    if kept is not None:
        return json.loads(kept)
    found = measure()
    cache.keep(name, json.dumps(found).encode())
    return found


def measure() -> dict[str, dict[str, float]]:
    """part -> way -> seconds of one forward and backward pass, the least of a few."""
    found = library()
    assert found is not None
    ways = [TORCH, *(f"C++ with {product}" for product in found.products)]
    return {"attention": _time(_attention_pass, ways), "integrator": _time(_integrator_pass, ways)}


def _time(build: Callable[[str], Callable[[], Tensor]], ways: list[str]) -> dict[str, float]:
    passes = {way: build(way) for way in ways}
    seconds = {way: float("inf") for way in ways}
    with torch.enable_grad():
        for turn in range(_TURNS + 1):
            for way, run in passes.items():
                start = time.perf_counter()
                run().sum().backward()
                if turn:  # the first pass also makes kernels
                    seconds[way] = min(seconds[way], time.perf_counter() - start)
    return seconds


def _random(*shape: int) -> Tensor:
    """The global generator is neither read nor moved."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()


def _attention_pass(way: str) -> Callable[[], Tensor]:
    """4 x 256 tokens, 8 heads of 64, 2 key-value heads."""
    config = ModelConfig.model_validate({"d_model": 512, "num_heads": 8, "num_kv_heads": 2})
    attention, packed = build_attention(config, way), _random(4, 256, 768)
    cos, sin = _random(2, 256, 1, 32).detach()
    return lambda: attention(packed, (cos, sin), None, None)


def _integrator_pass(way: str) -> Callable[[], Tensor]:
    """1,024 tokens of D = 256, C = 64, T = 2."""
    config = ModelConfig.model_validate({"d_model": 256}).integrator
    assert config is not None
    dynamics = build_dynamics(config, way)
    x, v, candidate, hoisted = _random(1024, 256), _random(1024, 256), _random(1024, 256), _random(1024, 64)
    inner, outer = (_random(*shape).detach().mul(0.05).requires_grad_() for shape in ((64, 512), (768, 64)))
    drive = Drive(hoisted, inner, outer, _random(768), candidate, _random(256))
    forcing = _random(2, 256)
    return lambda: dynamics(drive, x, v, forcing).state
