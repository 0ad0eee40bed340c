"""Learning rate, annealing and cycles as functions of the step."""

import math
from itertools import pairwise

import pytest

from inl_core.recipe import CycleSettings, LossSettings, ScheduleSettings
from inl_core.training.cycles import CYCLE_PRESETS, cycle_config, regime
from inl_core.training.schedules import drawn_iterations, learning_rate_factor


def rates(**settings) -> list[float]:
    return [learning_rate_factor(ScheduleSettings(**settings), step, 100) for step in range(100)]


def test_wsd_warms_up_stays_and_decays_to_the_final_ratio():
    found = rates(name="wsd", warmup_fraction=0.1, decay_fraction=0.4, final_ratio=0.1)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10:61] == [1.0] * 51
    assert found[99] == pytest.approx(0.1 + 0.9 / 40)
    assert all(later < earlier for earlier, later in pairwise(found[60:]))


def test_cosine_and_constant():
    cosine = rates(name="cosine", warmup_fraction=0.0, final_ratio=0.0)
    assert cosine[50] == pytest.approx(0.5)
    assert cosine[25] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert rates(name="constant", warmup_fraction=0.0) == [1.0] * 100


def test_lambda_mean_anneals_exponentially_or_linearly():
    for kind, middle in (("exponential", math.sqrt(0.1)), ("linear", 0.55)):
        losses = LossSettings.model_validate({"lambda_mean": 1.0, "lambda_mean_final": 0.1, "annealing": kind})
        values = [regime(losses, None, step, 10).lambda_mean for step in (0, 5, 10)]
        assert values == pytest.approx([1.0, middle, 0.1])


@pytest.mark.parametrize("name", CYCLE_PRESETS)
def test_a_cycle_runs_warmup_then_its_phases_then_consolidation(name):
    config = CYCLE_PRESETS[name]
    settings = CycleSettings(preset=name, steps_per_epoch=1)
    names = [regime(LossSettings(), settings, step, 10_000).phase for step in range(config.total_epochs + 3)]
    expected = ["warmup"] * config.warmup_epochs
    one = ["equilibrium"] * config.equilibrium.duration_epochs + ["exploration"] * config.exploration.duration_epochs
    assert names == expected + one * config.num_cycles + ["consolidation"] * 3


def test_a_cycle_without_steps_per_epoch_maps_onto_the_run():
    settings = CycleSettings(preset="balanced")
    phases = [regime(LossSettings(), settings, step, 1600) for step in range(1600)]
    assert [phase.phase for phase in phases[::10]] == ["warmup"] * 10 + (
        ["equilibrium"] * 10 + ["exploration"] * 20
    ) * 5
    exploring = next(phase for phase in phases if phase.phase == "exploration")
    assert (exploring.lambda_mean, exploring.excitation_amplitude, exploring.lambda_energy) == (0.05, 0.05, 0.001)
    settled = phases[0]
    assert (settled.lambda_mean, settled.excitation_amplitude, settled.lambda_energy) == (0.5, 0.0, 0.01)


def test_partial_overrides_merge_into_the_preset():
    settings = CycleSettings.model_validate(
        {"preset": "aggressive", "exploration": {"lambda_mean": 0.2}, "num_cycles": 2}
    )
    config = cycle_config(settings)
    assert (config.exploration.lambda_mean, config.exploration.excitation_amplitude) == (0.2, 0.08)
    assert (config.equilibrium, config.num_cycles) == (CYCLE_PRESETS["aggressive"].equilibrium, 2)


def test_drawn_iterations_lie_between_the_fewest_and_each_layers_own_with_odds_of_one_over_t_and_repeat():
    draws = [drawn_iterations((4, 2), 2, 7, step) for step in range(3000)]
    first = [draw[0] for draw in draws]
    assert {draw[1] for draw in draws} == {2}
    total = 1 / 2 + 1 / 3 + 1 / 4
    assert all(abs(first.count(t) / 3000 - 1 / t / total) < 0.04 for t in (2, 3, 4))  # 4.3 standard deviations or more
    assert draws[:20] == [drawn_iterations((4, 2), 2, 7, step) for step in range(20)]
    assert draws[:20] != [drawn_iterations((4, 2), 2, 8, step) for step in range(20)]
