"""What a bad step leaves behind, how it is taken again, and what it is to skip one."""

import json
import math
from pathlib import Path

import pytest
import torch

from inl_core.analysis.replay import replay
from inl_core.errors import NonFiniteError
from inl_core.inference.checkpoint_files import list_checkpoints
from inl_core.training.metrics import read_metrics
from inl_core.training.nonfinite import FiniteWatch
from tests.training.conftest import before_each_step

RECORD = "reports/nonfinite-step-4-rank-0.json"


@torch.no_grad()
def overflow(trainer) -> None:
    """One weight is so large that the feed-forward of the second layer overflows."""
    trainer.model.blocks[1].feed_forward.down.weight[0] = 1e38


def fail_at_fourth(trainer, damage) -> None:
    before_each_step(trainer, lambda step, stop: damage(trainer) if step == 3 else None)


def test_the_record_and_its_replay_name_the_module_in_which_a_number_is_first_bad(make_recipe, make_trainer, inl):
    trainer, _ = make_trainer(make_recipe())
    fail_at_fourth(trainer, overflow)
    with pytest.raises(NonFiniteError, match=r"step 4: .*output of blocks\.1\.feed_forward\.down .*inl replay"):
        trainer.fit()
    path = trainer.run.path / RECORD
    record = json.loads(path.read_text())
    assert record["first_bad"]["name"] == "blocks.1.feed_forward.down"
    assert record["first_bad"]["inputs_are_finite"]
    assert [row["window"] for row in record["batch"]] == trainer.loader.windows_of(3).tolist()
    rows = {row["layer"]: row for row in record["layers"]}
    assert float(rows["blocks.0"]["weights"]) == pytest.approx(
        math.sqrt(sum(float(p.detach().square().sum()) for p in trainer.model.blocks[0].parameters()))
    )
    assert math.isfinite(float(rows["blocks.0"]["output"]))
    assert not math.isfinite(float(rows["blocks.1"]["output"]))
    done = inl("replay", path, "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["first_bad"] == record["first_bad"]
    assert told["is_bitwise_as_recorded"]
    assert not told["is_finite"]
    assert "output of blocks.1.feed_forward.down" in inl("replay", path).stdout


@pytest.mark.parametrize(
    "changes",
    [
        {"training": {"micro_batch_size": 2, "recomputation": "block"}},
        {"model": {"preset": "v4"}, "training": {"min_iterations": 1, "cycle": {"preset": "balanced"}}},
    ],
    ids=["v5 in parts", "v4 with a cycle and drawn iterations"],
)
def test_a_replay_is_the_step_bit_for_bit(make_recipe, make_trainer, changes):
    trainer, _ = make_trainer(make_recipe(**changes))
    losses = []

    def claim_it_is_bad(trainer):
        observe = trainer.stepper.watch.observe

        def observe_and_claim(step, loss, norm):
            observe(step, torch.full_like(loss, math.nan), norm)
            losses.append(loss.item())

        trainer.stepper.watch.observe = observe_and_claim

    fail_at_fourth(trainer, claim_it_is_bad)
    with pytest.raises(NonFiniteError, match="computed again, the step was finite"):
        trainer.fit()
    taken = replay(trainer.run.path / RECORD)
    assert taken.is_finite
    assert not taken.differing
    assert taken.found.losses["task"] == losses[0]
    trainer.model.zero_grad()  # and another batch, or other weights, are another step
    weights = trainer.run.path / "reports" / "nonfinite-step-4.safetensors"
    record = json.loads((trainer.run.path / RECORD).read_text())
    record["batch"].reverse()
    record["batch"][0]["tokens"][5] ^= 1
    (trainer.run.path / RECORD).write_text(json.dumps(record))
    assert replay(trainer.run.path / RECORD).differing
    assert weights.is_file()


@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "at the next log point"])
def test_a_gradient_that_is_bad_where_the_loss_is_not(make_recipe, make_trainer, deferred):
    trainer, _ = make_trainer(make_recipe(training={"logging": {"every": 10}}))
    if deferred:
        trainer.stepper.watch = FiniteWatch(trainer.optimizers, trainer.world.device, deferred=True)
    module = trainer.model.blocks[0].attention.output

    def spoil_gradients(trainer):
        module.register_full_backward_hook(lambda module, given, got: (given[0] * math.inf,))

    fail_at_fourth(trainer, spoil_gradients)
    with pytest.raises(NonFiniteError, match=r"step 4: loss \d.*gradient of output of blocks.0.attention"):
        trainer.fit()


def test_steps_are_skipped_up_to_a_bound_and_a_resumed_run_counts_on(make_recipe, make_trainer):
    """Steps 4 and 8 fail: each is passed over as if its batch were not there, and a third one would end the run."""

    def build(name, bad, **training):
        settings = {"checkpoint": {"every": 6}, "logging": {"every": 5}, "nonfinite": {"skip": 2}} | training
        trainer, heard = make_trainer(make_recipe(training=settings), name)
        observe = trainer.stepper.watch.observe
        trainer.stepper.watch.observe = lambda step, loss, norm: observe(
            step, torch.full_like(loss, math.nan) if step in bad else loss, norm
        )
        return trainer, heard

    whole, heard = build("whole", (3, 7))
    whole.fit()
    assert sum("skipped, 1 of the 2" in text for text in heard.messages) == 1
    assert sum("skipped, 2 of the 2" in text for text in heard.messages) == 1
    rows = {row["step"]: row for row in read_metrics(whole.run.path) if "learning_rate" in row}
    assert {step: row["skipped"] for step, row in rows.items() if "skipped" in row} == {
        4: "reports/nonfinite-step-4-rank-0.json",
        8: "reports/nonfinite-step-8-rank-0.json",
    }
    assert rows[4]["loss"] is None
    assert whole.state.tokens == sum(whole.loader.batch(step).num_targets for step in range(12) if step not in (3, 7))
    # A twin that never takes these two steps' updates, because it is told that their batches hold no target.
    twin, _ = build("twin", ())
    count = twin.stepper._count
    steps = iter(range(12))
    twin.stepper._count = lambda batch: (0.0, 0.0) if next(steps) in (3, 7) else count(batch)
    twin.fit()
    parts, _ = build("parts", (7,))
    parts.resume(list_checkpoints(whole.run.checkpoints)[0])
    assert (parts.state.step, parts.state.skipped) == (6, 1)
    parts.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, twin.model.state_dict()[name]), name
        assert torch.equal(value, parts.model.state_dict()[name]), name
    over, _ = build("over", (7, 8))
    over.resume(list_checkpoints(whole.run.checkpoints)[0])
    with pytest.raises(NonFiniteError, match="step 9"):
        over.fit()


def damaged(record: Path, change) -> Path:
    values = json.loads(record.read_text(encoding="utf-8"))
    change(values)
    path = record.with_name("nonfinite-step-4-rank-7.json")
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


DAMAGES = {
    "no rows": lambda record: record.update(batch=[]),
    "rows of two lengths": lambda record: record["batch"][0]["tokens"].pop(),
    "a token of another model": lambda record: record["batch"][0]["tokens"].__setitem__(0, 10**6),
    "another recipe": lambda record: record["recipe"]["model"].update(d_model=64),
    "a recipe of another version": lambda record: record["recipe"].update(unknown=1),
    "weights elsewhere": lambda record: record.update(weights="../../none.safetensors"),
    "no weights": lambda record: record.update(weights=None),
    "random numbers of another version": lambda record: record.update(rng={"cpu": [1, 2, 3]}),
}


def test_a_damaged_record_is_refused_in_one_line(make_recipe, make_trainer, inl):
    trainer, _ = make_trainer(make_recipe())
    fail_at_fourth(trainer, overflow)
    with pytest.raises(NonFiniteError):
        trainer.fit()
    for name, change in DAMAGES.items():
        done = inl("replay", damaged(trainer.run.path / RECORD, change), "--quiet")
        assert done.exit_code == 4, (name, done.stderr, done.exception)
        assert len(done.stderr.strip().splitlines()) == 1, name
