"""Parameters by part, counted on the real modules on the meta device, so that they are always those of the model."""

from functools import lru_cache
from typing import Any

import torch

from inl_core.model import IntegratorLanguageModel
from inl_core.model.stream import stream_parameters
from inl_core.recipe import ModelConfig

_STREAM = "stream"
# The first matching prefix or part of a parameter's name decides where it is counted. What the stream's modules learn
# matches their row, whatever its name.
_PARTS = (
    ("embedding", ("embedding.",)),
    ("head", ("head.",)),
    ("attention", (".attention.",)),
    ("controller", ("controller.", ".modulation.", ".router.")),
    ("budget", ("budget.",)),
    ("mu", (".equilibrium.", ".mu")),
    ("excitation", (".excitation.",)),
    (_STREAM, ()),
    ("feed-forward", (".feed_forward.",)),
    ("norms and gains", ("norm", "_gain")),
)


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Parameters by part, in a fixed order; parts a model does not have are left out."""
    counts: dict[str, int] = {name: 0 for name, _ in _PARTS}
    of_stream = stream_parameters(model)
    for name, parameter in model.named_parameters():
        counts[part_of(name, parameter in of_stream)] += parameter.numel()
    return {part: count for part, count in counts.items() if count}


def part_of(name: str, is_of_stream: bool = False) -> str:
    """The part that a parameter is counted in; `is_of_stream`: it is one of `stream_parameters`."""
    own = _STREAM if is_of_stream else None
    part = next((part for part, marks in _PARTS if part == own or any(mark in name for mark in marks)), None)
    assert part is not None, f"parameter {name} belongs to no part"
    return part


def meta_model(config: ModelConfig) -> IntegratorLanguageModel:
    """The model on the meta device. It may be handed out again for the same configuration, so do not change it."""
    key: Any = config  # it is frozen and so has a hash, which pyright does not see
    return _built(key)


@lru_cache(maxsize=1)  # a plan asks for one model several times, and a deep one takes seconds
def _built(config: ModelConfig) -> IntegratorLanguageModel:
    with torch.device("meta"):
        return IntegratorLanguageModel(config)
