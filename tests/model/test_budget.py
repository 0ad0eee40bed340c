"""Budget allocation: the total is preserved, the gradient is the true one, useless iterations lose their budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inl_core.model import Options
from inl_core.model.budget import Budget, deal
from inl_core.recipe import BudgetConfig
from tests.model.test_language_model import build, some_ids


def budget_of(strategy: str, num_layers: int = 4, num_iterations: int = 3, **changes) -> Budget:
    budget = Budget(BudgetConfig(strategy=strategy, **changes), num_layers, num_iterations)
    budget.initialise()
    return budget


def model_with(strategy: str, **changes):
    """A perturbed v4 in float64 with T = 3 whose budget starts uniform."""
    integrator = {"num_iterations": 3, "budget": {"strategy": strategy}, **changes}
    model = build("v4", integrator=integrator)
    if model.budget is not None:
        model.budget.initialise()
    return model


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=12), st.integers(1, 9), st.data())
def test_dealing_preserves_the_total_and_the_bounds(weights, mean, data):
    lowest, highest = data.draw(st.integers(1, mean)), data.draw(st.integers(mean, 3 * mean))
    counts = deal(torch.tensor(weights, dtype=torch.float64), mean * len(weights), lowest, highest)
    assert counts.sum() == mean * len(weights)
    assert counts.min() >= lowest
    assert counts.max() <= highest


def test_dealing_is_proportional_where_the_bounds_allow_it():
    assert deal(torch.tensor([1.0, 2.0, 3.0, 4.0]), 20, 1, 20).tolist() == [2, 4, 6, 8]


@given(st.lists(st.floats(-3, 3), min_size=4, max_size=4), st.sampled_from(["learned", "hybrid"]))
def test_learned_budgets_add_up_to_the_total_steps_and_fractions_included(weight, strategy):
    budget = budget_of(strategy)
    with torch.no_grad():
        budget.weight.copy_(torch.tensor(weight))
    with torch.no_grad():
        layers = budget()
    assert sum(count - 1 + float(fraction) for count, fraction in layers) == pytest.approx(12, rel=1e-5)
    assert all(count >= 1 and 0 < float(fraction) < 1.001 for count, fraction in layers)


@pytest.mark.parametrize("strategy", ["learned", "dynamic", "hybrid"])
def test_a_fresh_budget_is_the_uniform_one(strategy):
    uniform, other = model_with("uniform"), model_with(strategy)
    other.load_state_dict(uniform.state_dict(), strict=False)
    torch.testing.assert_close(other(some_ids()).hidden, uniform(some_ids()).hidden, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("at", [0.0, 0.21, -0.4])
def test_the_gradient_of_a_learned_budget_is_that_of_finite_differences(at):
    model, ids = model_with("learned"), some_ids()
    direction = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sum(0)

    def score() -> torch.Tensor:
        return (model(ids).hidden * direction).sum()

    with torch.no_grad():
        model.budget.weight.copy_(torch.tensor([at, 0.05, -0.1]))
    score().backward()
    gradient = model.budget.weight.grad.clone()
    assert gradient.abs().min() > 0
    for layer in range(3):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                model.budget.weight[layer] += step
                values.append(score())
                model.budget.weight[layer] -= step
        assert float(values[0] - values[1]) / 2e-5 == pytest.approx(float(gradient[layer]), rel=1e-4, abs=1e-6)


def test_the_function_is_continuous_where_a_budget_passes_a_whole_number():
    model, ids, found = model_with("learned"), some_ids(), []
    for shift in (-2e-3, 2e-3):
        with torch.no_grad():
            model.budget.weight.copy_(torch.tensor([shift, 0.0, 0.0]))
            found.append(model(ids).hidden)
        assert model.budget()[0].num_iterations == (3 if shift < 0 else 4)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0.05 * float(found[0].std()))


def test_the_budget_of_a_layer_whose_iterations_are_useless_falls():
    """Layer 0 writes nothing into the stream and hands no velocity on, and the target needs layer 1 to move further."""
    integrator = {"num_iterations": 4, "dt": 0.2, "carry_velocity": False}
    changes = {"num_layers": 2}
    teacher = build("v4", integrator=integrator, **changes)
    model = build("v4", integrator={**integrator, "budget": {"strategy": "learned"}}, **changes)
    model.load_state_dict(teacher.state_dict(), strict=False)
    for some_model in (teacher, model):
        with torch.no_grad():
            some_model.blocks[0].layer_gain.zero_()
            some_model.blocks[1].feed_forward.down.weight.mul_(4.0)
    model.budget.initialise()
    ids = some_ids(4, 16)
    target = teacher(ids, options=Options(num_iterations=(4, 7))).hidden.detach()
    optimizer = torch.optim.Adam([model.budget.weight], lr=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        (model(ids).hidden - target).square().mean().backward()
        optimizer.step()
    shares = model.budget.shares().detach()
    assert shares[0] < 2.5
    assert float(shares.sum()) == pytest.approx(8, rel=1e-5)


def test_dynamic_budgets_follow_the_residuals_inside_their_bounds():
    budget = budget_of("dynamic", max_iterations=5)
    budget.reallocate(torch.tensor([0.1, 10.0, 1.0, 1.0]))
    assert budget.allocation.tolist() == [1, 5, 3, 3]
    assert [count for count, fraction in budget() if fraction is None] == [1, 5, 3, 3]


def test_hybrid_budgets_are_learned_and_corrected():
    budget = budget_of("hybrid")
    budget.reallocate(torch.tensor([1.0, 1.0, 1.0, 8.0]))
    shares = budget.shares()
    assert shares[3] > 3 > shares[0]
    assert shares.detach().sum() == pytest.approx(12, rel=1e-5)
    shares[0].backward()
    assert budget.weight.grad.abs().min() > 0


def test_given_iterations_overrule_the_budget():
    model = model_with("dynamic")
    model.budget.reallocate(torch.tensor([1.0, 2.0, 6.0]))
    states = model(some_ids(), options=Options(num_iterations=2, keep_trajectory=True)).layers
    assert [len(layer.trajectory.alpha) for layer in states] == [2, 2, 2]
    states = model(some_ids(), options=Options(keep_trajectory=True)).layers
    assert [len(layer.trajectory.alpha) for layer in states] == model.budget.allocation.tolist()
