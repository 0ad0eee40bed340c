"""The language model: causality, document masks, heads, initialisation, presets."""

import math

import pytest
import torch

from inl_core.model import IntegratorLanguageModel, Options
from inl_core.recipe import ModelConfig

PRESETS = ("v1", "v2", "v3", "v4", "v5", "transformer")
VOCAB = 97


def build(preset: str = "v4", seed: int = 0, **changes) -> IntegratorLanguageModel:
    """A small model in float64 whose every parameter has been perturbed, so that nothing is trivially zero or equal."""
    base = {"d_model": 64, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "vocab_size": VOCAB, "max_seq_len": 64}
    model = IntegratorLanguageModel(ModelConfig.model_validate({"preset": preset} | base | changes)).double()
    model.initialise(seed)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def some_ids(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_later_token_changes_no_earlier_logit(preset):
    model, ids = build(preset), some_ids()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % VOCAB
    one, two = model.logits(model(ids).hidden), model.logits(model(changed).hidden)
    torch.testing.assert_close(one[:, :7], two[:, :7], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(one[:, 7:], two[:, 7:])


@pytest.mark.parametrize("preset", PRESETS)
def test_under_the_mask_a_document_is_computed_as_if_alone(preset):
    model, ids = build(preset), some_ids()
    documents = torch.tensor([0] * 5 + [1] * 7).expand(2, 12)
    positions = torch.tensor([*range(5), *range(7)]).expand(2, 12)
    packed = model.logits(model(ids, document_ids=documents, positions=positions).hidden)
    alone = model.logits(model(ids[:, 5:]).hidden)
    torch.testing.assert_close(packed[:, 5:], alone, rtol=1e-9, atol=1e-9)
    changed = ids.clone()
    changed[:, 2] = (changed[:, 2] + 1) % VOCAB
    again = model.logits(model(changed, document_ids=documents, positions=positions).hidden)
    torch.testing.assert_close(packed[:, 5:], again[:, 5:], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(packed[:, 2:5], again[:, 2:5])


def test_the_low_rank_head_is_the_transpose_of_the_embedding():
    model = build("v3")
    dense = model.embedding.table.weight @ model.embedding.project_up.weight.T  # (V, D)
    hidden = model(some_ids()).hidden
    torch.testing.assert_close(model.logits(hidden), (hidden @ dense.T).float(), rtol=1e-5, atol=1e-5)
    assert model.embedding.table.weight.shape == (VOCAB, 64)


@pytest.mark.parametrize("preset", PRESETS)
def test_the_start_depends_on_the_seed_alone_and_survives_the_meta_device(preset):
    config = ModelConfig(preset=preset, d_model=64, num_layers=2, num_heads=4, vocab_size=VOCAB)
    plain = IntegratorLanguageModel(config)
    plain.initialise(3)
    with torch.device("meta"):
        late = IntegratorLanguageModel(config)
    late.to_empty(device="cpu")
    torch.manual_seed(123)
    late.initialise(3)
    assert list(plain.state_dict()) == list(late.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, late.state_dict()[name]), name
    assert torch.equal(plain(some_ids()).hidden, late(some_ids()).hidden)


def test_the_start_values_of_alpha_beta_and_gate_are_the_configured_ones():
    config = ModelConfig(preset="v4", d_model=64, num_layers=2, num_heads=4, vocab_size=VOCAB)
    model = IntegratorLanguageModel(config)
    model.initialise(0)
    with torch.no_grad():
        model.controller.output.weight.zero_()
    output = model(some_ids(), options=Options(keep_trajectory=True))
    path = output.layers[0].trajectory
    integrator = config.integrator
    size = (path.states[:-1] - 0.0).square().mean(-1, keepdim=True).sqrt()
    expected = integrator.init_alpha * (1 - torch.exp(-integrator.kappa * size))
    torch.testing.assert_close(path.alpha, expected.expand_as(path.alpha), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(path.beta, torch.full_like(path.beta, integrator.init_beta), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(path.gate, torch.full_like(path.gate, integrator.init_gate), rtol=1e-5, atol=1e-6)


def test_the_velocity_is_carried_through_depth_only_when_configured():
    ids = some_ids()
    carried, rest = build(integrator={"carry_velocity": True}), build(integrator={"carry_velocity": False})
    rest.load_state_dict(carried.state_dict())
    one, two = (model(ids, options=Options(keep_trajectory=True)) for model in (carried, rest))
    assert torch.equal(one.layers[1].trajectory.velocities[0], one.layers[0].velocity)
    assert not two.layers[1].trajectory.velocities[0].any()
    assert not torch.allclose(one.hidden, two.hidden)


def test_rotary_attention_depends_on_relative_positions_only():
    model, ids = build("transformer"), some_ids()
    shifted = model(ids, positions=torch.arange(12).expand(2, 12) + 20).hidden
    torch.testing.assert_close(model(ids).hidden, shifted, rtol=1e-5, atol=1e-5)


def closed_formula(config: ModelConfig) -> int:
    """Parameters of a model, counted by hand from the equations."""
    d, layers, f = config.d_model, config.num_layers, config.hidden_dim
    kv, bias = config.key_value_heads * config.head_dim, int(config.bias)
    norm = (2 if config.norm == "layernorm" and config.bias else 1) * d
    embedding = config.vocab_size * d if config.rank is None else (config.vocab_size + d) * config.rank
    attention = d * (d + 2 * kv) + d * d + bias * (2 * d + 2 * kv)
    feed_forward = 3 * d * f if config.feed_forward == "swiglu" else 2 * d * f + bias * (f + d)
    block = attention + feed_forward + norm
    total = embedding + norm
    integrator = config.integrator
    if integrator is None:  # v5: b of the embedding; alpha, b, r, beta, mu, gamma, phi after each sub-layer
        return total + layers * (block + norm) + ((1 + 7 * 2 * layers) * d if config.preset == "v5" else 0)
    groups, c = 4 if integrator.candidate == "controller" else 3, integrator.controller.width
    controller = 3 * d * c + c + groups * d * c
    mu = d if integrator.mu.form == "per_dim" else 1 + d // integrator.mu.group_size
    excited = max(1, math.floor(d * integrator.excitation.sparsity))
    extra = norm + mu + 2 * excited + groups  # norm_state, mu, gamma and phi, bias
    extra += d if integrator.readout == "delta" else 0  # layer_gain
    extra += 0 if integrator.candidate == "feed_forward" else norm  # the third norm
    extra += groups if integrator.controller.shared else controller  # scale, or a controller of the layer's own
    total += layers if integrator.budget.strategy in ("learned", "hybrid") else 0
    return total + layers * (block + extra) + (controller if integrator.controller.shared else 0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("d_model", "num_layers"), [(128, 4), (512, 6)])
def test_parameter_counts_equal_a_closed_formula(preset, d_model, num_layers):
    config = ModelConfig(
        preset=preset, d_model=d_model, num_layers=num_layers, num_heads=8, num_kv_heads=2, vocab_size=2048
    )
    with torch.device("meta"):
        model = IntegratorLanguageModel(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == closed_formula(config)


def test_v4_and_the_transformer_have_equal_parameters_within_two_percent():
    counts = []
    for preset in ("v4", "transformer"):
        config = ModelConfig(preset=preset, d_model=128, num_layers=4, num_heads=4, num_kv_heads=2, vocab_size=2048)
        with torch.device("meta"):
            counts.append(sum(parameter.numel() for parameter in IntegratorLanguageModel(config).parameters()))
    assert abs(counts[0] / counts[1] - 1) < 0.02
