"""The plan against the real model: its tensors, the operations torch counts, the optimizers that are built.

FLOPs are those of the plain loop: torch's counter does not see products that add in place, as the backends' do.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from inl_core.analysis.planning import (
    count_parameters,
    flops_by_part,
    meta_model,
    plan_recipe,
    training_flops,
)
from inl_core.analysis.planning.activations import recompute
from inl_core.analysis.planning.memory import cache_bytes, memory_table, stream_bytes, trace_modes
from inl_core.analysis.planning.optimisations import compare_optimisations
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import ModelConfig, OptimizerSettings
from inl_core.recipe.load import recipe_from_mapping
from inl_core.training.optimizers import build_optimizers, count_states
from tests.inference.tiny import config, recipe

PRESETS = ("v1", "v2", "v3", "v4", "v5", "transformer", "transport")
TRANSPORT = {"preset": "transformer", "transport": True}
LENGTH = 48


def model_of(preset: str, **changes) -> IntegratorLanguageModel:
    keys = {"d_model": 64, "num_layers": 3, "num_heads": 4, "vocab_size": 300, "max_seq_len": 64}
    named = TRANSPORT if preset == "transport" else {"preset": preset}
    model = IntegratorLanguageModel(ModelConfig.model_validate(named | keys | changes))
    model.initialise(0)
    return model


def counted(counter: FlopCounterMode) -> dict[str, int]:
    """FLOPs of the matrix products and of attention, which torch counts as if every token saw the whole window."""
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for name, count in counts.items() if "attention" in str(name))
    return {"products": sum(counts.values()) - attention, "attention": attention}


@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_by_part_are_all_parameters(preset: str) -> None:
    model = model_of(preset)
    counts = count_parameters(meta_model(model.config))
    assert sum(counts.values()) == sum(parameter.numel() for parameter in model.parameters())
    assert ("mu" in counts) == preset.startswith("v")
    assert ("stream" in counts) == (preset in ("v5", "transport"))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("changes", [{}, {"tie_head": False}], ids=["tied", "untied"])
def test_forward_flops_are_those_torch_counts(preset: str, changes: dict) -> None:
    model = model_of(preset, **changes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.zeros(1, LENGTH, dtype=torch.long)).hidden)
    parts = flops_by_part(model.config, LENGTH)
    scores = parts.pop("attention scores")
    assert sum(parts.values()) * LENGTH == counted(counter)["products"]
    assert scores == 2 * 3 * 64 * sum(range(2, 2 * LENGTH + 1, 2)) // LENGTH  # 2 products, L, D, i + 1 keys for query i


@pytest.mark.parametrize("iterations", [1, 4])
@pytest.mark.parametrize("preset", ["v2", "v4"])
def test_flops_at_other_iterations_are_those_torch_counts(preset: str, iterations: int) -> None:
    model = model_of(preset, integrator={"num_iterations": iterations})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.logits(model(torch.zeros(1, LENGTH, dtype=torch.long)).hidden)
    parts = flops_by_part(model_of(preset).config, LENGTH, iterations=iterations)
    assert (sum(parts.values()) - parts["attention scores"]) * LENGTH == counted(counter)["products"]


@pytest.mark.parametrize("mode", ["none", "block"])
@pytest.mark.parametrize("preset", PRESETS)
def test_training_flops_are_those_torch_counts_forward_and_backward(preset: str, mode: str) -> None:
    model, ids = model_of(preset).train(), torch.zeros(2, LENGTH, dtype=torch.long)
    recompute(model, mode)
    with FlopCounterMode(display=False) as counter:
        hidden = model(ids).hidden
        torch.nn.functional.cross_entropy(model.logits(hidden).flatten(0, 1), ids.flatten()).backward()
    passes = 4 if mode == "block" else 3
    scores = flops_by_part(model.config, LENGTH)["attention scores"]
    ours = training_flops(model.config, LENGTH, recomputation=mode) - passes * scores
    assert counted(counter)["products"] / ids.numel() == pytest.approx(ours, rel=1e-3)


def test_without_an_integrator_iterations_cost_nothing() -> None:
    model = model_of("transformer")
    assert flops_by_part(model.config, LENGTH, iterations=8) == flops_by_part(model.config, LENGTH)


def test_states_are_those_of_the_optimizers_that_training_builds() -> None:
    for name in ("adamw", "muon"):
        model, settings = model_of("v4"), OptimizerSettings.model_validate({"name": name})
        optimizers = build_optimizers(model, settings, torch.device("cpu"))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizers.step()
        states = [tensor for part in optimizers.parts for state in part.state.values() for tensor in state.values()]
        moments = sum(tensor.nbytes for tensor in states if isinstance(tensor, torch.Tensor) and tensor.dim())
        counted_states = count_states(meta_model(model.config), settings)
        assert counted_states.optimizer == moments
        assert counted_states.weights == counted_states.gradients == sum(p.nbytes for p in model.parameters())
        if name == "adamw":
            assert counted_states.checkpoint == sum(4 * 3 * weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_streams_group_is_what_its_modules_learn_whatever_others_are_called(preset: str) -> None:
    model = model_of(preset)
    model.blocks[0].step_size = torch.nn.Parameter(torch.zeros(3))
    optimizers = build_optimizers(model, OptimizerSettings(), torch.device("cpu"))
    groups = {group["label"]: group["param_names"] for part in optimizers.parts for group in part.param_groups}
    names = [name for name, _ in model.named_parameters()]
    wanted = [name for name in names if "step_attention." in name or "step_feed_forward." in name or "entry." in name]
    assert groups.get("vectors of the steps", []) == wanted
    assert (preset in ("v5", "transport")) == bool(wanted)


@pytest.mark.parametrize("preset", ["v1", "v3", "v5", "transport"])
def test_the_cache_has_the_size_of_the_real_one(preset: str) -> None:
    model = model_of(preset)
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        cache = model.new_cache(1, 10, dtype)
        assert 10 * cache_bytes(model.config, size) == sum(part.nbytes for part in (*cache.keys, *cache.values))
        assert stream_bytes(model.config) == sum(part.nbytes for part in cache.previous or [])


def test_sharding_divides_the_state_and_recomputation_the_activations() -> None:
    settings = {"steps": 1, "sequence_length": 64, "batch_tokens": 512, "micro_batch_size": 8}
    model = {"preset": "v4", "size": "small", "vocab_size": 300}
    planned = recipe_from_mapping({"name": "a", "model": model, "training": settings})
    saved = trace_modes(planned, planned.model, bf16=False)
    table = {(row.recomputation, row.sharding): row for row in memory_table(planned, planned.model, saved, bf16=False)}
    whole = table["none", 1]
    assert whole.total == whole.states + saved["none"].bytes(8)
    assert table["none", 4].states == whole.states // 4
    assert table["block", 1].activations < table["integrator", 1].activations <= whole.activations
    # While a block is recomputed, the activations of this one of the six are in memory again.
    back = (whole.activations - table["block", 1].activations) / 6
    assert table["block", 1].working == pytest.approx(back, rel=1e-6)
    assert [table["block", degree].rows for degree in (1, 8)] == [8, 8]


def test_a_device_without_a_micro_batch_takes_its_share() -> None:
    settings = {"steps": 1, "sequence_length": 64, "batch_tokens": 512}
    planned = recipe_from_mapping({"name": "a", "model": {"vocab_size": 300}, "training": settings})
    saved = trace_modes(planned, planned.model, bf16=False, modes=("none",))
    rows = {row.sharding: row.rows for row in memory_table(planned, planned.model, saved, bf16=False)}
    assert (rows[1], rows[2], rows[8], rows[32]) == (8, 4, 1, 1)


@pytest.mark.parametrize("preset", PRESETS)
def test_each_optimisation_is_counted_on_models_that_differ_in_it_alone(preset: str) -> None:
    model = model_of(preset, d_model=128, vocab_size=3000)
    rows = {row.part: row for row in compare_optimisations(model.config)}
    saving = {"v5": {"excitation"}, "transformer": set(), "transport": set()}
    assert set(rows) - {"embedding", "all parameters"} == saving.get(preset, {"controller", "mu", "excitation"})
    assert all(row.optimised < row.full and row.full >= row.here >= row.optimised for row in rows.values())
    parts = [row for part, row in rows.items() if part != "all parameters"]
    saved = sum(row.full - row.optimised for row in parts)
    assert rows["all parameters"].full - rows["all parameters"].optimised == saved


def test_a_width_that_no_group_divides_keeps_its_mu() -> None:
    rows = compare_optimisations(ModelConfig(preset="v4", d_model=96, num_heads=4, vocab_size=300))
    mu = next(row for row in rows if row.part == "mu")
    assert mu.full == mu.optimised == 4 * 96


def test_a_plan_adds_up() -> None:
    plan = plan_recipe(recipe("v4"), vocab_size=300, num_windows=100)
    assert plan.total_parameters == sum(plan.parameters.values())
    assert plan.train_tokens == 640
    assert plan.epochs == pytest.approx(0.2)
    assert plan.flops_per_token == training_flops(config("v4").with_vocab_size(300), 32)
    assert plan.checkpoint_bytes < plan.disk_bytes
