"""NaN and infinity that a finite gradient hides: in the weights, in the moments, in the validation loss."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from inl_cli.app import app
from inl_core.errors import ArtefactError, NonFiniteError
from inl_core.inference.checkpoint_files import list_checkpoints, verify_checkpoint
from inl_core.inference.tensor_files import first_nonfinite
from inl_core.training.checkpoint import newest_valid
from inl_core.training.checkpoint_writing import save_weights
from tests.inference.tiny import save_checkpoint
from tests.training.test_retention import SCORE


def test_the_first_tensor_that_is_not_finite_is_named():
    good = {"steps": torch.arange(3), "empty": torch.zeros(0), "large": torch.full((9,), 1e38), "half": torch.ones(2)}
    assert first_nonfinite(good) is None
    assert first_nonfinite({}) is None
    for bad in (math.nan, math.inf, -math.inf):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert first_nonfinite({**good, "bad": torch.tensor([1.0, bad], dtype=dtype)}) == "bad"
    assert first_nonfinite({"up": torch.tensor(math.inf), "down": torch.tensor(-math.inf)}) == "up"


def poison_weights(trainer) -> None:
    with torch.no_grad():
        trainer.model.blocks[0].attention.output.weight[0, 0] = math.inf


def poison_moments(trainer) -> None:
    part = trainer.optimizers.parts[0]
    part.state[part.param_groups[0]["params"][0]]["exp_avg_sq"].view(-1)[0] = math.nan


@pytest.mark.parametrize("poison", [poison_weights, poison_moments])
@pytest.mark.parametrize("bad_step", [4, 6], ids=["at a checkpoint", "at the last step"])
def test_an_update_that_is_not_finite_is_not_saved(make_recipe, make_trainer, poison, bad_step):
    trainer, _ = make_trainer(make_recipe(training={"steps": 6, "checkpoint": {"every": 2}}))
    update = trainer.optimizers.step

    def step():
        update()
        if trainer.state.step == bad_step - 1:
            poison(trainer)

    trainer.optimizers.step = step
    with pytest.raises(NonFiniteError, match=f"step {bad_step}: .*step-0000000{bad_step - 2}$"):
        trainer.fit()
    assert list_checkpoints(trainer.run.checkpoints)[-1].name == f"step-0000000{bad_step - 2}"


def sealed(trainer, step: int) -> Path:
    """A checkpoint as it is, saved without a look at its numbers."""
    trainer.state.step = step
    documents = trainer.run.documents(trainer.state)
    return save_checkpoint(trainer.run.checkpoints, trainer.state, trainer.model, trainer.optimizers, documents)


def test_a_checkpoint_with_numbers_that_are_not_finite_is_passed_over(make_recipe, make_trainer):
    trainer, _ = make_trainer(make_recipe())
    sealed(trainer, 1)
    poison_moments(trainer)  # the moments are there since the first save
    verify_checkpoint(sealed(trainer, 2), purpose="evaluate")
    poison_weights(trainer)
    with pytest.raises(ArtefactError, match=r"blocks.0.attention.output.weight holds NaN or infinity"):
        verify_checkpoint(sealed(trainer, 3))
    skipped: list[str] = []
    assert newest_valid(trainer.run.checkpoints, skipped.append).name == "step-00000001"
    assert len(skipped) == 2


@pytest.mark.parametrize(
    "command", [["eval"], ["inspect-params"], ["generate", "--prompt", "a"], ["convergence-report"]]
)
def test_no_command_takes_weights_that_are_not_finite(make_recipe, make_trainer, command):
    trainer, _ = make_trainer(make_recipe())
    poison_weights(trainer)
    result = CliRunner().invoke(app, [*command, str(sealed(trainer, 3))])
    assert result.exit_code == 4
    assert len(result.stderr.splitlines()) == 1
    assert "blocks.0.attention.output.weight holds NaN or infinity" in result.stderr


def test_a_model_that_overflows_on_a_text_exits_with_3(make_recipe, make_trainer, tmp_path):
    trainer, _ = make_trainer(make_recipe())
    with torch.no_grad():
        trainer.model.embedding.table.weight.fill_(3e38)
    (tmp_path / "text.txt").write_text("some text")
    result = CliRunner().invoke(app, ["eval", str(sealed(trainer, 3)), "--text", str(tmp_path / "text.txt")])
    assert result.exit_code == 3
    assert "text.txt is nan" in result.stderr


def test_imported_weights_must_be_finite(make_recipe, make_trainer, tmp_path):
    trainer, _ = make_trainer(make_recipe())
    poison_weights(trainer)
    with pytest.raises(ArtefactError, match=r"not written, because blocks.0.attention.output.weight holds NaN"):
        save_weights(tmp_path / "imported", trainer.model, {})
    assert not (tmp_path / "imported").exists()


def test_a_validation_loss_that_is_not_finite_stops_the_run(make_recipe, make_trainer):
    recipe = make_recipe(training={"evaluation": {"every": 2, "tokens": 512}, "checkpoint": {"every": 2}})
    trainer, _ = make_trainer(recipe)
    trainer.validation.score = lambda *given: replace(SCORE, loss=math.nan, bits_per_byte=math.nan)
    with pytest.raises(NonFiniteError, match=r"step 2: validation loss nan.*goes on from .*step-00000002"):
        trainer.fit()
