"""The planned activation memory is compared with the storages that autograd keeps when a real model runs."""

from collections.abc import Iterator

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from inl_core.analysis.planning.activations import saved_activations
from inl_core.kernels import Choice, choose, put
from inl_core.model import IntegratorLanguageModel, Options
from inl_core.recipe import ModelConfig
from inl_core.training.execution import recompute

ROWS, LENGTH = 5, 64
KEYS = {"d_model": 64, "num_heads": 4, "vocab_size": 700, "max_seq_len": LENGTH}
PRESETS = ("v1", "v2", "v3", "v4", "v5", "transformer", "transport")
WITHOUT_INTEGRATOR = ("v5", "transformer", "transport")
TRANSPORT = {"preset": "transformer", "transport": True}


def choices(config: ModelConfig, operations: str, *, bf16: bool = False) -> dict[str, Choice]:
    return choose(config, torch.device("cpu"), operations=operations, bf16=bf16)


def config_of(preset: str, num_layers: int, **changes: object) -> ModelConfig:
    named = TRANSPORT if preset == "transport" else {"preset": preset}
    return ModelConfig.model_validate({**named, **KEYS, "num_layers": num_layers, **changes})


def real_bytes(
    config: ModelConfig,
    mode: str,
    operations: str = "plain",
    *,
    bf16: bool = False,
    documents: bool = False,
    energy_power: float | None = None,
) -> int:
    """Every storage that a real forward pass and its loss save, except the parameters."""
    model = IntegratorLanguageModel(config).train()
    model.initialise(0)
    put(model, choices(config, operations, bf16=bf16))
    recompute(model, mode)
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.zeros(ROWS, LENGTH, dtype=torch.long)
    extra = {"document_ids": ids, "positions": torch.arange(LENGTH).expand(ROWS, -1)} if documents else {}
    options = Options(energy_power=energy_power)
    with saved_tensors_hooks(save, lambda tensor: tensor), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = model(ids, options=options, **extra).hidden
        loss = model.loss_sum(hidden, ids)
    # The chunked loss keeps its two gradients as attributes of its node, where the hook does not see them.
    held = [value.nbytes for value in vars(loss.grad_fn).values() if isinstance(value, torch.Tensor)]
    assert len(held) == 2
    return sum(storage.nbytes() for storage in kept.values()) + sum(held)


def cases() -> Iterator[tuple[str, str, dict]]:
    for preset in PRESETS:
        for mode in ("none", "block") if preset in WITHOUT_INTEGRATOR else ("none", "block", "integrator"):
            yield preset, mode, {}
    yield "v1", "none", {"bf16": True}
    yield "v3", "none", {"bf16": True, "documents": True}
    yield "v4", "none", {"documents": True}
    yield "v4", "integrator", {"bf16": True, "documents": True}
    yield "v5", "none", {"documents": True}
    yield "v5", "none", {"bf16": True}
    yield "transport", "block", {"bf16": True, "documents": True}
    yield "v4", "none", {"energy_power": 2.0}
    yield "v3", "integrator", {"energy_power": 2.0}


@pytest.mark.parametrize("operations", ["auto", "plain"])
@pytest.mark.parametrize(("preset", "mode", "circumstances"), list(cases()))
def test_the_plan_is_what_autograd_keeps(preset: str, mode: str, circumstances: dict, operations: str) -> None:
    config = config_of(preset, 3)
    named = {"document_mask" if key == "documents" else key: value for key, value in circumstances.items()}
    named["operations"] = choices(config, operations, bf16=circumstances.get("bf16", False))
    planned = saved_activations(config, LENGTH, recomputation=mode, **named).bytes(ROWS)
    assert planned == pytest.approx(real_bytes(config, mode, operations, **circumstances), rel=0.02)


@pytest.mark.parametrize("preset", ["v2", "v4", *WITHOUT_INTEGRATOR])
def test_more_layers_and_iterations_are_extrapolated_exactly(preset: str) -> None:
    changes = {} if preset in WITHOUT_INTEGRATOR else {"integrator": {"num_iterations": 6}}
    config = config_of(preset, 5, **changes)
    for mode in ("none", "block"):
        planned = saved_activations(config, LENGTH, recomputation=mode)
        assert planned.bytes(ROWS) == pytest.approx(real_bytes(config, mode), rel=0.02)


@pytest.mark.parametrize(
    "integrator",
    [
        {"controller": {"experts": 4, "top_k": 2}},
        {"controller": {"experts": 4, "top_k": 1, "shared": False}, "num_iterations": 5},
        {"iterations_per_layer": [1, 4, 3]},
        {"budget": {"strategy": "learned"}},
        {"budget": {"strategy": "dynamic"}},
    ],
    ids=["experts", "own experts", "iterations per layer", "learned budget", "dynamic budget"],
)
def test_mixtures_and_budgets_are_planned_as_if_even(integrator: dict) -> None:
    keys = {"preset": "v4", "num_layers": 3, "integrator": integrator} | KEYS
    config = ModelConfig.model_validate(keys)
    for mode in ("none", "integrator"):
        planned = saved_activations(config, LENGTH, recomputation=mode).bytes(ROWS)
        assert planned == pytest.approx(real_bytes(config, mode), rel=0.03)


def test_what_does_not_grow_with_the_batch_is_the_heads_gradient_and_under_autocast_the_converted_weights() -> None:
    config = ModelConfig.model_validate({"preset": "transformer", "num_layers": 3} | KEYS)
    head = 4 * 700 * 64
    weights = 2 * sum(p.numel() for p in IntegratorLanguageModel(config).blocks.parameters() if p.dim() == 2)
    assert saved_activations(config, LENGTH).fixed == pytest.approx(head, rel=0.03)
    assert saved_activations(config, LENGTH, bf16=True).fixed > weights
