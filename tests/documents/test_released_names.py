"""The names of the released code and of transformers do what they do there, or are refused by name."""

import pytest
import torch
from torch.nn import functional

from inl_core import IntegratorLanguageModel
from inl_core.documents.language_model import UltraOptimizedIntegratorLanguageModel
from inl_core.recipe import ModelConfig

IDS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))


def small(preset="v3", **arguments):
    return IntegratorLanguageModel(50, d_model=64, num_layers=2, max_seq_len=32, preset=preset, **arguments).eval()


def test_labels_give_the_loss_of_the_next_tokens():
    model, labels = small(), IDS.clone()
    labels[0, :4] = -100
    loss, logits, aux = model(input_ids=IDS, labels=labels)
    assert aux is None
    torch.testing.assert_close(logits, model(IDS)[0])
    chosen = [
        -functional.log_softmax(logits[row, place], -1)[labels[row, place + 1]]
        for row in range(2)
        for place in range(8)
        if labels[row, place + 1] != -100
    ]
    torch.testing.assert_close(loss, torch.stack(chosen).mean())


def test_ids_are_given_by_one_name():
    model = small()
    with pytest.raises(ValueError, match="once, as ids or as input_ids"):
        model()
    with pytest.raises(ValueError, match="once, as ids or as input_ids"):
        model.generate(IDS, input_ids=IDS)
    with pytest.raises(ValueError, match=r"ids \(9,\): expected \(B, S\)"):
        model(input_ids=IDS[0])
    with pytest.raises(ValueError, match=r"labels \(2, 4\): expected the shape of the ids, \(2, 9\)"):
        model(IDS, labels=IDS[:, :4])
    with pytest.raises(ValueError, match="meta device"):
        small(device="meta").generate(IDS.to("meta"))


def test_generation_by_the_names_of_transformers():
    model = small()
    greedy = model.generate(IDS, max_new_tokens=6, temperature=0.0)
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=6, do_sample=False), greedy)
    assert torch.equal(model.generate(input_ids=IDS, max_new_tokens=6, min_p=1.0), greedy)
    assert not torch.equal(model.generate(input_ids=IDS, max_new_tokens=6, temperature=3.0), greedy)


def test_parameters_are_counted_and_the_device_is_known():
    model = small()
    assert model.get_num_params() == sum(parameter.numel() for parameter in model.parameters())
    assert model.device == torch.device("cpu")
    assert small(device="meta").device == torch.device("meta")


def test_the_released_constructors_arguments_are_the_keys_they_are_here():
    model = UltraOptimizedIntegratorLanguageModel(
        50,
        d_model=64,
        num_layers=2,
        max_seq_len=32,
        dropout=0.0,
        adaptive_convergence_threshold=0.02,
        hierarchical_group_size=16,
        excitation_sparsity=0.25,
        use_shared_controllers=False,
        rope_base=500.0,
        use_adaptive_budget=False,
        budget_strategy="hybrid",
    )
    config = model.config
    assert config.integrator
    assert config.integrator.early_stopping.convergence_threshold == 0.02
    assert (config.integrator.mu.group_size, config.integrator.excitation.sparsity) == (16, 0.25)
    assert (config.integrator.controller.shared, config.rope_theta) == (False, 500.0)
    assert config.integrator.budget.strategy == "uniform"
    placed = IntegratorLanguageModel(50, 64, 2, 4, 3, 128, 32).config  # in the order of the released code
    assert placed.integrator
    assert (placed.num_heads, placed.integrator.num_iterations, placed.max_seq_len) == (4, 3, 32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dropout": 0.1}, "dropout 0.1: there is none here"),
        ({"budget_convergence_threshold": 0.1}, "budget_convergence_threshold: tokens stop by"),
        ({"hierarchical_group": 16}, "did you mean 'hierarchical_group_size'"),
        ({"hierarchical_group_size": 24}, "group_size 24 must divide d_model 64"),
        ({"hierarchical_group_size": 0}, "^hierarchical_group_size: expected a number greater than 0"),
        ({"adaptive_convergence_threshold": -1.0}, "^adaptive_convergence_threshold: expected a number of at least 0"),
        ({"use_adaptive_budget": "no"}, "use_adaptive_budget: expected True or False, got 'no'"),
        ({"num_head": 4}, "unknown argument 'num_head'; did you mean 'num_heads'"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.parametrize("width", [72, 96, 100, 200])
@pytest.mark.parametrize("preset", ["v1", "v2", "v3", "v4", "v5", "transformer"])
def test_any_width_works_with_the_default_heads_and_groups(preset, width):
    model = IntegratorLanguageModel(50, d_model=width, num_layers=1, max_seq_len=16, preset=preset)
    assert model(IDS)[0].isfinite().all()
    config = ModelConfig(preset=preset, d_model=width)
    assert width % config.num_heads == 0


def test_what_is_given_is_never_changed_to_fit():
    for keys, message in (({"num_heads": 7}, "num_heads 7 must"), ({"num_heads": 4}, "even head size, got 100/4")):
        with pytest.raises(ValueError, match=message):
            ModelConfig.model_validate({"preset": "v4", "d_model": 100} | keys)
    assert ModelConfig(preset="v4", d_model=96).num_heads == 4


@pytest.mark.parametrize("preset", ["v1", "v2", "v3", "v4", "v5", "transformer"])
def test_a_forward_pass_on_the_meta_device_gives_shapes(preset):
    from inl_core.model import IntegratorLanguageModel as Model

    with torch.device("meta"):
        model = Model(ModelConfig(preset=preset, d_model=64, num_layers=2, vocab_size=50, max_seq_len=32))
    assert model.logits(model(IDS.to("meta")).hidden).shape == (2, 9, 50)
