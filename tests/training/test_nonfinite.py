"""NaN and infinity that a finite gradient hides: in the weights, in the moments, in the validation loss."""

import math
from dataclasses import replace

import pytest
import torch

from inl_core.errors import ArtefactError, NonFiniteError
from inl_core.inference.artefacts import list_checkpoints, verify_checkpoint
from inl_core.inference.finite import first_nonfinite
from inl_core.training.checkpoint import newest_valid, save_checkpoint
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


def test_a_checkpoint_with_weights_that_are_not_finite_is_passed_over(make_recipe, make_trainer):
    trainer, _ = make_trainer(make_recipe())
    for step in (1, 2):
        trainer.state.step = step
        if step == 2:
            poison_weights(trainer)
        documents = trainer.run.documents(trainer.state)
        saved = save_checkpoint(trainer.run.checkpoints, trainer.state, trainer.model, trainer.optimizers, documents)
    with pytest.raises(ArtefactError, match=r"blocks.0.attention.output.weight holds NaN or infinity"):
        verify_checkpoint(saved)
    assert newest_valid(trainer.run.checkpoints, lambda text: None).name == "step-00000001"


def test_a_validation_loss_that_is_not_finite_stops_the_run(make_recipe, make_trainer):
    recipe = make_recipe(training={"evaluation": {"every": 2, "tokens": 512}, "checkpoint": {"every": 2}})
    trainer, _ = make_trainer(recipe)
    trainer.validation.score = lambda model, tokens: replace(SCORE, loss=math.nan, bits_per_byte=math.nan)
    with pytest.raises(NonFiniteError, match=r"step 2: validation loss nan.*goes on from .*step-00000002"):
        trainer.fit()
