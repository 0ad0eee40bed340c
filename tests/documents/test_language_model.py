"""The documents' language models: return values, switches, generation, creation by size."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inl_core
from inl_core import (
    IntegratorLanguageModel,
    IntegratorLoss,
    OptimizedIntegratorLanguageModel,
    UltraOptimizedIntegratorLanguageModel,
    create_model,
    create_optimized_model,
)
from inl_core.model import IntegratorLanguageModel as Model
from inl_core.recipe import ModelConfig
from inl_core.recipe.sizes import ALIASES, SIZES

VOCAB, LENGTH, STEPS = 61, 10, 3
CLASSES = {
    "v1": IntegratorLanguageModel,
    "v2": OptimizedIntegratorLanguageModel,
    "v3": UltraOptimizedIntegratorLanguageModel,
}
DIMENSIONS = {
    "d_model": 64,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "num_iterations_per_layer": STEPS,
    "feedforward_dim": 96,
    "max_seq_len": 32,
}


def build(preset: str = "v3", **changes) -> IntegratorLanguageModel:
    """A small model whose parameters are all moved a little, so that none of them is zero and has no effect."""
    model = CLASSES.get(preset, IntegratorLanguageModel)(VOCAB, preset=preset, **(DIMENSIONS | changes))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def some_ids(rows: int = 2, length: int = LENGTH, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def test_importing_the_package_imports_no_torch():
    script = "import sys, inl_core, inl_core.errors; dir(inl_core); print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"


def test_every_exported_name_can_be_imported_and_no_other():
    assert {getattr(inl_core, name).__name__ for name in inl_core.__all__} == set(inl_core.__all__)
    with pytest.raises(AttributeError, match="IntegratorModell"):
        _ = inl_core.IntegratorModell


@pytest.mark.parametrize("preset", CLASSES)
def test_the_function_is_the_wrapped_models(preset):
    model, ids = build(preset).eval(), some_ids()
    logits, aux = model(ids)
    assert aux is None
    assert logits.shape == (2, LENGTH, VOCAB)
    assert torch.equal(logits, model.model.logits(model.model(ids).hidden))
    config = ModelConfig.model_validate(
        {
            "preset": preset,
            "vocab_size": VOCAB,
            **{name: value for name, value in DIMENSIONS.items() if name != "num_iterations_per_layer"},
            "integrator": {"num_iterations": STEPS},
        }
    )
    plain = Model(config)
    plain.initialise(0)
    fresh = CLASSES[preset](VOCAB, **DIMENSIONS)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, fresh.model.state_dict()[name]), name


@pytest.mark.parametrize("preset", CLASSES)
def test_aux_holds_every_layers_trajectory(preset):
    model, ids = build(preset).train(), some_ids()
    _, aux = model(ids, return_aux=True)
    layers = model.model.integrators()
    assert aux["mu"].shape == (2, 64)
    assert torch.equal(aux["mu"], model.get_learned_mu())
    for index, (x, v, alpha, layer) in enumerate(zip(aux["x"], aux["v"], aux["alpha"], layers, strict=True)):
        assert x.shape == v.shape == (2, LENGTH, alpha.shape[2] + 1, 64)
        # The state moves by dt gate v (a budget may scale the last step): x, v and gate belong to the same iterations.
        moved = layer.config.dt * aux["gate"][index][:, :, :-1] * v[:, :, 1:-1]
        torch.testing.assert_close(x[:, :, 1:-1] - x[:, :, :-2], moved, rtol=1e-4, atol=1e-5)
    assert aux["iterations"].shape == (2, LENGTH)


@pytest.mark.parametrize("preset", CLASSES)
def test_the_cache_continues_a_text(preset):
    model, ids = build(preset).eval(), some_ids()
    whole, _ = model(ids)
    first, aux, cache = model(ids[:, :6], use_cache=True)
    assert aux is None
    second, aux, cache = model(ids[:, 6:], cache=cache, return_aux=True)
    assert len(aux["x"]) == 2
    assert cache.length == LENGTH
    torch.testing.assert_close(torch.cat((first, second), 1), whole, rtol=1e-4, atol=1e-4)
    assert not second.requires_grad


def test_a_text_beyond_the_context_is_refused():
    model = build()
    with pytest.raises(ValueError, match="33 tokens exceed the model's context, max_seq_len 32"):
        model(some_ids(length=33))
    _, _, cache = model(some_ids(length=30), use_cache=True)
    with pytest.raises(ValueError, match="33 tokens"):
        model(some_ids(length=3), cache=cache)


@pytest.mark.parametrize("preset", CLASSES)
def test_the_documents_training_step_reaches_every_parameter(preset):
    model = build(preset).train()
    logits, trajectory = model(some_ids(), return_aux=True)
    losses = IntegratorLoss()(logits, some_ids(seed=1), trajectory, epoch=0)
    losses["total"].backward()
    silent = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()
    ]
    assert silent == []


def saved_bytes_and_gradients(model) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that autograd keeps for the backward pass, and the gradients."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(some_ids())[0].logsumexp(-1).sum()
    loss.backward()
    return sum(kept.values()), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("preset", CLASSES)
def test_checkpointing_keeps_less_and_changes_no_gradient(preset):
    plain = saved_bytes_and_gradients(build(preset, use_gradient_checkpointing=False))
    recomputed = saved_bytes_and_gradients(build(preset, use_gradient_checkpointing=True))
    assert recomputed[0] < 0.7 * plain[0]
    assert plain[1].keys() == recomputed[1].keys()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(gradient, recomputed[1][name], rtol=1e-5, atol=1e-6)


def test_low_rank_embeddings_follow_their_switch_and_ratio():
    def shape(**changes):
        model = OptimizedIntegratorLanguageModel(VOCAB, 1024, 1, device="meta", **changes)
        return tuple(model.model.embedding.table.weight.shape)

    assert shape() == shape(use_lowrank_embeddings=True) == (VOCAB, 128)
    assert shape(lowrank_ratio=0.25) == (VOCAB, 256)
    assert shape(lowrank_ratio=0.01) == (VOCAB, 64)
    assert shape(use_lowrank_embeddings=False) == (VOCAB, 1024)
    first = IntegratorLanguageModel(VOCAB, 1024, 1, device="meta")
    assert first.model.embedding.project_up is None
    with pytest.raises(ValueError, match="lowrank_ratio 0"):
        shape(lowrank_ratio=0)


def test_adaptive_stopping_acts_in_eval_only_and_by_its_threshold():
    def iterations(training: bool, **changes) -> float:
        model = build("v2", **changes).train(training)
        return model(some_ids(), return_aux=True)[1]["iterations"].mean().item()

    assert iterations(False, convergence_threshold=1e9) == 1
    assert iterations(True, convergence_threshold=1e9) == STEPS
    assert iterations(False, convergence_threshold=1e9, use_adaptive_stopping=False) == STEPS
    assert iterations(False, convergence_threshold=1e-9) == STEPS
    assert build("v2").config.integrator.early_stopping.convergence_threshold == 0.001
    assert build("v1").config.integrator.early_stopping.convergence_threshold == 0
    assert build("v1", use_adaptive_stopping=True).config.integrator.early_stopping.convergence_threshold == 0.001


def test_the_amplitude_can_be_set_and_acts():
    model, ids = build().eval(), some_ids()
    before = model(ids)[0]
    model.excitation_amplitude = 0.5
    assert model.excitation_amplitude == 0.5
    assert not torch.equal(model(ids)[0], before)
    assert build(excitation_amplitude=0.25).excitation_amplitude == 0.25
    with pytest.raises(ValueError, match="excitation_amplitude nan"):
        model.excitation_amplitude = float("nan")


@pytest.mark.parametrize("preset", ["v1", "v2"])
def test_mu_takes_its_step_at_the_next_training_pass_only(preset):
    model, ids = build(preset, mu_adaptation_rate=0.25, use_gradient_checkpointing=True).train(), some_ids()
    before = model.get_learned_mu().detach()
    _, aux = model(ids, return_aux=True)
    means = torch.stack([x[:, :, -1].detach().mean((0, 1)) for x in aux["x"]])
    assert torch.equal(model.get_learned_mu(), before)
    model.eval()(ids)
    assert torch.equal(model.get_learned_mu(), before)
    model.train()(ids)
    target = means if preset == "v1" else means.mean(1, keepdim=True)  # 64 dimensions are one group
    torch.testing.assert_close(model.get_learned_mu(), 0.75 * before + 0.25 * target, rtol=1e-5, atol=1e-6)
    still = build(preset).train()
    start = still.get_learned_mu().detach()
    still(ids)
    still(ids)
    assert torch.equal(still.get_learned_mu(), start)


@pytest.mark.parametrize("preset", CLASSES)
@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20}])
def test_generation_is_the_same_with_and_without_a_cache(preset, settings):
    model = build(preset).double()
    one, two = (model.generate(some_ids(), 12, use_cache=cache, **settings) for cache in (True, False))
    assert one.shape == (2, LENGTH + 12)
    assert torch.equal(one[:, :LENGTH], some_ids())
    assert torch.equal(one, two)
    assert model.training


def test_greedy_generation_takes_the_most_probable_token():
    model, ids = build().double().eval(), some_ids()  # in float64 no rounding decides between two tokens
    found = model.generate(ids, 6, temperature=0)
    for _ in range(6):
        ids = torch.cat((ids, model(ids)[0][:, -1:].argmax(-1)), dim=1)
    assert torch.equal(found, ids)
    assert torch.equal(model.generate(some_ids(), 6, temperature=1.3, top_k=1), found)


def test_draws_depend_on_the_seed_and_the_row_alone():
    model, ids = build().double(), some_ids(3)  # in float64 no rounding decides a draw
    first = model.generate(ids, 12)
    torch.manual_seed(5)
    assert torch.equal(model.generate(ids, 12), first)
    beside_others = torch.cat((ids[:1], ids[1:].flip(1)))
    assert torch.equal(model.generate(beside_others, 12)[0], first[0])
    assert not torch.equal(model.generate(ids, 12, seed=1), first)
    model(first)[0].sum().backward()  # the ids are an ordinary tensor: they can be trained on


def test_a_row_ends_with_eos_and_the_text_with_its_last_row():
    model, ids = build().double(), some_ids(3)  # in float64 no rounding decides between two tokens
    free = model.generate(ids, 12, temperature=0)[:, LENGTH:]
    eos = int(free[0, 2])
    found = model.generate(ids, 12, temperature=0, eos_token_id=eos)[:, LENGTH:]
    for row, plain in zip(found, free, strict=True):
        ends = (plain == eos).nonzero()
        stop = int(ends[0]) if len(ends) else len(plain)
        assert torch.equal(row[: stop + 1], plain[: min(stop + 1, len(row))])
        assert (row[stop:] == eos).all()
    assert model.generate(ids[:1], 12, temperature=0, eos_token_id=eos).shape[1] <= LENGTH + 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 24}, "set max_new_tokens to 23 or less"),
        ({"max_new_tokens": 0}, "max-new-tokens 0"),
        ({"temperature": -1.0}, "temperature -1"),
        ({"top_p": 1.5}, "top-p 1.5"),
        ({"top_k": 0}, "top-k 0"),
    ],
)
def test_bad_generation_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        build().generate(some_ids(), **({"max_new_tokens": 4} | arguments))


EVERY_SIZE = [("v2", size) for size in (*SIZES, *ALIASES)] + [(preset, "large") for preset in ("v1", "v3", "v4")]


@pytest.mark.parametrize(("preset", "size"), [*EVERY_SIZE, ("v3", "3072x32"), ("transformer", "small")])
def test_every_size_can_be_created_without_memory(preset, size):
    model = create_model(size, vocab_size=50_000, preset=preset, device="meta")
    recipe = ModelConfig.model_validate({"preset": preset, "size": size, "vocab_size": 50_000})
    assert model.config == recipe.model_copy(update={"embedding_rank": recipe.rank})
    assert isinstance(model, CLASSES.get(preset, IntegratorLanguageModel))
    assert all(parameter.is_meta for parameter in model.parameters())


def test_create_optimized_model_switches_all_three_optimisations():
    def switches(enabled: bool, **options):
        model = create_optimized_model("small", 1000, enable_all_optimizations=enabled, device="meta", **options)
        threshold = model.config.integrator.early_stopping.convergence_threshold
        return model.config.rank, threshold > 0, "forward" in vars(model.model.blocks[0])

    assert switches(True) == (64, True, True)
    assert switches(False) == (None, False, False)
    assert switches(False, use_adaptive_stopping=True) == (None, True, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": "smal"}, "unknown size 'smal'; did you mean 'small'\\? valid are small, medium, .*5B, 10B"),
        ({"size": "7b"}, "did you mean '7B'"),
        ({"size": "small", "preset": "v9"}, "unknown preset 'v9'"),
        ({"size": "small", "overrides": {"integrator": {"kapa": 1.0}}}, "integrator.kapa: .*did you mean 'kappa'"),
        ({"size": "small", "num_iterations_per_layer": 0}, "num_iterations_per_layer: expected"),
        ({"size": "small", "num_heads": 7}, "num_heads 7 must divide d_model 512"),
    ],
)
def test_a_bad_argument_names_the_valid_ones(arguments, message):
    with pytest.raises(ValueError, match=message):
        create_model(vocab_size=1000, device="meta", **arguments)


def test_overrides_win_over_everything():
    model = build(overrides={"integrator": {"dt": 0.25, "num_iterations": 2}, "norm_eps": 1e-4})
    assert (model.config.integrator.dt, model.config.num_iterations, model.config.norm_eps) == (0.25, 2, 1e-4)
