"""The four words, on trajectories that were made for each of them."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from inl_core.analysis.convergence.layer_statistics import LayerStatistics
from inl_core.analysis.convergence.verdict import Evidence, Thresholds, Verdict, gather, judge
from inl_core.model import Trajectory

NUM_TOKENS, DIM, FOLLOWED = 40, 6, 12


def verdict_on(
    path: Tensor,
    *,
    change_without: float | None = 0.3,
    error: float | None = None,
    used: int | None = None,
    beyond: bool = False,
) -> Verdict:
    """The verdict on states (T+1, N, D), within the `used` iterations (None: all that were followed) or `beyond` them.

    It does not depend on alpha, beta, gate and excitation, which are constant.
    """
    count = len(path) - 1
    gains = [torch.full_like(path[1:], value) for value in (0.5, 0.1, 0.9)]
    trajectory = Trajectory(path, torch.zeros_like(path), *gains)
    statistics = LayerStatistics(count, count if used is None else used, epsilon=0.1)
    statistics.add(trajectory, torch.zeros(DIM), torch.zeros(count, DIM), stride=1.0)
    return judge(gather(statistics, 1.5, change_without, error_without=error, beyond=beyond))


def states(shape_of_t) -> Tensor:
    """x_0 + direction * shape(t), with a size and a direction of its own for each token and dimension."""
    generator = torch.Generator().manual_seed(0)
    start, direction = torch.randn(2, NUM_TOKENS, DIM, generator=generator)
    return torch.stack([start + direction * shape_of_t(t) for t in range(FOLLOWED + 1)])


CONVERGING = states(lambda t: 1 - 0.6**t)
DAMPED = states(lambda t: 0.6**t * math.cos(1.5 * t))
OSCILLATING = states(lambda t: math.cos(1.0 * t))
ALTERNATING = states(lambda t: (-1) ** t)
DRIFTING = states(lambda t: 0.3 * t)
SLOWING = states(lambda t: 1 - 0.9**t)
GROWING = states(lambda t: 1.5**t)


@pytest.mark.parametrize(
    ("path", "word"),
    [
        (CONVERGING, "converge"),
        (DAMPED, "converge"),
        (OSCILLATING, "oscillate"),
        (ALTERNATING, "oscillate"),
        (DRIFTING, "drift"),
        (SLOWING, "drift"),
        (GROWING, "drift"),
    ],
    ids=["converging", "damped", "oscillating", "alternating", "drifting", "slowing", "growing"],
)
def test_the_word_fits_the_path(path: Tensor, word: str) -> None:
    assert verdict_on(path, used=FOLLOWED - 1).word == word  # after one more, the alternating one is at its start


@pytest.mark.parametrize(
    ("path", "used", "within", "beyond"),
    [(CONVERGING, 3, "drift", "converge"), (OSCILLATING, 5, "drift", "oscillate"), (DRIFTING, 3, "drift", "drift")],
    ids=["converging", "oscillating", "drifting"],
)
def test_the_verdict_is_about_the_iterations_that_the_model_runs(
    path: Tensor, used: int, within: str, beyond: str
) -> None:
    assert verdict_on(path, used=used).word == within
    assert verdict_on(path, used=used) == verdict_on(path[: used + 1])
    assert verdict_on(path, used=used, beyond=True).word == beyond


def test_what_happens_beyond_the_used_iterations_is_no_fault_of_the_model() -> None:
    path = CONVERGING.clone()
    path[9:, 3] = math.inf
    assert "finite" not in verdict_on(path, used=8).reason
    assert "finite" in verdict_on(path, used=8, beyond=True).reason


def test_a_swing_that_the_used_iterations_bring_back_to_its_start_is_ignored() -> None:
    assert verdict_on(ALTERNATING, used=2).word == "ignored"


def test_turns_are_counted_as_a_sinusoid_has_them() -> None:
    reason = verdict_on(OSCILLATING).reason
    # cos(t) for t = 0 ... 12 turns at pi, 2 pi, 3 pi: three times
    assert "turned back 3.0 times" in reason


def test_a_path_that_leaves_the_finite_numbers_drifts() -> None:
    path = DRIFTING.clone()
    path[9:, 3] = math.inf
    found = verdict_on(path)
    assert (found.word, found.reason) == ("drift", "1 tokens leave the finite numbers")


@pytest.mark.parametrize("path", [CONVERGING, OSCILLATING, DRIFTING])
def test_a_layer_whose_absence_changes_nothing_is_ignored_whatever_it_does(path: Tensor) -> None:
    assert verdict_on(path, change_without=0.0014, error=0.0001).word == "ignored"
    assert verdict_on(path, change_without=-0.0014, error=0.0001).word == "ignored"
    assert verdict_on(path, change_without=0.0, error=0.0016).word != "ignored"  # too few tokens to tell
    assert verdict_on(path, change_without=0.0, error=None).word != "ignored"  # a single batch
    assert verdict_on(path, change_without=0.0016, error=0.0001).word != "ignored"  # 0.1% of 1.5 bits is 0.0015
    assert (
        verdict_on(path, change_without=-0.2, error=0.0001).word != "ignored"
    )  # a layer that does harm is not ignored


def test_a_layer_that_hardly_moves_the_state_is_ignored() -> None:
    still = states(lambda t: 0.002 * t)
    assert verdict_on(still, used=3).word == "ignored"
    assert verdict_on(still, used=3, change_without=None).word == "ignored"
    assert verdict_on(states(lambda t: 0.02 * t), change_without=None).word == "drift"


def test_every_threshold_decides() -> None:
    base = Evidence([1.0, 0.5, 0.2], num_turns=1.0, displacement=1.0, bits_per_byte=1.0, change_without=0.5)
    base = replace(base, error_without=0.1)
    assert judge(base).word == "drift"
    assert judge(base, Thresholds(converged_movement=0.2)).word == "converge"
    assert judge(base, Thresholds(oscillating_turns=1.0)).word == "oscillate"
    assert judge(base, Thresholds(ignored_change=0.6)).word == "ignored"
    assert judge(base, Thresholds(ignored_displacement=1.1)).word == "ignored"
