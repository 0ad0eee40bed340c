"""The report's measurements on a small model, compared with slow numpy on whole trajectories kept in memory."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inl_core.analysis.convergence.collect import trace
from inl_core.analysis.convergence.iterations import (
    iteration_counts,
    measure_iterations,
    measure_stopping,
    score,
    skipped,
    without,
)
from inl_core.analysis.convergence.sample import TokenSample
from inl_core.corpus.loader import IGNORED, Batch
from inl_core.inference.evaluate import evaluate
from inl_core.inference.loading import LoadedModel, load_model
from inl_core.inference.texts import open_split
from inl_core.kernels import apply
from inl_core.model import IntegratorLanguageModel, Options
from inl_core.model.dynamics import Dynamics, Gains
from tests.inference.tiny import tiny_model

FOLLOWED = 5


def load(workplace: Path, preset: str) -> LoadedModel:
    return load_model(workplace / "runs" / preset / "checkpoints" / "step-00000007")


def windows(loaded: LoadedModel, batch_size: int = 3) -> list[Batch]:
    return list(open_split(loaded).windows(window=32, batch_size=batch_size, max_tokens=300))


def arrays(batch: Batch) -> dict[str, Any]:
    values = {"positions": batch.positions, "document_ids": batch.document_ids}
    tensors = {name: None if array is None else torch.from_numpy(array) for name, array in values.items()}
    return {"ids": torch.from_numpy(batch.tokens), **tensors}


@torch.no_grad()
def first_layer(model: IntegratorLanguageModel, batches: list[Batch]) -> dict[str, np.ndarray]:
    """The first layer's trajectory of every scored token, (T+1, N, D); it does not depend on the layers above."""
    parts: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        options = Options(num_iterations=FOLLOWED, keep_trajectory=True, early_stopping=False)
        path = model(**arrays(batch), options=options).layers[0].trajectory
        assert path is not None
        chosen = torch.from_numpy(batch.targets != IGNORED)
        for name in ("states", "velocities", "alpha", "beta", "gate", "candidate"):
            values = getattr(path, name)
            if values is not None:
                parts.setdefault(name, []).append(values[:, chosen].double().numpy())
    return {name: np.concatenate(values, axis=1) for name, values in parts.items()}


@pytest.mark.parametrize("preset", ["v3", "v4"])
def test_streamed_statistics_equal_a_slow_reference(workplace: Path, preset: str) -> None:
    loaded = load(workplace, preset)
    batches, model = windows(loaded), loaded.model
    found = trace(model, batches, num_iterations=FOLLOWED, epsilon=0.4)
    path = first_layer(model, batches)
    layer, states, velocities = model.integrators()[0], path["states"], path["velocities"]
    mu = layer.equilibrium().detach().double().numpy()
    rows = found[0].rows()
    assert len(found) == 2
    assert found[0].num_tokens == states.shape[1] == sum(batch.num_targets for batch in batches)
    assert [row["used"] for row in rows] == [t <= layer.config.num_iterations for t in range(FOLLOWED + 1)]
    for t in range(FOLLOWED + 1):
        step = max(0, t - 1)
        rest = mu + (1 - path["alpha"][step]) * path["candidate"][step] / np.maximum(path["beta"][step], 1e-3)
        distance = np.sqrt(((states[t] - mu) ** 2).mean(-1))
        far = np.sqrt(((states[t] - rest) ** 2).mean(-1))
        assert rows[t]["against_mu"]["final_rmse"] == pytest.approx(np.sqrt((distance**2).mean()), rel=1e-4)
        assert rows[t]["against_mu"]["final_mean"] == pytest.approx(states[t].mean(), abs=1e-5)
        assert rows[t]["against_mu"]["final_std"] == pytest.approx(states[t].std(), rel=1e-4)
        assert rows[t]["against_fixed_point"]["final_rmse"] == pytest.approx(np.sqrt((far**2).mean()), rel=1e-3)
        assert rows[t]["distance_mu"]["p50"] == pytest.approx(middle(distance), rel=0.01)
        assert rows[t]["distance_fixed_point"]["p95"] == pytest.approx(middle(far, 95), rel=0.01)
        assert rows[t]["energy"]["mean"] == pytest.approx((velocities[t] ** 2).mean(), rel=1e-4, abs=1e-9)
        if t:
            residual = np.sqrt(((states[t] - states[t - 1]) ** 2).mean(-1))
            for percent in (5, 50, 95):
                assert rows[t]["residual"][f"p{percent}"] == pytest.approx(middle(residual, percent), rel=0.01)
            for name in ("alpha", "beta", "gate"):
                assert rows[t][name]["mean"] == pytest.approx(path[name][t - 1].mean(), rel=1e-4)
                assert rows[t][name]["p5"] == pytest.approx(middle(path[name][t - 1], 5), rel=0.01)
            assert sum(rows[t]["stability"][kind] for kind in KINDS) == pytest.approx(1.0)


KINDS = ("steady", "oscillatory", "alternating", "unstable")


def middle(values: np.ndarray, percent: float = 50) -> float:
    return float(np.percentile(values, percent, method="inverted_cdf"))


def test_batches_do_not_matter_and_the_model_is_left_as_it_was(workplace: Path) -> None:
    loaded = load(workplace, "v4")
    ids = torch.from_numpy(windows(loaded)[0].tokens)
    with torch.no_grad():
        before = loaded.model(ids).hidden
        one, many = (
            trace(loaded.model, windows(loaded, size), num_iterations=3, epsilon=0.4)[1].rows() for size in (1, 10)
        )
        after = loaded.model(ids).hidden
    assert torch.equal(before, after)
    for single, several in zip(one, many, strict=True):
        assert single["against_mu"] == pytest.approx(several["against_mu"], rel=1e-5)
        assert single["residual"]["p50"] == pytest.approx(several["residual"]["p50"], rel=0.02, nan_ok=True)


def test_following_longer_does_not_change_what_the_next_layer_gets(workplace: Path) -> None:
    loaded = load(workplace, "v4")
    short, long = (
        trace(loaded.model, windows(loaded), num_iterations=count, epsilon=0.4)[1].rows() for count in (2, 6)
    )
    assert short[2]["against_mu"] == pytest.approx(long[2]["against_mu"], rel=1e-5)
    assert short[0]["against_mu"] == pytest.approx(long[0]["against_mu"], rel=1e-5)


def test_the_sample_holds_the_trajectories_of_its_tokens(workplace: Path) -> None:
    loaded = load(workplace, "v4")
    batches = windows(loaded)
    sample = TokenSample(loaded.tokenizer, size=10, num_tokens=300)
    trace(loaded.model, batches, num_iterations=FOLLOWED, epsilon=0.4, sample=sample)
    table = sample.table().to_pandas()
    path, mu = first_layer(loaded.model, batches), loaded.model.integrators()[0].equilibrium().detach().numpy()
    tokens = np.concatenate([batch.tokens[batch.targets != IGNORED] for batch in batches])
    assert sorted(table["token_index"].unique()) == list(range(0, len(tokens), 30))
    assert len(table) == 10 * 2 * (FOLLOWED + 1)
    for row in table[table["layer"] == 0].to_dict("records"):
        n, t = row["token_index"], row["iteration"]
        x, v = path["states"][:, n], path["velocities"][:, n]
        assert row["token_id"] == tokens[n]
        assert row["used"] == (t <= 2)
        assert row["distance_mu"] == pytest.approx(np.sqrt(((x[t] - mu) ** 2).mean()), rel=1e-4)
        assert row["portrait_error"] == pytest.approx((x[t] - mu)[[0, 8, 16, 24]], rel=1e-4, abs=1e-5)
        assert row["portrait_velocity"] == pytest.approx(v[t][[0, 8, 16, 24]], rel=1e-4, abs=1e-5)
        if t:
            assert row["residual"] == pytest.approx(np.sqrt(((x[t] - x[t - 1]) ** 2).mean()), rel=1e-4)
            assert row["gate"] == pytest.approx(path["gate"][t - 1, n].mean(), rel=1e-4)
        else:
            assert np.isnan(row["residual"])


@pytest.mark.parametrize("preset", ["v3", "v4"])
def test_the_curve_over_iterations_is_what_eval_says(workplace: Path, preset: str) -> None:
    loaded = load(workplace, preset)
    table, own = loaded.tokenizer.token_num_bytes, loaded.model.config.num_iterations
    passes: list[int] = []
    report = measure_iterations(loaded.model, lambda: windows(loaded), table, done=lambda: passes.append(1))
    counts = [row["iterations"] for row in report.by_iterations]
    assert counts == iteration_counts(own)
    for row in report.by_iterations[1:]:
        settings: dict[str, Any] = {"num_iterations": row["iterations"], "early_stopping": False}
        wanted = evaluate(loaded.model, windows(loaded), table, **settings)
        assert row["bits_per_byte"] == pytest.approx(wanted.bits_per_byte, rel=1e-6)
    as_it_is = evaluate(loaded.model, windows(loaded), table, early_stopping=False).bits_per_byte
    assert report.bits_per_byte == pytest.approx(as_it_is, rel=1e-6)
    # v3 divides its iterations unevenly among the layers, so it computes something else with T in each layer.
    assert (abs(report.by_iterations[counts.index(own)]["change"]) < 1e-6) == (preset == "v4")
    assert len(report.without_layer) == 2
    assert [row["term"] for row in report.without_term] == ["momentum", "equilibrium", "excitation"]
    assert len(passes) == 1 + len(counts) + 2 + 3


@torch.no_grad()
@pytest.mark.parametrize("preset", ["v3", "v4"])
def test_a_skipped_layer_hands_on_what_it_was_given(preset: str) -> None:
    model, ids = tiny_model(preset), torch.arange(12)[None]
    plain = model(ids).hidden
    with skipped(model, [1]):
        output = model(ids, options=Options(keep_trajectory=True))
        path = output.layers[1].trajectory
        assert path is not None
        assert torch.equal(output.layers[1].state, path.states[0])
        assert torch.equal(output.layers[1].velocity, path.velocities[0])
        assert not torch.equal(output.layers[0].state, output.layers[0].trajectory.states[0])
        assert not torch.equal(output.hidden, plain)
    assert torch.equal(model(ids).hidden, plain)


@pytest.mark.parametrize("layers", [None, [0], [1]])
def test_a_skipped_layer_is_skipped_however_its_iterations_are_computed(layers: list[int] | None) -> None:
    model, ids = tiny_model("v4").eval(), torch.arange(40)[None] % 12
    with torch.no_grad(), skipped(model, layers):
        found = model(ids).hidden
        apply(model)
        own = model(ids).hidden
    torch.testing.assert_close(own, found, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(model(ids).hidden, found, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"integrator": {"controller": {"experts": 3, "top_k": 2}}}])
@pytest.mark.parametrize(("term", "gain"), [("momentum", "alpha"), ("equilibrium", "beta")])
def test_without_a_term_an_integrator_computes_as_if_its_coefficient_were_zero(
    monkeypatch: pytest.MonkeyPatch, term: str, gain: str, changes: dict[str, Any]
) -> None:
    model, ids = tiny_model("v4", **changes), torch.arange(40)[None] % 12
    own, plain = Dynamics.gains, model(ids).hidden

    def zeroed(*arguments: Any) -> Gains:
        found = own(*arguments)
        return found._replace(**{gain: torch.zeros_like(getattr(found, gain))})

    with monkeypatch.context() as patch:
        patch.setattr(Dynamics, "gains", zeroed)
        wanted = model(ids).hidden
    assert not torch.allclose(plain, wanted, rtol=1e-3, atol=1e-3)
    for operations in ("plain", "auto"):
        apply(model, operations=operations)
        with without(model, term):
            torch.testing.assert_close(model(ids).hidden, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(ids).hidden, plain, rtol=1e-4, atol=1e-5)


def test_the_points_of_a_long_curve_are_few_and_hold_the_models_own() -> None:
    assert iteration_counts(2) == [0, 1, 2, 3, 4]
    for own in (5, 7, 12, 25, 100):
        counts = iteration_counts(own)
        assert {0, 1, own} <= set(counts)
        assert len(counts) <= 15
        assert counts[-1] > 1.8 * own


def test_the_standard_error_is_that_of_batches_drawn_anew(workplace: Path) -> None:
    loaded = load(workplace, "v4")
    table = loaded.tokenizer.token_num_bytes
    own = score(loaded.model, windows(loaded, 1), table)
    other = score(loaded.model, windows(loaded, 1), table, num_iterations=1)
    found = other.change_from(own)
    generator, changes = np.random.default_rng(0), []
    for _ in range(4000):
        drawn = generator.integers(0, len(own.bits), len(own.bits))
        changes.append((other.bits - own.bits)[drawn].sum() / own.num_bytes[drawn].sum())
    assert found["standard_error"] == pytest.approx(np.std(changes), rel=0.15)


def test_early_stopping_is_counted_by_layer_and_priced(workplace: Path) -> None:
    loaded = load(workplace, "v4")
    assert measure_stopping(loaded.model, lambda: windows(loaded), loaded.tokenizer.token_num_bytes) is None
    changes = {"num_iterations": 6, "early_stopping": {"convergence_threshold": 0.35, "min_iterations": 1}}
    model, table = tiny_model("v4", integrator=changes), loaded.tokenizer.token_num_bytes
    found = measure_stopping(model, lambda: windows(loaded), table)
    wanted = evaluate(model, windows(loaded), table)
    assert found is not None
    assert [sum(counts) for counts in found.tokens_by_iterations] == [wanted.tokens] * 2
    used = sum(t * number for counts in found.tokens_by_iterations for t, number in enumerate(counts))
    assert used / wanted.tokens / 2 == pytest.approx(wanted.iterations, rel=1e-6)
    assert 1 < wanted.iterations < 6
    assert found.bits_per_byte == pytest.approx(wanted.bits_per_byte, rel=1e-6)
    full = evaluate(model, windows(loaded), table, early_stopping=False)
    assert found.change == pytest.approx(wanted.bits_per_byte - full.bits_per_byte, abs=1e-6)
