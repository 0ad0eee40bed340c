"""Batches and evaluations without a single target token, as long prompts make them."""

import json

import numpy as np
import pytest
import torch

from inl_core.corpus.dataset import TokenDataset, TokenStream
from inl_core.corpus.loader import BatchLoader
from inl_core.corpus.preparation import prepare
from inl_core.errors import ArtefactError
from inl_core.recipe import DataSettings
from inl_core.training.metrics import read_metrics
from tests.training.conftest import before_each_step


@pytest.fixture
def prompts(tmp_path):
    """Rows whose prompts are much longer than a window, their completions much shorter."""
    rows = [
        {"prompt": " ".join(f"word {row} line {line} reads" for line in range(60)), "completion": f"done {row}"}
        for row in range(40)
    ]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"sources": (str(source),), "tokenizer": {"vocab_size": 400}, "validation_fraction": 0.1}
    prepare(DataSettings.model_validate(values), tmp_path / "prompts")
    return tmp_path / "prompts"


def test_a_batch_without_a_target_updates_nothing_and_says_so(make_recipe, make_trainer, prompts):
    recipe = make_recipe(
        training={
            "steps": 12,
            "batch_tokens": 32,
            "evaluation": {"every": 3, "tokens": 32},
            "optimizer": {"weight_decay": 1.0},
        }
    )
    trainer, heard = make_trainer(recipe, data=prompts)
    before = {}

    def keep_weights(step, stop):
        before[step] = {name: value.clone() for name, value in trainer.model.state_dict().items()}

    before_each_step(trainer, keep_weights)
    trainer.fit()
    before[12] = trainer.model.state_dict()
    empty = [step for step in range(12) if not trainer.loader.batch(step).num_targets]
    assert 2 <= len(empty) < 12
    for step in range(12):
        same = all(torch.equal(value, before[step + 1][name]) for name, value in before[step].items())
        assert same == (step in empty), step
    rows = {row["step"]: row for row in read_metrics(trainer.run.path) if "learning_rate" in row}
    assert [step for step in rows if rows[step]["loss"] is None] == [step + 1 for step in empty]
    warnings = [text for text in heard.messages if "no target token" in text]
    assert warnings[0].startswith(f"step {empty[0] + 1}:")
    assert "training.sequence_length" in warnings[0]
    assert len(warnings) < 4


def test_an_evaluation_without_a_target_is_a_null_row_and_the_run_goes_on(make_recipe, make_trainer, prompts):
    recipe = make_recipe(training={"steps": 4, "evaluation": {"every": 2, "tokens": 8, "final_tokens": 8}})
    trainer, heard = make_trainer(recipe, data=prompts)
    assert trainer.fit() is None
    rows = [row for row in read_metrics(trainer.run.path) if "validation_loss" in row]
    assert [(row["step"], row["validation_loss"]) for row in rows] == [(2, None), (4, None)]
    assert sum("training.evaluation.tokens" in text for text in heard.messages) == 2
    assert not heard.evaluations


class Stream(TokenStream):
    """Two documents of 10 tokens."""

    split, directory = "train", "somewhere"

    def __init__(self, prompts):
        tokens = np.array([1, *range(10, 18), 2] * 2)
        super().__init__(
            [tokens], bos_id=1, eos_id=2, document_starts=np.array([0, 10]), prompt_lengths=np.array(prompts)
        )


@pytest.mark.parametrize(
    ("prompts", "targets"), [((10, 10), 0), ((10, 9), 0), ((9, 10), 1), ((0, 10), 9), ((10, 5), 4)]
)
def test_text_that_is_all_prompts_is_refused_before_the_first_step(prompts, targets):
    stream: TokenDataset = Stream(prompts)  # type: ignore[assignment]
    stream.document_mask = True
    arguments = {"sequence_length": 6, "batch_size": 3, "seed": 0}  # the windows end before the last token
    if not targets:
        with pytest.raises(ArtefactError, match="no target token"):
            BatchLoader(stream, **arguments)
    else:
        assert BatchLoader(stream, **arguments).batch(0).num_targets == targets
