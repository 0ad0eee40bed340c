"""A loss that jumps is warned of; one that is noisy, falls, or has jumped before is not."""

import random
import statistics

from inl_core.training.spikes import SpikeWatch


def heard(losses: list[float]) -> list[int]:
    """The indices that are warned of."""
    found: list[str] = []
    watch = SpikeWatch(found.append)
    for step, loss in enumerate(losses):
        watch.hear(step, loss)
    return [int(text.split(":")[0].removeprefix("step ")) for text in found]


def test_a_jump_is_warned_of_once_and_only_where_the_rule_says():
    noise = random.Random(0)
    calm = [4.0 + noise.gauss(0, 0.05) for _ in range(100)]
    assert heard(calm) == []
    assert heard([8 * 0.97**step + noise.gauss(0, 0.05) for step in range(200)]) == []
    mean, deviation = statistics.fmean(calm[40:60]), statistics.pstdev(calm[40:60])
    bound = mean + max(6 * deviation, mean / 20)
    assert heard([*calm[:60], bound + 1e-6, *calm[61:]]) == [60]
    assert heard([*calm[:60], bound - 1e-6, *calm[61:]]) == []
    assert heard([*calm[:60], 7.0, 7.1, 6.9, *calm[63:]]) == [60]
    assert heard([*calm[:60], *(loss + 3 for loss in calm[60:])]) == [60]
    assert heard([*calm[:60], 7.0, *calm[61:90], 7.0]) == [60, 90]
    assert heard([1e-9] * 50 + [1.04e-9, 1.06e-9]) == [51]
    assert heard([1.0, 100.0]) == []


def test_a_run_warns_of_a_spike(make_recipe, make_trainer):
    trainer, heard_by = make_trainer(make_recipe(training={"steps": 24, "logging": {"dynamics_every": 0}}))
    write = trainer.log.metrics.write
    trainer.log.metrics.write = lambda row: write(row | ({"loss": row["loss"] + 50} if row["step"] == 23 else {}))
    trainer.fit()
    (warning,) = [text for text in heard_by.messages if "the loss jumped" in text]
    assert warning.startswith("step 23:")
