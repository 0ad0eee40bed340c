"""What the lines of a run say of it."""

import pytest

from inl_cli import training_view
from inl_cli.console import Console
from inl_cli.training_view import TrainingView

ROW = {
    "loss": 2.0,
    "bits_per_byte": 1.5,
    "tokens_per_second": 1000.0,
    "learning_rate": 1e-3,
    "gradient_norm": 0.5,
    "phase": "constant",
    "A": 0.03,
    "iterations": 2.0,
}


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """lines(row, ...) -> the line of each row."""
    monkeypatch.setattr(training_view, "_SECONDS_BETWEEN_LINES", 0)
    view = TrainingView(Console(), num_steps=9)

    def show(*rows):
        for number, row in enumerate(rows, 1):
            view.on_metrics(ROW | {"step": number} | row)
        return capsys.readouterr().err.splitlines()

    return show


def test_alpha_is_told_once_and_with_the_step_at_which_it_was_measured(lines):
    first, second, third, fourth = lines({"alpha_mean": 0.25}, {}, {"alpha_mean": None}, {"alpha_mean": 0.5})
    assert first.endswith("alpha 0.250 at step 1")
    assert "alpha" not in second + third
    assert fourth.endswith("alpha 0.500 at step 4")


def test_the_phase_is_that_of_a_cycle_and_told_only_where_there_is_one(lines):
    without, within = lines({}, {"phase": "exploration"})
    assert "phase" not in without + within
    assert "cycle" not in without
    assert "  cycle exploration  A 0.03" in within


def test_of_a_stream_the_shares_of_momentum_and_transport_are_told(lines):
    measured = {"alpha_mean": 0.01, "state_rms": 2.0, "force_momentum": 0.25, "movement_transport": 0.125}
    first, second = lines(measured, {})
    assert first.endswith("momentum share 25.0% at step 1  transport share 12.5% at step 1")
    assert "momentum" not in second
