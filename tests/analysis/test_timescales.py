"""Periods, half-lives, effective ranks and changes of weights, against systems whose answer is known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from inl_core.analysis.parameters import BINS, histogram
from inl_core.analysis.ranks import effective_rank, matrix_ranks
from inl_core.analysis.timescales import frozen_modes, half_life, period
from inl_core.analysis.weight_changes import starting_weights, weight_changes
from inl_core.errors import ArtefactError
from inl_core.inference.loading import load_model
from tests.inference.tiny import tiny_model, write_checkpoint


def test_a_damped_oscillator_has_its_period_and_half_life():
    """x_t = r^t cos(w t) is what the step does with alpha = r^2 and s beta = 1 + r^2 - 2 r cos w."""
    r, w, s = 0.5 ** (1 / 8), 2 * math.pi / 12, 0.7  # halved every 8 steps, once around in 12
    alpha, beta = r * r, (1 + r * r - 2 * r * math.cos(w)) / s
    modes = frozen_modes(*torch.tensor([alpha, beta], dtype=torch.float64), s)
    assert (modes.half_life.item(), modes.period.item()) == pytest.approx((8, 12), rel=1e-12)
    x, v, path = 1.0, 0.0, [1.0]  # the step itself, with mu = 0
    for _ in range(48):
        v = alpha * v - beta * x
        x += s * v
        path.append(x)
    assert path[36:48] == pytest.approx([value * r**12 for value in path[24:36]], rel=1e-9)
    assert path[12] == pytest.approx(0.5**1.5, rel=1e-9)


def test_modes_are_those_of_the_eigenvalues():
    grid = np.array([(a, b) for a in np.linspace(-0.9, 1.1, 21) for b in np.linspace(-0.2, 2.5, 28)])
    modes = frozen_modes(torch.from_numpy(grid[:, 0]), torch.from_numpy(grid[:, 1]))
    kinds = set()
    for (a, b), life, turn in zip(grid, modes.half_life.tolist(), modes.period.tolist(), strict=True):
        values = np.linalg.eigvals(np.array([[1 - b, a], [-b, a]]))
        radius, angle = abs(values).max(), abs(np.angle(values[0])) if abs(values[0].imag) > 1e-6 else None
        kinds.add((bool(radius < 1), angle is None))
        if abs(radius - 1) > 1e-9:
            wanted = math.log(0.5) / math.log(radius) if radius < 1 else math.nan
            assert life == pytest.approx(wanted, rel=1e-6, nan_ok=True), (a, b)
        if angle is not None:
            assert turn == pytest.approx(2 * math.pi / angle, rel=1e-6), (a, b)
        elif abs((1 + a - b) ** 2 - 4 * a) > 1e-9:
            assert math.isnan(turn), (a, b)
    assert len(kinds) == 4


def test_what_does_not_decay_has_no_half_life():
    found = half_life(torch.tensor([0.5, -0.25, 0.0, 1.0, 1.5])).tolist()
    assert found == pytest.approx([1.0, 0.5, 0.0, math.nan, math.nan], nan_ok=True)
    assert period(torch.tensor([-math.pi, 2 * math.pi])).tolist() == pytest.approx([2, 1])


@pytest.mark.parametrize("shape", [(9, 5), (5, 9)])
def test_the_effective_rank_of_known_singular_values(shape: tuple[int, int]):
    random = np.random.default_rng(0)
    u, v = np.linalg.qr(random.normal(size=(shape[0], 5)))[0], np.linalg.qr(random.normal(size=(shape[1], 5)))[0]
    for values in ([3.0, 3, 3, 3, 3], [4.0, 2, 1, 0.5, 0.1], [2.0, 2, 0, 0, 0], [7.0, 0, 0, 0, 0]):
        shares = np.array([value for value in values if value]) / sum(values)
        wanted = math.exp(-(shares * np.log(shares)).sum())
        assert effective_rank(torch.from_numpy(u @ np.diag(values) @ v.T)) == pytest.approx(wanted, rel=1e-6)
    assert effective_rank(torch.zeros(shape)) == 0
    assert effective_rank(torch.full(shape, math.nan)) is None


def test_every_matrix_of_embedding_head_and_controller_has_a_rank():
    names = {one.name: one.part for one in matrix_ranks(tiny_model("v4"))}
    assert names == {
        "embedding.table.weight": "embedding and head",
        "controller.context.weight": "controller",
        "controller.state_velocity.weight": "controller",
        "controller.output.weight": "controller",
    }
    names = {one.name: one.part for one in matrix_ranks(tiny_model("v5", tie_head=False))}
    assert names == {"embedding.table.weight": "embedding", "head.weight": "head"}


def test_changes_are_told_by_part_since_the_seed_s_own_start(tmp_path: Path):
    loaded = load_model(write_checkpoint(tmp_path / "run", "v5"))
    start = starting_weights(loaded)
    fresh = tiny_model("v5")
    fresh.initialise(0)
    assert all(torch.equal(start[name], parameter) for name, parameter in fresh.named_parameters())
    found = {one.part: one for one in weight_changes(loaded.model, start)}
    with torch.no_grad():
        now = np.concatenate([p.double().numpy().ravel() for p in loaded.model.parameters()])
        then = np.concatenate([p.double().numpy().ravel() for p in fresh.parameters()])
        table = (loaded.model.embedding.table.weight - fresh.embedding.table.weight).double().norm().item()
    wanted = (np.linalg.norm(now), np.linalg.norm(now - then), np.linalg.norm(now - then) / np.linalg.norm(then))
    assert (found["all"].size, found["all"].distance, found["all"].relative) == pytest.approx(wanted, rel=1e-9)
    assert found["embedding"].distance == pytest.approx(table, rel=1e-9)
    assert found["stream"].relative is None  # it starts at zero
    loaded.config["provenance"].insert(0, {"event": "import"})
    with pytest.raises(ArtefactError, match=r"no seed draws \(import\)"):
        starting_weights(loaded)


def test_a_histogram_counts_every_finite_value_once():
    values = torch.tensor([0.0, 1.0, 0.5, 0.03, math.nan, 0.97, 1.0])
    wanted = [0] * BINS
    for value in (0.0, 1.0, 0.5, 0.03, 0.97, 1.0):
        wanted[min(int(value * BINS), BINS - 1)] += 1
    assert histogram(values) == wanted
    assert sum(histogram(torch.full((5,), 3.0))) == 5
    assert sum(histogram(torch.tensor([math.inf]))) == 0
