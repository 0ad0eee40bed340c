"""The stream: its equation written out token by token, what it is at its start, its cache, its switches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from inl_core.model import IntegratorLanguageModel, Options
from inl_core.model.stream import Shared, Step, have_previous, shift
from inl_core.recipe import ModelConfig
from tests.model.test_language_model import build, some_ids

TRANSPORT = {"transport": True}
VARIANTS = {
    "v5": {"preset": "v5"},
    "dynamic alpha": {"preset": "v5", "stream": {"dynamic_alpha": True}},
    "sparse excitation": {"preset": "v5", "stream": {"excitation": {"sparsity": 0.25}}},
    "momentum alone": {
        "preset": "v5",
        "transport": False,
        "stream": {"anchor": False, "equilibrium": False, "excitation": None},
    },
    "equilibrium alone": {
        "preset": "v5",
        "transport": False,
        "stream": {"momentum": False, "anchor": False, "excitation": None},
    },
    "excitation alone": {
        "preset": "v5",
        "transport": False,
        "stream": {"momentum": False, "anchor": False, "equilibrium": False},
    },
    "transformer": {"preset": "transformer"},
    "transformer + transport": {"preset": "transformer", **TRANSPORT},
    "transport at the embedding": {"preset": "transformer", "transport": "embedding"},
    "transport after attention": {"preset": "v5", "transport": "attention"},
    "transport after the feed-forward": {"preset": "v5", "transport": "feed_forward"},
}


def variant(name: str) -> IntegratorLanguageModel:
    return build(**VARIANTS[name])


def value(parameter: Tensor | None, channel: int) -> float:
    return 0.0 if parameter is None else float(parameter[channel])


def by_the_equation(model: IntegratorLanguageModel, ids: Tensor, documents: Tensor) -> Tensor:
    """x after all steps, (B, S, D): numbers, one by one, but for the candidates, which the sub-layers give."""
    batch, length, dim = *ids.shape, model.config.d_model
    start = model.embedding(ids)[0]
    positions = torch.tensor([[row[:s].tolist().count(row[s]) for s in range(length)] for row in documents])
    rotary = tuple(model.position_table[:, positions].unsqueeze(-2))
    mask = model.visibility(ids, documents, None)
    x, v, amplitude = start.clone(), start.clone(), float(model.excitation_amplitude)

    def moved_by_the_one_before(values: Tensor, target: Tensor, share: Tensor | None) -> Tensor:
        moved = target.clone()
        for b in range(batch):
            for s in range(1, length):
                if documents[b, s] == documents[b, s - 1]:
                    moved[b, s] += torch.tensor([value(share, i) * float(values[b, s - 1, i]) for i in range(dim)])
        return moved

    x = moved_by_the_one_before(start, x, model.entry.transport)
    for t in range(2 * model.config.num_layers):
        block = model.blocks[t // 2]
        if t % 2 == 0:
            step, c = block.step_attention, block.attention(block.norm_attention(x), rotary, mask, None)
        else:
            step, c = block.step_feed_forward, block.feed_forward(block.norm_feed_forward(x))
        new_v, new_x = torch.zeros_like(v), x.clone()
        for b in range(batch):
            for s in range(length):
                error = [float(x[b, s, i]) - value(step.mu, i) for i in range(dim)]
                distance = math.sqrt(sum(e * e for e in error) / dim)
                for i in range(dim):
                    alpha = value(step.alpha, i)
                    if model.config.stream and model.config.stream.dynamic_alpha:
                        alpha *= 1 - math.exp(-model.config.stream.kappa * distance)
                    force = 0.0
                    if step.excitation is not None and i in step.excitation.excited.tolist():
                        place = step.excitation.excited.tolist().index(i)
                        gamma, phi = float(step.excitation.gamma[place]), float(step.excitation.phi[place])
                        force = amplitude * math.sin(gamma * (t + 1) + phi)
                    new_v[b, s, i] = (
                        alpha * float(v[b, s, i]) + float(c[b, s, i]) - value(step.beta, i) * error[i] + force
                    )
                    new_x[b, s, i] = x[b, s, i] + new_v[b, s, i] + value(step.anchor, i) * float(start[b, s, i])
        x, v = moved_by_the_one_before(new_v, new_x, step.transport), new_v
    return x


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_the_model_is_its_equation(name):
    model = build(**VARIANTS[name], d_model=12, num_layers=2, num_heads=2)
    ids, documents = some_ids(2, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 2, 2]])
    positions = torch.tensor([[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 0, 1]])
    found = model(ids, positions=positions, document_ids=documents).hidden
    torch.testing.assert_close(found, model.norm_final(by_the_equation(model, ids, documents)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["v5", "transformer + transport"])
def test_without_excitation_it_starts_as_exactly_a_transformer(name):
    size = {"d_model": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 97}
    models = []
    for values in (VARIANTS[name], VARIANTS["transformer"]):
        models.append(IntegratorLanguageModel(ModelConfig.model_validate({**size, **values})))
        models[-1].initialise(3)
        models[-1].excitation_amplitude.zero_()
    with torch.no_grad():
        torch.testing.assert_close(models[0](some_ids()).hidden, models[1](some_ids()).hidden)


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_the_cache_gives_what_the_whole_text_gives(name):
    """In one piece, in chunks, token by token, and with rows of different lengths."""
    model, ids = variant(name).eval(), some_ids(3, 11)
    whole = model(ids).hidden
    cache = model.new_cache(3, 11)
    pieces = [model(ids[:, a:b], cache=cache).hidden for a, b in [(0, 4), (4, 9), (9, 10), (10, 11)]]
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-9)

    padding = torch.tensor([0, 3, 5])
    rows = torch.stack([torch.cat((ids[b, :n] * 0, ids[b, : 11 - n])) for b, n in enumerate(padding.tolist())])
    cache = model.new_cache(3, 11)
    cache.padding = padding
    last = [model(rows[:, a:b], cache=cache).hidden for a, b in [(0, 6), (6, 9)]][-1]
    for b, n in enumerate(padding.tolist()):
        torch.testing.assert_close(last[b, -1], whole[b, 8 - n], rtol=1e-9, atol=1e-9)
    cache.select(torch.tensor([2, 0]))
    for s in (9, 10):
        last = model(rows[[2, 0], s : s + 1], cache=cache).hidden
    torch.testing.assert_close(last[:, 0], torch.stack((whole[2, 5], whole[0, 10])), rtol=1e-9, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("name", ["v5", "transformer"])
def test_a_cache_in_bfloat16_gives_nearly_what_one_in_float32_gives(name):
    model, ids = variant(name).float().eval(), some_ids(3, 11)
    caches = [model.new_cache(3, 11, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for a, b in [(0, 6), (6, 10), (10, 11)]:
        exact, rounded = (model(ids[:, a:b], cache=cache).hidden for cache in caches)
        assert rounded.dtype == exact.dtype == torch.float32
        torch.testing.assert_close(rounded, exact, rtol=0.0, atol=0.05 * exact.abs().max().item())


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=5, max_size=5), min_size=1, max_size=3), st.booleans())
def test_a_token_has_a_predecessor_only_in_its_document(rows: list[list[int]], is_restarted: bool):
    """Whether the caller's positions restart at each document or run on."""
    documents = torch.tensor(rows)
    positions = torch.arange(5).expand(documents.shape).clone()
    if is_restarted:
        for b, row in enumerate(rows):
            for s in range(1, 5):
                positions[b, s] = positions[b, s - 1] + 1 if row[s] == row[s - 1] else 0
    wanted = [[s > 0 and row[s] == row[s - 1] for s in range(5)] for row in rows]
    assert have_previous(positions, documents)[..., 0].tolist() == wanted


def test_shift_hands_on_the_last_token():
    v, previous = torch.arange(6.0).view(1, 3, 2), torch.full((1, 1, 2), 9.0)
    assert shift(v, previous, None)[0].tolist() == [[9, 9], [0, 1], [2, 3]]
    assert previous.flatten().tolist() == [4, 5]
    assert shift(v, None, None)[0, 0].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["v5", "dynamic alpha"])
def test_gradients_of_a_step_are_those_of_differences(name):
    config = ModelConfig.model_validate({"d_model": 4, "num_heads": 2, "num_layers": 2, **VARIANTS[name]})
    step = Step(config, "attention", 2).double()
    step.reset_buffers()
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for key, tensor in step.named_parameters()
    }
    states = [torch.randn(2, 3, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    has = torch.tensor([[False, True, True], [False, True, False]])[..., None]

    def run(x: Tensor, v: Tensor, c: Tensor, start: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        shared = Shared(start, torch.tensor(0.3, dtype=torch.float64), None, None, has)
        return torch.func.functional_call(step, dict(zip(weights, values, strict=True)), (x, v, c, shared, None))

    values = [tensor.requires_grad_() for tensor in weights.values()]
    assert torch.autograd.gradcheck(run, (*states, *values))


@pytest.mark.parametrize("name", ["v5", "transformer + transport"])
def test_the_embedding_learns_by_all_its_ways(name):
    """As first input, as first velocity, through the anchor, and as the token before."""
    model = build(**VARIANTS[name], d_model=8, num_layers=1, num_heads=2, num_kv_heads=1)

    def run(table: Tensor) -> Tensor:
        given = {"embedding.table.weight": table}
        return torch.func.functional_call(model, given, (some_ids(1, 3),)).hidden

    assert torch.autograd.gradcheck(run, model.embedding.table.weight.detach().clone().requires_grad_())


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_a_kept_trajectory_is_the_whole_depth_and_changes_nothing(name):
    model, ids = variant(name), some_ids()
    output = model(ids, options=Options(keep_trajectory=True))
    torch.testing.assert_close(output.hidden, model(ids).hidden, rtol=1e-12, atol=1e-12)
    [depth] = output.layers
    path, steps = depth.trajectory, 2 * model.config.num_layers
    assert depth.num_iterations == steps
    assert path.states.shape == path.velocities.shape == (steps + 1, 2, 12, model.config.d_model)
    torch.testing.assert_close(model.norm_final(path.states[-1]), output.hidden)
    for t in range(steps):
        step = [model.blocks[t // 2].step_attention, model.blocks[t // 2].step_feed_forward][t % 2]
        mu = 0 if step.mu is None else step.mu
        force = 0 if step.excitation is None else step.excitation.at(step.time, model.excitation_amplitude)
        error, alpha, beta = path.states[t] - mu, path.alpha[t], path.beta[t]
        wanted = alpha * path.velocities[t] + path.candidate[t] - beta * error + force
        torch.testing.assert_close(path.velocities[t + 1], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", ["yes", 1])
def test_transport_is_not_converted(value):
    with pytest.raises(ValueError, match="transport"):
        ModelConfig.model_validate({"transport": value})


def test_the_integrators_switches_are_refused_by_name():
    for preset in (*(f"v{generation}" for generation in range(1, 5)), "transformer"):
        with pytest.raises(
            ValueError, match=r"stream is for v5: set preset: v5 \(and switch its terms off one by one\)"
        ):
            ModelConfig.model_validate({"preset": preset, "stream": {"momentum": True}})
    for integrator in ({}, {"integrator": None}):  # without one v4 is its block alone, and still no stream
        with pytest.raises(ValueError, match="transport is for v5 and transformer, not for v4: remove it"):
            ModelConfig.model_validate({"preset": "v4", "transport": True, **integrator})
        with pytest.raises(ValueError, match="stream is for v5"):
            ModelConfig.model_validate({"preset": "v4", "stream": {}, **integrator})
    with pytest.raises(ValueError, match="the v5 preset has no integrator"):
        ModelConfig.model_validate({"preset": "v5", "integrator": {"early_stopping": {"convergence_threshold": 0.1}}})
