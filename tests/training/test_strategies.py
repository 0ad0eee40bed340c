"""Whatever divides a model among processes, its run is the single process's."""

import shutil
from copy import deepcopy

import pytest
import torch

from inl_core.errors import ArtefactError
from inl_core.inference.checkpoint_files import list_checkpoints, verify_checkpoint
from inl_core.inference.loading import find_checkpoint, load_model
from inl_core.inference.tensor_sets import read_entries, read_tensors
from inl_core.recipe.load import dump_recipe
from inl_core.training.distributed import ALONE
from inl_core.training.metrics import read_metrics
from tests.damage import flip_a_bit
from tests.training.strategy_rank import train
from tests.training.test_distributed import NAMES, run_torchrun

# Neither 30, nor 400 + special tokens, nor a third of a width divides by four: every matrix is divided unevenly.
V5 = {"preset": "v5", "d_model": 30, "num_heads": 3}
V4 = {"preset": "v4", "integrator": {"mu": {"adaptation_rate": 0.01}}}
EXPERTS = {
    "preset": "v4",
    "integrator": {"num_iterations": 3, "controller": {"experts": 3}, "budget": {"strategy": "hybrid"}},
}
TRAINING = {
    "micro_batch_size": 1,
    "gradient_clip": 0.5,
    "evaluation": {"every": 6, "tokens": 1024},
    "checkpoint": {"every": 5},
    "logging": {"every": 1, "dynamics_every": 6},
}
LOSSES = {"losses": {"lambda_mean": 0.5, "lambda_speed": 0.1, "lambda_energy": 0.1}}


@pytest.fixture
def runs(make_recipe, tmp_path):
    """runs(ranks, {name: changes of the recipe}) -> {name: directory of its finished run}."""

    def make(num_ranks, recipes):
        paths = [tmp_path / f"{name}.yaml" for name in recipes]
        for path, changes in zip(paths, recipes.values(), strict=True):
            path.write_text(dump_recipe(make_recipe(**changes)), encoding="utf-8")
        if num_ranks == 1:
            for path in paths:
                train(path, ALONE)
        else:
            outcome = run_torchrun(num_ranks, ["-m", "tests.training.strategy_rank", *map(str, paths)], tmp_path)
            assert outcome.returncode == 0, outcome.stderr
        return {name: tmp_path / name for name in recipes}

    return make


def assert_alike(run, other, tolerance=1e-5):
    """The same rows of metrics up to `tolerance`, and the same names and shapes in the last checkpoint."""
    rows, others = read_metrics(run), read_metrics(other)
    assert [row["step"] for row in rows] == [row["step"] for row in others]
    for row, found in zip(rows, others, strict=True):
        for name in set(NAMES) & row.keys():
            assert found[name] == pytest.approx(row[name], rel=tolerance), (row["step"], name)
    (weights, shapes), (other_weights, other_shapes) = map(_last_weights, (run, other))
    assert shapes == other_shapes
    for name, tensor in weights.items():
        torch.testing.assert_close(other_weights[name], tensor, rtol=0, atol=2e-3, msg=name)


def _last_weights(run):
    checkpoint = list_checkpoints(run / "checkpoints")[-1]
    verify_checkpoint(checkpoint, purpose="resume")
    tensors = {name: torch.full(entry.shape, torch.nan) for name, entry in read_entries(checkpoint).items()}
    read_tensors(checkpoint, tensors)
    return tensors, {name: tensor.shape for name, tensor in tensors.items()}


def strategies(model, num_steps, **training):
    """A recipe for each strategy of four ranks, and one of a single process."""
    kinds = {"ddp": {}, "fsdp": {}, "hsdp": {"shard_size": 2}}
    common = TRAINING | training | {"steps": num_steps}
    recipes = {
        kind: {"model": model, "training": common | {"distributed": {"strategy": kind, **more}}}
        for kind, more in kinds.items()
    }
    return {"one": {"model": model, "training": common}}, recipes


def test_a_model_divided_between_two_ranks_gives_the_run_of_one_process(runs):
    one, several = strategies(V5, 12)
    [alone], [divided] = runs(1, one).values(), runs(2, {"fsdp": several["fsdp"]}).values()
    assert_alike(alone, divided)
    # Each rank wrote its part, nobody needs a process group or a pickle to read them, and none of them may be missing.
    checkpoint = list_checkpoints(divided / "checkpoints")[-1]
    parts = sorted(checkpoint.rglob("shard-*.safetensors"))
    assert len(parts) == 4
    assert {path.suffix for path in checkpoint.rglob("*.*")} == {".json", ".yaml", ".safetensors"}
    weights = load_model(find_checkpoint(divided)).model.state_dict()
    for name, tensor in _last_weights(alone)[0].items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-3, msg=name)
    flip_a_bit(parts[0])
    with pytest.raises(ArtefactError, match="checksum is wrong"):
        verify_checkpoint(checkpoint, purpose="evaluate")
    parts[0].unlink()
    with pytest.raises(ArtefactError, match="missing"):
        verify_checkpoint(checkpoint, purpose="evaluate")
    with pytest.raises(ArtefactError, match=r"a part of \S+ is missing|does not fit"):
        load_model(checkpoint)


STOPS_EARLY = {"preset": "v4", "integrator": {"early_stopping": {"convergence_threshold": 0.2}}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_ranks", "model", "training", "tolerance"),
    [
        (2, V5, {}, 1e-5),
        (4, V5, {}, 1e-5),
        (2, STOPS_EARLY, {}, 1e-5),
        (4, V4, LOSSES, 1e-5),
        (4, EXPERTS, {}, 1e-4),
    ],
    ids=[
        "v5 on two",
        "v5 on four",
        "early stopping on two",
        "v4 with every loss and a moving mu",
        "experts and budgets",
    ],
)
def test_several_ranks_give_the_run_of_one_process(runs, num_ranks, model, training, tolerance):
    one, several = strategies(model, 50, **training)
    [alone] = runs(1, one).values()
    for other in runs(num_ranks, several).values():
        assert_alike(alone, other, tolerance)


@pytest.mark.parametrize("mode", ["block", "integrator"])
def test_a_deep_copy_recomputes_with_its_own_weights(make_recipe, make_trainer, mode):
    model = make_trainer(make_recipe(model=V4, training={"recomputation": mode}))[0].model
    own = deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    ids = torch.arange(8).view(1, 8)
    own.loss_sum(own(ids).hidden, ids).backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert own.blocks[0].attention.output.weight.grad.abs().sum() > 0


CONSTANT = {"schedule": {"name": "constant", "warmup_fraction": 0.0}}


def _half(recipe):
    return recipe | {"training": recipe["training"] | {"steps": 6}}


@pytest.mark.slow
def test_a_run_goes_on_on_any_number_of_processes_by_any_strategy(runs, tmp_path):
    one, several = strategies(V5, 12, **CONSTANT)
    recipes = several | one
    straight = runs(1, one)["one"]
    begun = runs(1, {"whole": _half(one["one"])}) | runs(2, {"halves": _half(several["fsdp"])})
    begun |= runs(4, {"pairs": _half(several["hsdp"])})
    for num_ranks, kinds in {1: ["one"], 2: ["ddp", "fsdp"], 4: ["fsdp", "hsdp"]}.items():
        names = {f"{origin}-{kind}-{num_ranks}": (origin, kind) for origin in begun for kind in kinds}
        for name, (origin, _) in names.items():
            shutil.copytree(begun[origin], tmp_path / name)
        for run in runs(num_ranks, {name: recipes[kind] for name, (_, kind) in names.items()}).values():
            rows, expected = (
                {row["step"]: row["loss"] for row in read_metrics(path) if "loss" in row} for path in (run, straight)
            )
            assert rows == pytest.approx(expected, rel=1e-5), run


@pytest.mark.slow
def test_a_divided_run_that_was_resumed_is_the_one_that_was_not_bit_for_bit(runs):
    recipe = strategies(V5, 12, **CONSTANT)[1]["fsdp"]
    straight = runs(2, {"straight": recipe})["straight"]
    # Each rank reads half of the files, so either may be the one that finds the newest checkpoint damaged.
    damaged = {"whole": [], "first": ["training_state/shard-00001-*"], "second": ["training_state/shard-00002-*"]}
    for name, run in runs(2, dict.fromkeys(damaged, _half(recipe))).items():
        newest = list_checkpoints(run / "checkpoints")[-1]
        for [file] in (list(newest.glob(pattern)) for pattern in damaged[name]):
            flip_a_bit(file)
    for resumed in runs(2, dict.fromkeys(damaged, recipe)).values():
        _assert_same_bits(straight, resumed)


def _assert_same_bits(run, resumed):
    last, other = (list_checkpoints(path / "checkpoints")[-1] for path in (run, resumed))
    for directory in ("", "training_state"):
        found, expected = ({}, {})
        for tensors, place in ((found, other / directory), (expected, last / directory)):
            tensors |= {name: torch.empty(entry.shape) for name, entry in read_entries(place).items()}
            read_tensors(place, tensors)
        assert found.keys() == expected.keys()
        assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.mark.slow
def test_a_full_disk_of_one_rank_costs_every_rank_that_checkpoint_alone(runs, monkeypatch):
    monkeypatch.setenv("FULL_RANK", "1")
    run = runs(2, {"fsdp": strategies(V5, 12)[1]["fsdp"]})["fsdp"]
    assert "step-00000005" not in {path.name for path in (run / "checkpoints").iterdir()}
    saved = list_checkpoints(run / "checkpoints")
    assert [path.name for path in saved][-2:] == ["step-00000010", "step-00000012"]
    for path in saved:
        verify_checkpoint(path, purpose="resume")
