"""The documents' loss against slow float64 loops, for both kinds of model."""

import math

import numpy as np
import pytest
import torch

from inl_core import IntegratorLoss

BATCH, LENGTH, STEPS, DIM, VOCAB, LAYERS = 5, 3, 4, 2, 7, 2


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_terms(x, v, mu, kept, variance_weighted=True):
    """mean, speed, energy of one layer: x, v (B, S, T+1, D), mu (D,), kept (B, S)."""
    total, dim = x.shape[2] - 1, x.shape[3]
    tokens = [(b, s) for b in range(x.shape[0]) for s in range(x.shape[1]) if kept[b, s]]
    mean = 0.0
    for i in range(dim):
        values = [x[b, s, -1, i] for b, s in tokens]
        center = sum(values) / len(values)
        variance = sum((value - center) ** 2 for value in values) / len(values)
        mean += (center - mu[i]) ** 2 / (1 + variance if variance_weighted else 1) / dim
    weights = [math.exp(-3 * t / total) for t in range(1, total + 1)]
    speed = energy = 0.0
    for b, s in tokens:
        for t in range(1, total + 1):
            for i in range(dim):
                share = 1 / (dim * len(tokens))
                speed += weights[t - 1] / sum(weights) * abs(x[b, s, t, i] - mu[i]) * share
                energy += v[b, s, t, i] ** 2 * share / total
    return np.array([mean, speed, energy])


def check(losses, task, terms, weights):
    expected = dict(zip(("mean", "speed", "energy"), terms, strict=True)) | {"task": task}
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5), name
    for name, weight in zip(("task", "mean", "speed", "energy"), (1.0, *weights), strict=True):
        assert losses[f"L_{name}"].item() == pytest.approx(weight * expected[name], rel=1e-5), name
    assert losses["total"].item() == pytest.approx(task + np.dot(terms, weights), rel=1e-5)


@pytest.mark.parametrize("variance_weighted", [True, False])
@pytest.mark.parametrize("mu", [None, 4.0, torch.tensor([4.5, 5.5])])
def test_regression_equals_the_loops(variance_weighted, mu):
    x, v = 5 + random(BATCH, STEPS + 1, DIM, seed=0), random(BATCH, STEPS + 1, DIM, seed=1)
    predictions, targets = random(BATCH, 1, seed=2), random(BATCH, seed=3)
    loss_fn = IntegratorLoss(lambda_speed=0.2, lambda_energy=0.03, variance_weighted=variance_weighted)
    losses = loss_fn(predictions, targets, {"x": x, "v": v}, epoch=0, learned_mu=mu)
    place = np.broadcast_to(5.0 if mu is None else np.asarray(mu), (DIM,))
    terms = slow_terms(x[:, None].numpy(), v[:, None].numpy(), place, np.ones((BATCH, 1)), variance_weighted)
    task = sum((float(p) - float(t)) ** 2 for p, t in zip(predictions[:, 0], targets, strict=True)) / BATCH
    check(losses, task, terms, (1.0, 0.2, 0.03))


def test_the_language_models_loss_equals_the_loops_and_ignores_masked_targets():
    shape = (BATCH, LENGTH, STEPS + 1, DIM)
    states = [random(*shape, seed=layer) for layer in range(LAYERS)]
    velocities = [random(*shape, seed=10 + layer) for layer in range(LAYERS)]
    mu, logits = random(LAYERS, DIM, seed=20), random(BATCH, LENGTH, VOCAB, seed=21)
    targets = torch.randint(0, VOCAB, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    targets[0] = targets[2, 1] = -100
    losses = IntegratorLoss()(logits, targets, {"x": states, "v": velocities, "mu": mu}, epoch=0)
    kept = (targets != -100).numpy()
    layers = zip(states, velocities, mu, strict=True)
    terms = np.mean([slow_terms(x.numpy(), v.numpy(), m.numpy(), kept) for x, v, m in layers], axis=0)
    task = 0.0
    for b, s in zip(*np.nonzero(kept), strict=True):
        row = logits[b, s].numpy()
        task += (math.log(np.exp(row).sum()) - row[targets[b, s]]) / kept.sum()
    check(losses, task, terms, (1.0, 0.1, 0.01))


def test_the_gradient_of_the_mean_loss_is_that_of_its_definition():
    x, mu = 5 + random(BATCH, STEPS + 1, DIM, seed=0), torch.tensor([4.0, 5.5], dtype=torch.float64)
    gradients = []
    for plain in (True, False):
        states, place = x.clone().requires_grad_(), mu.clone().requires_grad_()
        if plain:
            final = states[:, -1]
            weight = 1 / (1 + final.var(0, correction=0))
            loss = (weight * (final.mean(0) - place) ** 2).mean()
        else:
            loss_fn = IntegratorLoss(lambda_speed=0.0, lambda_energy=0.0)
            zero = torch.zeros(BATCH, 1, dtype=torch.float64)
            loss = loss_fn(zero, zero, {"x": states, "v": states.detach()}, learned_mu=place)["total"]
        loss.backward()
        gradients.append((states.grad, place.grad))
    for one, two in zip(*gradients, strict=True):
        assert one.any()
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_lambda_mean_anneals_to_a_tenth_and_phases_replace_it():
    loss_fn = IntegratorLoss(lambda_mean_init=0.8, annealing_epochs=10)
    assert [loss_fn.lambda_mean(epoch) for epoch in (0, 5, 10, 50)] == pytest.approx([0.8, 0.8 / 10**0.5, 0.08, 0.08])
    linear = IntegratorLoss(annealing_epochs=10, annealing="linear")
    assert [linear.lambda_mean(epoch) for epoch in (0, 5, 10)] == pytest.approx([1.0, 0.55, 0.1])
    loss_fn.set_exploration_phase(True)
    assert (loss_fn.lambda_mean(50), loss_fn.lambda_energy) == (0.05, 0.001)
    loss_fn.set_exploration_phase(False)
    assert (loss_fn.lambda_mean(50), loss_fn.lambda_energy) == (0.5, 0.01)
    loss_fn.set_exploration_phase(False, lambda_mean=0.3)
    assert loss_fn.lambda_mean(50) == 0.3


@pytest.mark.parametrize("exploring", [False, True])
def test_the_phase_reaches_the_total(exploring):
    x, v = 5 + random(BATCH, STEPS + 1, DIM, seed=0), random(BATCH, STEPS + 1, DIM, seed=1)
    zero = torch.zeros(BATCH, 1, dtype=torch.float64)
    loss_fn = IntegratorLoss(lambda_speed=0.0, exploration_lambda_mean=0.2, exploration_lambda_energy=0.3)
    loss_fn.set_exploration_phase(exploring)
    losses = loss_fn(zero, zero, {"x": x, "v": v})
    weights = (0.2, 0.3) if exploring else (0.5, 0.01)
    expected = weights[0] * losses["mean"] + weights[1] * losses["energy"]
    assert losses["total"].item() == pytest.approx(expected.item(), rel=1e-6)
    assert losses["lambda_mean"].item() == pytest.approx(weights[0])


def test_without_a_trajectory_only_the_task_counts():
    predictions, targets = random(BATCH, 1, seed=0), random(BATCH, 1, seed=1)
    losses = IntegratorLoss()(predictions, targets)
    assert losses["total"].item() == pytest.approx((predictions - targets).square().mean().item())


@pytest.mark.parametrize(
    ("predictions", "targets", "message"),
    [
        ((5, 2), torch.zeros(5), "must have one shape"),
        ((5, 1), torch.zeros(4), "must have one shape"),
        ((5, 1), torch.zeros(5, dtype=torch.long), r"convert the targets with \.float\(\)"),
        ((5, 1), torch.zeros(5, 1, dtype=torch.long), r"convert the targets with \.float\(\)"),
    ],
)
def test_shapes_that_would_broadcast_silently_are_refused(predictions, targets, message):
    with pytest.raises(ValueError, match=message):
        IntegratorLoss()(torch.zeros(predictions), targets)


@pytest.mark.parametrize("name", ["lambda_mean_init", "lambda_speed", "lambda_energy", "exploration_lambda_mean"])
def test_a_negative_weight_is_named(name):
    with pytest.raises(ValueError, match=name):
        IntegratorLoss(**{name: -1.0})
