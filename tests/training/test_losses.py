"""Losses and gradients: shares add up, however the batch is split."""

import pytest
import torch

from inl_core.corpus.loader import Batch
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import ModelConfig
from inl_core.training.loss_module import LossModule, micro_batches
from inl_core.training.losses import AuxiliaryWeights, mean_loss_share

VOCAB = 61


def build(preset: str, **changes) -> LossModule:
    base = {"preset": preset, "d_model": 64, "num_layers": 2, "num_heads": 2, "vocab_size": VOCAB, "max_seq_len": 32}
    model = IntegratorLanguageModel(ModelConfig.model_validate(base | changes))
    model.initialise(0)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return LossModule(model.double().train(), torch.autocast("cpu", torch.bfloat16, enabled=False))


def some_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB, (8, 17), generator=generator).numpy()
    targets = tokens[:, 1:].copy()
    targets[0, :9] = targets[5, 3:] = -100  # parts with unequal numbers of targets
    return Batch(tokens[:, :-1].copy(), targets, None, None)


WEIGHTS = {
    "task": AuxiliaryWeights(),
    "speed and energy": AuxiliaryWeights(speed=0.3, energy=0.2, energy_power=3.0),
    "mean": AuxiliaryWeights(mean=5.0),
    "mean, unweighted": AuxiliaryWeights(mean=5.0, variance_weighted=False),
    "load balancing": AuxiliaryWeights(balance=2.0),
}
EXPERTS = {"integrator": {"controller": {"experts": 4}}}


@pytest.mark.parametrize("preset", ["v3", "v4"])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_eight_sequences_and_two_times_four_give_the_same_losses_and_gradients(preset, weights):
    module, batch = build(preset, **(EXPERTS if weights.balance else {})), some_batch()
    count = torch.tensor(float((batch.targets != -100).sum()), dtype=torch.float64)
    results = []
    for size in (8, 4, 1):
        module.zero_grad()
        parts = micro_batches(batch, size, torch.device("cpu"))
        whole = None
        if weights.needs_whole_batch and len(parts) > 1:
            with torch.no_grad():
                found = [module(part, weights, count, None) for part in parts]
            names = [name for name in ("moments", "loads") if name in found[0]]
            whole = {name: torch.stack([terms[name] for terms in found]).sum(0) for name in names}
        totals: dict[str, torch.Tensor] = {}
        for part in parts:
            terms = module(part, weights, count, whole)
            terms["total"].backward()
            for name in ("task", "mean", "speed", "energy", "balance"):
                if name in terms:
                    totals[name] = totals.get(name, 0) + terms[name].detach()
        results.append((totals, [parameter.grad for parameter in module.parameters()]))
    for totals, gradients in results[1:]:
        for name, value in results[0][0].items():
            torch.testing.assert_close(totals[name], value, rtol=1e-5, atol=1e-9)
        for one, two in zip(gradients, results[0][1], strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-7)  # moments are float32


def test_the_mean_loss_is_the_documents_equation_and_acts_on_mu():
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(3, 10, 6, generator=generator, dtype=torch.float64).requires_grad_()  # L, N, D
    mu = torch.randn(3, 6, generator=generator, dtype=torch.float64).requires_grad_()
    mean, variance = states.mean(1), states.var(1, correction=0)
    expected = ((mean - mu).square() / (1 + variance)).mean()
    wanted = torch.autograd.grad(expected, (states, mu))
    count = torch.tensor(10.0, dtype=torch.float64)
    moments = torch.stack((states.sum(1), states.square().sum(1)))
    loss = mean_loss_share(moments, moments.detach(), count, count, mu, variance_weighted=True)
    torch.testing.assert_close(loss, expected)
    for one, two in zip(torch.autograd.grad(loss, (states, mu)), wanted, strict=True):
        torch.testing.assert_close(one, two)


def test_load_balancing_is_the_switch_loss():
    module, batch = build("v4", **EXPERTS), some_batch()
    part = micro_batches(batch, 8, torch.device("cpu"))[0]
    weights, count = AuxiliaryWeights(balance=1.0), part.mask.sum().double()
    value = module(part, weights, count, None)["balance"]
    expected = []
    for layer in module.run(part, weights).layers:
        chosen = torch.zeros(4, dtype=torch.float64)
        mean = torch.zeros(4, dtype=torch.float64)
        assert layer.routing
        for row, token in part.mask.nonzero().tolist():  # target tokens, one at a time
            probability = layer.routing.probabilities[row, token]
            chosen[probability.topk(2).indices] += 1
            mean += probability / count
        expected.append(4 * (chosen / chosen.sum() * mean).sum())
    torch.testing.assert_close(value, torch.stack(expected).mean(), rtol=1e-6, atol=1e-7)


def test_weights_reach_the_total():
    module, batch = build("v4", **EXPERTS), some_batch()
    part = micro_batches(batch, 8, torch.device("cpu"))[0]
    weights = AuxiliaryWeights(mean=0.5, speed=0.25, energy=0.125, balance=0.0625)
    terms = module(part, weights, torch.tensor(100.0, dtype=torch.float64), None)
    expected = terms["task"] + 0.5 * terms["mean"] + 0.25 * terms["speed"] + 0.125 * terms["energy"]
    expected = expected + 0.0625 * terms["balance"]
    torch.testing.assert_close(terms["total"], expected)
    assert all(terms[name] > 0 for name in ("task", "mean", "speed", "energy", "balance"))
