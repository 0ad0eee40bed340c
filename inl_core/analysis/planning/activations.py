"""Memory that autograd keeps between the forward and the backward pass, found by running the real forward pass.

- The model runs on fake tensors, which have shapes and types but no values, as on the meta device; but they follow a
  CPU's kernels and autocast. A hook sees whatever autograd saves. Each storage counts once, parameters do not count.
  A formula instead would have to be kept true to every switch of the model by hand.
- The chunked loss computes its gradients in the forward pass and keeps them where no hook sees them; they are added.
- From the second on, all blocks keep the same, and so do all iterations. Two and three of each are run, and the rest is
  extrapolated, which is exact. Many experts are extrapolated from few in the same way: together they keep k copies of
  each token, however many they are.
- Where layers differ in their iterations, or a budget divides them, each layer gets the mean: what is kept depends on
  their sum alone. Experts get equal shares of the tokens, for the same reason.
- The number of rows is a large prime number. A storage whose size it divides grows with the batch; others do not.
- Kernels of a GPU save the same tensors; its autocast keeps a few operations in float32 that a CPU's does not, and
  without autocast it keeps the outputs of norms too, D or 2 D numbers a token and block.
  `training.compile` saves less than counted here.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from inl_core.kernels import Choice, choose, put
from inl_core.kernels.loss import ChunkedLoss
from inl_core.model import IntegratorLanguageModel, Options
from inl_core.model.budget import Budget, LayerBudget
from inl_core.model.mixture import Router, Routing, Share
from inl_core.recipe import ModelConfig
from inl_core.training.execution import recompute

Recomputation = Literal["none", "block", "integrator"]
RECOMPUTATIONS: tuple[Recomputation, ...] = ("none", "integrator", "block")

_ROWS = 10_007  # prime, and no dimension of a model
_FEW_EXPERTS = 4


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd keeps: some for every row (window) of the micro-batch, some for a batch of any size."""

    per_row: float
    fixed: float
    """The copies of the weights that autocast makes, and the gradient of the head's weight."""

    def __sub__(self, other: "Saved") -> "Saved":
        return Saved(self.per_row - other.per_row, self.fixed - other.fixed)

    def plus(self, other: "Saved", times: float) -> "Saved":
        """self + times * other."""
        return Saved(self.per_row + times * other.per_row, self.fixed + times * other.fixed)

    def bytes(self, rows: int) -> int:
        """For a micro-batch of `rows` windows."""
        return round(self.per_row * rows + self.fixed)


def saved_activations(
    config: ModelConfig,
    length: int,
    *,
    recomputation: Recomputation = "none",
    bf16: bool = False,
    document_mask: bool = False,
    energy_power: float | None = None,
    operations: dict[str, Choice] | None = None,
) -> Saved:
    """What autograd saves in one forward pass over windows of `length`, loss included.

    Args:
        bf16: under bfloat16 autocast.
        document_mask: attention is kept inside documents, by a mask (B, 1, S, S).
        energy_power: p, when the speed and energy losses are on.
        operations: how each part is computed, as `inl_core.kernels.choose` says it; None is by torch's own operations.
    """

    choices = operations or choose(config, torch.device("cpu"), operations="plain")

    def at(layers: int, iterations: int) -> Saved:
        smaller = _reduced(config, layers, iterations)
        return _trace(smaller, length, recomputation, bf16, document_mask, Options(energy_power=energy_power), choices)

    def over_layers(iterations: int) -> Saved:
        if config.num_layers <= 3:
            return at(config.num_layers, iterations)
        two, three = at(2, iterations), at(3, iterations)
        return two.plus(three - two, config.num_layers - 2)

    fewer = _fewer_experts(config)
    if fewer:
        given = {"recomputation": recomputation, "bf16": bf16, "document_mask": document_mask, "operations": choices}
        some, more = (saved_activations(model, length, **given, energy_power=energy_power) for model in fewer)
        experts, (first, second) = _num_experts(config), map(_num_experts, fewer)
        return some.plus(more - some, (experts - first) / (second - first))
    mean = config.mean_iterations
    if mean in (0, 1, 2, 3):
        return over_layers(int(mean))
    two, three = over_layers(2), over_layers(3)
    return two.plus(three - two, mean - 2)


def saved_bytes(model: nn.Module, forward: Callable[[], None]) -> list[int]:
    """Sizes of the storages that autograd saves while `forward()` runs, each once, without those of the parameters."""
    sizes: dict[int, int] = {}
    # Storages are kept alive, so that no later one gets the address of an earlier one.
    alive = [parameter.untyped_storage() for parameter in model.parameters()]
    own = {storage._cdata for storage in alive}

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in sizes:
            alive.append(storage)
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        forward()
    return list(sizes.values())


def _reduced(config: ModelConfig, layers: int, iterations: int) -> ModelConfig:
    """The model with fewer layers, and the same number of iterations in each."""
    each = {"num_iterations": iterations, "iterations_per_layer": None}
    integrator = config.integrator and config.integrator.model_copy(update=each)
    return config.model_copy(update={"num_layers": layers, "integrator": integrator})


def _num_experts(config: ModelConfig) -> int:
    return config.integrator.controller.experts if config.integrator else 1


def _fewer_experts(config: ModelConfig) -> tuple[ModelConfig, ModelConfig] | None:
    """The model with few and with twice as many experts, from which many are extrapolated; None where there are few."""
    integrator = config.integrator
    first = max(_FEW_EXPERTS, integrator.controller.top_k) if integrator else 0
    if integrator is None or integrator.controller.experts <= 2 * first:
        return None

    def with_experts(experts: int) -> ModelConfig:
        controller = integrator.controller.model_copy(update={"experts": experts})
        return config.model_copy(update={"integrator": integrator.model_copy(update={"controller": controller})})

    return with_experts(first), with_experts(2 * first)


def _trace(
    config: ModelConfig,
    length: int,
    mode: Recomputation,
    bf16: bool,
    document_mask: bool,
    options: Options,
    choices: dict[str, Choice],
) -> Saved:
    with FakeTensorMode():
        model = IntegratorLanguageModel(config).train()
        put(model, choices)
        _look_at_no_values(model)
        recompute(model, mode)
        ids = torch.zeros(_ROWS, length, dtype=torch.long)
        documents = {"document_ids": ids, "positions": ids} if document_mask else {}
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        gradients: list[int] = []

        def forward() -> None:
            with autocast:
                output = model(ids, options=options, **documents)
            with autocast:
                model.loss_sum(output.hidden, ids, output.table)
                with torch.no_grad():
                    z, weight = model.head_factors(output.hidden)
            gradients.extend(tensor.numel() * z.element_size() for tensor in (z, weight))

        sizes = saved_bytes(model, forward) + gradients
    per_row = sum(size for size in sizes if size % _ROWS == 0)
    return Saved(per_row / _ROWS, sum(sizes) - per_row)


def _look_at_no_values(model: IntegratorLanguageModel) -> None:
    """Replace the parts that look at values of tensors, which fake tensors do not have."""
    integrator = model.config.integrator
    if integrator is not None and model.budget is not None:
        model.budget = _EvenBudget(integrator.budget, model.config.num_layers, integrator.num_iterations)
    for layer in model.integrators():
        if layer.router is not None:
            layer.router = _EvenRouter(layer.config, model.config.d_model)
    assert isinstance(model.vocabulary_loss, ChunkedLoss)
    # What is kept is the same in one chunk, and tracing costs as much for a chunk of few rows.
    model.vocabulary_loss.most_rows = sys.maxsize


class _EvenBudget(Budget):
    """A budget that gives every layer T iterations."""

    def forward(self) -> list[LayerBudget]:
        """The last iteration counts by a fraction, which has a gradient where the real budget's has one."""
        count = self.num_iterations
        if self.strategy == "dynamic":
            return [LayerBudget(count, None)] * (self.total // count)
        return [LayerBudget(count, share - (count - 1)) for share in self.shares()]


class _EvenRouter(Router):
    """A router that gives every expert the same number of tokens; all together, k for each token."""

    def shares(self, routing: Routing) -> list[Share]:
        """Token 0 again and again: which tokens an expert has makes no difference to the memory."""
        weights = routing.weights.flatten(0, -2)  # (N, E)
        num_experts = weights.shape[1]
        per_row = weights.shape[0] // _ROWS * self.top_k / num_experts
        rows = torch.zeros(_ROWS * max(1, round(per_row)), dtype=torch.long)
        return [Share(rows, weights[rows, expert, None]) for expert in range(num_experts)]
