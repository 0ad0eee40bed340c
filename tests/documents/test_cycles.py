"""The cycle scheduler against the documents' phase tables."""

import pytest

from inl_core import create_cycle_scheduler

# preset: warm-up, cycles, (lambda_mean, A, epochs) of equilibrium and of exploration (docs/model.md, "Cycles")
TABLE = {
    "conservative": (20, 4, (0.8, 0.0, 15), (0.1, 0.02, 15)),
    "balanced": (10, 5, (0.5, 0.0, 10), (0.05, 0.05, 20)),
    "aggressive": (5, 6, (0.3, 0.0, 5), (0.01, 0.08, 25)),
}


def expected_epochs(warmup, cycles, equilibrium, exploration):
    """(phase, lambda_mean, A, lambda_energy, cycle) of every epoch, written out."""
    rows = [("warmup", *equilibrium[:2], 0.01, 0)] * warmup
    for cycle in range(1, cycles + 1):
        rows += [("equilibrium", *equilibrium[:2], 0.01, cycle)] * equilibrium[2]
        rows += [("exploration", *exploration[:2], 0.001, cycle)] * exploration[2]
    return rows


@pytest.mark.parametrize("preset", TABLE)
def test_every_epoch_of_a_preset_is_in_its_phase(preset):
    scheduler = create_cycle_scheduler(preset=preset)
    rows = expected_epochs(*TABLE[preset])
    assert scheduler.get_total_epochs() == len(rows)
    for epoch, (phase, lambda_mean, amplitude, lambda_energy, cycle) in enumerate(rows):
        assert scheduler.step(epoch) == {
            "phase_name": phase,
            "is_exploration": phase == "exploration",
            "lambda_mean": lambda_mean,
            "lambda_energy": lambda_energy,
            "excitation_amplitude": amplitude,
            "cycle": cycle,
            "epoch": epoch,
        }
    after = scheduler.step(len(rows))
    assert (after["phase_name"], after["is_exploration"], after["cycle"]) == ("consolidation", False, TABLE[preset][1])


def test_partial_configurations_merge_into_the_preset():
    scheduler = create_cycle_scheduler(
        "aggressive",
        equilibrium_config={"duration_epochs": 2},
        exploration_config={"lambda_mean": 0.2},
        num_cycles=2,
        warmup_epochs=0,
    )
    assert scheduler.get_total_epochs() == 2 * (2 + 25)
    first, later = scheduler.step(0), scheduler.step(2)
    assert (first["phase_name"], first["lambda_mean"]) == ("equilibrium", 0.3)
    assert (later["phase_name"], later["lambda_mean"], later["excitation_amplitude"]) == ("exploration", 0.2, 0.08)


def test_without_an_epoch_the_scheduler_counts_on():
    scheduler = create_cycle_scheduler()
    assert [scheduler.step()["epoch"] for _ in range(3)] == [0, 1, 2]
    assert scheduler.step(40)["epoch"] == 40
    assert scheduler.step()["epoch"] == 41


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "balancd"}, "did you mean 'balanced'"),
        ({"exploration_config": {"lambda_men": 1.0}}, r"exploration_config\.lambda_men: .*did you mean 'lambda_mean'"),
        ({"equilibrium_config": {"duration_epochs": 0}}, r"equilibrium_config\.duration_epochs: .*greater than 0"),
        ({"num_cycles": -1}, "num_cycles"),
    ],
)
def test_a_bad_argument_names_the_nearest_valid_one(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_cycle_scheduler(**arguments)


def test_an_epoch_before_the_first_is_refused():
    with pytest.raises(ValueError, match="epoch -1"):
        create_cycle_scheduler().step(-1)
