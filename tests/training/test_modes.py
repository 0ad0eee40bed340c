"""Recomputation, compilation, bfloat16 and Muon: the same training by other means."""

import pytest
import torch

from inl_core.analysis.planning.activations import saved_bytes
from inl_core.inference.evaluate import evaluate
from inl_core.kernels import compilation
from inl_core.model import IntegratorLanguageModel
from inl_core.training.execution import prepare_model
from inl_core.training.metrics import read_metrics
from inl_core.training.schedules import drawn_iterations

V4 = {"preset": "v4"}


def losses(make_recipe, make_trainer, name: str, preset: str = "v5", **training) -> list[float]:
    trainer, _ = make_trainer(make_recipe(training={"steps": 4, **training}, model={"preset": preset}), name)
    trainer.fit()
    return [row["loss"] for row in read_metrics(trainer.run.path) if "loss" in row]


@pytest.mark.parametrize("batch_tokens", [256, 512])
def test_bits_per_byte_of_a_step_are_what_an_evaluation_of_its_batch_gives(make_recipe, make_trainer, batch_tokens):
    trainer, listener = make_trainer(make_recipe(training={"steps": 1, "batch_tokens": batch_tokens}))
    batch, table = trainer.loader.batch(0), trainer.stepper.token_num_bytes
    assert (table[batch.targets[batch.targets != -100]] == 0).any()  # special tokens, which do not count
    wanted = evaluate(trainer.model, [batch], table)
    trainer.fit()
    row = next(row for row in listener.rows if row["step"] == 1)
    assert row["bits_per_byte"] == pytest.approx(wanted.bits_per_byte, rel=1e-5)
    assert row["loss"] == pytest.approx(wanted.loss, rel=1e-5)


@pytest.mark.parametrize(("preset", "part"), [("v4", "block"), ("v4", "integrator"), ("v5", "block")])
def test_recomputation_changes_nothing(make_recipe, make_trainer, preset, part):
    plain = losses(make_recipe, make_trainer, "plain", preset)
    assert losses(make_recipe, make_trainer, part, preset, recomputation=part) == pytest.approx(plain, rel=1e-5)


def test_recomputation_keeps_less_for_the_backward_pass(make_recipe, make_trainer):
    kept = {}
    for part in ("none", "integrator", "block"):
        experts = {"num_iterations": 4, "controller": {"experts": 2}}  # the one form that keeps its iterations
        recipe = make_recipe(training={"recomputation": part}, model=V4 | {"integrator": experts})
        trainer, _ = make_trainer(recipe, part)
        seen: dict[int, int] = {}

        def pack(tensor, seen=seen):
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = trainer.model(torch.randint(0, 400, (8, 32)))  # held, or freed memory would be counted once
        kept[part] = sum(seen.values())
        del output
    assert kept["integrator"] < 0.6 * kept["none"]
    assert kept["block"] < 0.6 * kept["integrator"]


def test_drawn_iterations_are_what_the_model_runs(make_recipe, make_trainer):
    recipe = make_recipe(training={"steps": 6, "min_iterations": 1, "logging": {"every": 1}}, model=V4)
    trainer, _ = make_trainer(recipe, "drawn")
    ran: list[tuple[int, ...]] = []
    original = trainer.model.forward

    def forward(*arguments, **options):
        output = original(*arguments, **options)
        if torch.is_grad_enabled():  # a training step, not an evaluation
            ran.append(tuple(layer.num_iterations for layer in output.layers))
        return output

    trainer.model.forward = forward
    trainer.fit()
    expected = [drawn_iterations(trainer.model.config.layer_iterations, 1, 0, step) for step in range(6)]
    assert ran == expected
    logged = [row["iterations"] for row in read_metrics(trainer.run.path) if "loss" in row]
    assert logged == [sum(iterations) / len(iterations) for iterations in expected]
    assert len(set(logged)) > 1


@pytest.mark.slow
@pytest.mark.filterwarnings("error::inl_core.errors.ExecutionWarning")
@pytest.mark.parametrize("preset", ["v4", "v5"])
def test_compiled_blocks_give_the_same_losses(make_recipe, make_trainer, preset):
    plain = losses(make_recipe, make_trainer, "plain", preset)
    assert losses(make_recipe, make_trainer, "compiled", preset, compile=True) == pytest.approx(plain, rel=1e-4)


@pytest.mark.slow
def test_a_compiled_block_keeps_less_than_the_compiler_would(make_recipe, monkeypatch):
    recipe = make_recipe(training={"compile": True}, model=V4)

    def kept() -> int:
        torch.compiler.reset()
        model = IntegratorLanguageModel(recipe.model.with_vocab_size(64))
        model.initialise(0)
        prepare_model(model, recipe.training, bf16=False)
        return sum(saved_bytes(model, lambda: model(torch.zeros(4, 64, dtype=torch.long))))

    ours = kept()
    monkeypatch.setattr(compilation, "_ACTIVATION_BUDGET", 1.0)  # torch's own
    assert ours < 0.95 * kept()


@pytest.mark.parametrize("preset", ["v1", "v2", "v3", "v4", "v5", "transformer"])
def test_bfloat16_stays_finite_and_near_float32(make_recipe, make_trainer, preset):
    curves = []
    for precision in ("fp32", "bf16"):
        recipe = make_recipe(training={"steps": 6, "precision": precision}, model={"preset": preset, "d_model": 64})
        trainer, _ = make_trainer(recipe, precision)
        trainer.fit()
        assert all(parameter.dtype == torch.float32 for parameter in trainer.model.parameters())
        curves.append([row["loss"] for row in read_metrics(trainer.run.path) if "loss" in row])
    assert curves[0] != curves[1]
    assert curves[1] == pytest.approx(curves[0], rel=0.02)


def test_muon_takes_the_matrices_of_the_blocks_and_says_so(make_recipe, make_trainer):
    trainer, _ = make_trainer(make_recipe(training={"optimizer": {"name": "muon"}}))
    muon, adamw = trainer.optimizers.parts
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    held = {names[parameter] for group in muon.param_groups for parameter in group["params"]}
    matrices = {name for name, parameter in trainer.model.named_parameters() if parameter.dim() == 2}
    assert held == {name for name in matrices if name.startswith("blocks.")}
    rest = {names[parameter] for group in adamw.param_groups for parameter in group["params"]}
    assert held | rest == set(names.values())
    assert [entry.optimizer for entry in trainer.optimizers.assignments] == ["muon", *["adamw"] * 3]
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.fit()
    assert all(not torch.equal(parameter, before[name]) for name, parameter in trainer.model.named_parameters())


@pytest.mark.parametrize("preset", ["v4", "v5"])
def test_places_and_scales_are_not_decayed(make_recipe, make_trainer, preset):
    trainer, _ = make_trainer(make_recipe(model={"preset": preset}))
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    decayed = {
        names[parameter]
        for group in trainer.optimizers.parts[0].param_groups
        if group["weight_decay"] > 0
        for parameter in group["params"]
    }
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    undecayed = ("equilibrium", "excitation", "modulation", "gain", "step_")
    assert not any(word in name for name in decayed for word in undecayed)
    assert ("controller.output.weight" if preset == "v4" else "blocks.0.attention.output.weight") in decayed


def test_a_cycle_moves_the_amplitude_and_it_is_saved_with_the_weights(make_recipe, make_trainer):
    from safetensors.torch import load_file

    cycle = {"preset": "aggressive", "num_cycles": 1, "warmup_epochs": 1}
    recipe = make_recipe(training={"steps": 6, "cycle": cycle}, model=V4)
    trainer, heard = make_trainer(recipe)
    trainer.fit()
    amplitudes = [row["A"] for row in heard.rows]
    phases = [row["phase"] for row in heard.rows]
    assert phases[0] == "warmup"
    assert phases[-1] == "exploration"
    assert amplitudes[0] == 0.0
    assert amplitudes[-1] == pytest.approx(0.08)
    weights = load_file(heard.saved[-1] / "model.safetensors")
    assert weights["excitation_amplitude"].item() == pytest.approx(0.08)


STREAM_FIGURES = {
    "A",
    "alpha_mean",
    "transport_mean",
    "state_rms",
    "force_momentum",
    "movement_transport",
    "iterations",
}


@pytest.mark.parametrize(
    ("model", "missing"),
    [
        ({"preset": "v5"}, {"iterations"}),
        ({"preset": "transformer", "transport": True}, {"A", "alpha_mean", "force_momentum", "iterations"}),
        ({"preset": "transformer"}, STREAM_FIGURES),
    ],
)
def test_the_dynamics_of_a_stream_are_in_the_metrics_and_recorded(make_recipe, make_trainer, model, missing):
    trainer, heard = make_trainer(make_recipe(training={"steps": 4}, model=model))
    trainer.fit()
    assert STREAM_FIGURES - set(heard.rows[-1]) == missing
    recorded = [path.name for path in sorted((trainer.run.path / "dynamics").glob("*"))]
    assert len(recorded) == (0 if missing == STREAM_FIGURES else 2)  # at steps 1 and 4


def test_experts_and_budgets_are_in_the_metrics_as_they_change(make_recipe, make_trainer):
    integrator = {"controller": {"experts": 4}, "budget": {"strategy": "hybrid"}, "num_iterations": 3}
    recipe = make_recipe(
        training={"steps": 6, "evaluation": {"every": 3, "tokens": 256}}, model=V4 | {"integrator": integrator}
    )
    trainer, heard = make_trainer(recipe)
    trainer.fit()
    budgets = [row["budget"] for row in heard.rows]
    assert all(sum(budget) == pytest.approx(6, rel=1e-5) for budget in budgets)
    assert budgets[0] != budgets[2]  # learned
    assert abs(budgets[3][0] - budgets[2][0]) > 3 * abs(budgets[2][0] - budgets[1][0])  # corrected after an evaluation
    loads = [row["expert_load"] for row in heard.rows]
    assert all(sum(layer) == pytest.approx(1) for row in loads for layer in row)
    assert loads[0] != loads[-1]
    assert all(row["loss_balance"] >= 0.9 for row in heard.rows)
    assert trainer.model.budget.correction.any()
