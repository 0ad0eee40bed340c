"""Which operations a model computes with: decided here, once, for each part of it, and put into it from outside.

    choices = apply(model, operations="auto", bf16=False)      # part -> Choice

- `auto` takes for each part what was measured to be the fastest on this machine (measuring.py); `plain` takes torch's
  own operations everywhere. A way that cannot run here is left out without an error, and its `Choice` says why.
- Two ways differ in their rounding, so the choices are written into `environment.json` and into each checkpoint.
- The parts that are replaced have no parameters: a state dict does not know of them.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import torch

from inl_core.kernels.loss import ChunkedLoss, OwnLoss, SharedLookup
from inl_core.kernels.stream import MotionInPlace
from inl_core.model import IntegratorLanguageModel
from inl_core.model.attention import InnerAttention, Visibility
from inl_core.model.block import Block
from inl_core.model.dynamics import Dynamics
from inl_core.model.embedding import Lookup
from inl_core.model.mixture import MixedDynamics
from inl_core.model.stream import Motion, Step, StreamBlock
from inl_core.recipe import IntegratorConfig, ModelConfig

Operations = Literal["auto", "plain"]
TORCH = "torch"
FLEX = "torch with flex_attention"
EVERY_TOKEN = "torch, every expert on every token"
OWN_LOSS = "inl's chunks"
NOTHING: Mapping[str, str] = {}


class Choice(NamedTuple):
    """How one part is computed, and why."""

    way: str
    """`torch`, `C++ with MKL` or `C++ with oneDNN` (the library whose matrix product it calls); of the loss
    `inl's chunks`, of the stream `torch in place`; on a GPU also FLEX for attention, EVERY_TOKEN for a mixture."""
    why: str


def apply(
    model: IntegratorLanguageModel,
    *,
    operations: Operations = "auto",
    bf16: bool = False,
    before: Mapping[str, str] = NOTHING,
) -> dict[str, Choice]:
    """Put the chosen operations into a model that has its weights; what was there before goes.

    Args:
        operations: the recipe's `training.operations`.
        bf16: the forward passes will run under bfloat16 autocast.
        before: part -> way, as the run was computed until now: it stays so unless another way is much faster here.
    """
    weight = model.embedding.table.weight
    is_low = bf16 or weight.dtype.itemsize < 4
    choices = choose(model.config, weight.device, operations=operations, bf16=is_low, before=before)
    put(model, choices)
    return choices


def choose(
    config: ModelConfig,
    device: torch.device,
    *,
    operations: Operations = "auto",
    bf16: bool = False,
    before: Mapping[str, str] = NOTHING,
) -> dict[str, Choice]:
    """The choice for each part of a model, without the model; the first call on a machine compiles and measures."""
    if operations not in get_args(Operations):
        raise ValueError(f"operations {operations!r}: must be one of {', '.join(get_args(Operations))}")
    reason = _why_only_torch(device, operations, bf16)
    names = ["attention", *(["integrator"] if config.integrator else [])]
    stream = _choose_motion(operations) if config.stream or config.transport else {}
    if device.type == "cuda" and operations == "auto":
        return _choose_on_gpu(config, names) | stream
    if reason:
        return {name: Choice(TORCH, reason) for name in (*names, "loss")} | stream
    from inl_core.kernels.measuring import fastest

    found = {name: fastest(name, config, before.get(name)) for name in names}
    if config.integrator and config.integrator.controller.experts > 1:
        found["integrator"] = Choice(TORCH, "the experts of a mixture are run one by one")
    return found | {"loss": Choice(OWN_LOSS, "less memory than torch's, which is as fast")} | stream


def put(model: IntegratorLanguageModel, choices: dict[str, Choice]) -> None:
    """Put what `choose` found into a model."""
    _put_loss(model, choices["loss"].way)
    _put_attention(model, choices["attention"].way)
    for integrator in model.integrators():
        integrator.dynamics = build_dynamics(integrator.config, choices["integrator"].way)
        if integrator.router is not None:
            integrator.router.takes_every_token = choices["integrator"].way == EVERY_TOKEN
    if "stream" in choices:
        _put_motion(model, choices["stream"].way)


def describe(choices: dict[str, Choice]) -> str:
    """One line for a plan: `attention by C++ with MKL (2.10 times as fast as torch, measured here); ...`."""
    by_choice: dict[str, list[str]] = {}
    for part, (way, why) in choices.items():
        by_choice.setdefault(f"{way} ({why})", []).append(part)
    return "; ".join(f"{', '.join(parts)} by {way}" for way, parts in by_choice.items())


def can_run(choices: dict[str, Choice]) -> bool:
    """Whether this process has the operations that another one chose."""
    from inl_core.kernels.cpu.library import library

    products = {_product(choice.way) for choice in choices.values() if choice.way.startswith("C++")}
    found = library() if products else None
    return not products or (found is not None and products <= set(found.products))


def _why_only_torch(device: torch.device, operations: Operations, bf16: bool) -> str:
    """Why no operation of our own can be used at all; empty where some can."""
    if operations == "plain":
        return "training.operations is plain"
    if bf16:
        return "those of our own are for single or double precision"
    if device.type != "cpu":
        return "those of our own are for CPUs"
    return ""


def _choose_on_gpu(config: ModelConfig, names: list[str]) -> dict[str, Choice]:
    """What replaces torch's own operations on a GPU, where nothing is written in C++."""
    from inl_core.kernels.documents import why_not_flex

    found = {name: Choice(TORCH, "those of our own are for CPUs") for name in names}
    found["loss"] = Choice(OWN_LOSS, "products in the precision of the pass, sums in float32")
    no_flex = why_not_flex(config.head_dim)
    found["attention"] = Choice(TORCH, no_flex) if no_flex else Choice(FLEX, "documents are told apart without a mask")
    if config.integrator and config.integrator.controller.experts > 1:
        found["integrator"] = Choice(EVERY_TOKEN, "nobody waits for the GPU to count an expert's tokens")
    return found


def _choose_motion(operations: Operations) -> dict[str, Choice]:
    """It runs wherever torch does, and does nothing but leave out passes over memory: nothing is to be measured."""
    if operations == "plain":
        return {"stream": Choice(TORCH, "training.operations is plain")}
    return {"stream": Choice("torch in place", "in half the passes over memory")}


def _put_loss(model: IntegratorLanguageModel, way: str) -> None:
    is_own = way != TORCH
    model.vocabulary_loss = OwnLoss() if is_own else ChunkedLoss()
    model.embedding.lookup = SharedLookup() if is_own and model.head is None else Lookup()


def _put_attention(model: IntegratorLanguageModel, way: str) -> None:
    model.visibility = Visibility()
    if way == FLEX:
        from inl_core.kernels.documents import DocumentBlocks

        model.visibility = DocumentBlocks()
    elif way != TORCH:
        from inl_core.kernels.attention import DocumentStarts

        model.visibility = DocumentStarts()
    for block in model.blocks:
        assert isinstance(block, Block | StreamBlock)
        block.attention.inner_attention = build_attention(model.config, way)


def _put_motion(model: IntegratorLanguageModel, way: str) -> None:
    for step in model.modules():
        if isinstance(step, Step):
            step.motion = Motion() if way == TORCH else MotionInPlace()


def build_attention(config: ModelConfig, way: str) -> InnerAttention:
    """The inner attention of one layer, the given way."""
    if way == TORCH:
        return InnerAttention(config)
    if way == FLEX:
        from inl_core.kernels.documents import FlexAttention

        return FlexAttention(config)
    # Imported here: a registered operation brings torch's compiler with it.
    from inl_core.kernels.attention import CppAttention

    return CppAttention(config, _product(way))


def build_dynamics(config: IntegratorConfig, way: str) -> Dynamics:
    """The dynamics of one layer, the given way."""
    if config.controller.experts > 1:
        return MixedDynamics(config)
    if way == TORCH:
        return Dynamics(config)
    from inl_core.kernels.integrator import CppDynamics

    return CppDynamics(config, _product(way))


def _product(way: str) -> str:
    """`C++ with MKL` -> `MKL`."""
    return way.rpartition(" ")[2]
