"""The decoding step against the model's own forward pass, eager and compiled."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TensorifyScalarRestartAnalysis

from inl_core.errors import ExecutionWarning
from inl_core.inference import decoding, linear_layouts
from inl_core.inference.decoding import Decoder
from inl_core.inference.generate import GenerationSettings, generate
from inl_core.inference.linear_layouts import ReorderedLinear, SharedLinear, SummedLinear, laid_out
from inl_core.kernels import compilation
from inl_core.kernels.cpu.library import find_compilers
from inl_core.model import IntegratorLanguageModel, Options
from inl_core.model.dynamics import Dynamics
from tests.inference.tiny import tiny_model, tokenizer

CHANGES: dict[str, dict[str, Any]] = {
    "v1": {},
    "v2": {"embedding_rank": 16, "integrator": {"mu": {"form": "hierarchical", "group_size": 8}}},
    "v3": {"integrator": {"num_iterations": 3, "mu": {"group_size": 8}, "budget": {"strategy": "uniform"}}},
    "v4": {},
    "transformer": {},
    "v5": {},
}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *CHANGES.items(),
    ("v4", {"tie_head": False, "positions": "sinusoidal", "norm": "layernorm", "bias": True}),
    ("v4", {"integrator": {"candidate": "none", "iterations_per_layer": [3, 1], "beta_max": None}}),
    ("v4", {"integrator": {"controller": {"modulation": "channel", "activation": "tanh"}, "dynamic_alpha": False}}),
    ("v4", {"embedding_rank": 16, "integrator": {"controller": {"shared": False}, "excitation": {"sparsity": 0.2}}}),
]
OTHERS: list[dict[str, Any]] = [
    {"integrator": {"controller": {"experts": 2}}},
    {"integrator": {"budget": {"strategy": "learned"}}},
]


def random_ids(model: IntegratorLanguageModel, rows: int, length: int) -> Tensor:
    return torch.randint(6, model.vocab_size, (rows, length), generator=torch.Generator().manual_seed(1))


def step_by_step(decoder: Decoder, ids: Tensor, *, prompt: int, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Logits (B, S - prompt + 1, V) and iterations (B, S - prompt + 1) of the tokens from the prompt's last on."""
    with torch.inference_mode():
        slots = decoder.new_cache(*ids.shape)
        slots.padding = padding
        found = [decoder.prefill(ids[:, :prompt], slots)]
        found += [decoder.step(ids[:, place], slots) for place in range(prompt, ids.shape[1])]
        logits = torch.stack([predicted.logits for predicted in found], dim=1)
    return logits, torch.stack([predicted.iterations for predicted in found], dim=1)


@pytest.fixture
def reordering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every matrix in oneDNN's layout, however small."""
    monkeypatch.setattr(linear_layouts, "_FEWEST_MEASURED", 0)
    monkeypatch.setattr(linear_layouts, "fastest", lambda ways: "reordered")


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize(
    ("seconds", "eager", "compiled"),
    [
        ({"as it is": 2.0, "reordered": 1.0, "sum": 1.02}, ReorderedLinear, SummedLinear),
        ({"as it is": 1.0, "reordered": 1.1, "sum": 2.0}, SharedLinear, SharedLinear),
        ({"as it is": 1.0, "reordered": 0.9, "sum": 1.0}, ReorderedLinear, ReorderedLinear),
    ],
)
def test_large_matrices_take_the_layout_that_is_clearly_the_fastest_here(
    monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], eager: type, compiled: type
) -> None:
    monkeypatch.setattr(linear_layouts, "_FEWEST_MEASURED", 32 * 300)
    monkeypatch.setattr(linear_layouts, "_seconds", lambda *_: seconds)
    large, small = torch.zeros(300, 32), torch.zeros(32, 32)
    assert type(laid_out(large, None, one_row=False)) is eager
    assert type(laid_out(large, None, one_row=True)) is compiled
    assert type(laid_out(small, None, one_row=False)) is SharedLinear
    assert type(laid_out(small, None, one_row=True)) is SummedLinear


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_each_layout_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_layouts, "_MEASURED", (64, 32))
    assert all(0 < seconds < 60 for seconds in linear_layouts.measure(("as it is", "reordered")).values())


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("preset", "changes"), VARIANTS)
@pytest.mark.usefixtures("reordering")
@torch.no_grad()
def test_a_step_at_a_time_gives_the_whole_text_s_logits(preset: str, changes: dict[str, Any], rows: int) -> None:
    model = tiny_model(preset, **changes)
    ids = random_ids(model, rows, 12)
    found, _ = step_by_step(Decoder(model, Options(early_stopping=False), rows=rows), ids, prompt=5)
    whole = model.logits(model(ids, options=Options(early_stopping=False)).hidden[:, 4:])
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("changes", OTHERS)
@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_mixtures_and_budgets_decode_too(changes: dict[str, Any]) -> None:
    model = tiny_model("v4", **changes)
    ids = random_ids(model, 2, 9)
    found, _ = step_by_step(Decoder(model, Options(), rows=len(ids), compiled=True), ids, prompt=5)
    torch.testing.assert_close(found, model.logits(model(ids).hidden[:, 4:]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("preset", "positions"), [("v4", "rope"), ("v4", "sinusoidal"), ("v5", "rope")])
@torch.no_grad()
def test_a_padded_row_s_logits_are_the_row_s_alone(preset: str, positions: str) -> None:
    model = tiny_model(preset, positions=positions)
    ids, padding = random_ids(model, 3, 12), torch.tensor([0, 4, 2])
    found, _ = step_by_step(Decoder(model, Options(), rows=len(ids)), ids, prompt=6, padding=padding)
    for row, skipped in enumerate(padding.tolist()):
        alone = model.logits(model(ids[row : row + 1, skipped:]).hidden[0, 5 - skipped :])
        torch.testing.assert_close(found[row], alone, atol=1e-5, rtol=1e-5)


def stopping_model(preset: str, min_iterations: int) -> IntegratorLanguageModel:
    threshold = {"v3": 0.25, "v4": 0.5}[preset]
    stopping = {"convergence_threshold": threshold, "min_iterations": min_iterations}
    changes = CHANGES[preset].get("integrator", {}) | {"num_iterations": 6, "early_stopping": stopping}
    return tiny_model(preset, integrator=changes).double()


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("min_iterations", [1, 3, 6])
@pytest.mark.parametrize("preset", ["v3", "v4"])
@torch.no_grad()
def test_tokens_stop_where_the_model_s_own_integrator_stops_them(preset: str, min_iterations: int, rows: int) -> None:
    model = stopping_model(preset, min_iterations)
    ids = random_ids(model, rows, 24)
    found, used = step_by_step(Decoder(model, Options(), rows=len(ids)), ids, prompt=4)
    whole = model(ids)
    torch.testing.assert_close(found, model.logits(whole.hidden[:, 3:]), atol=1e-6, rtol=1e-6)
    assert torch.equal(used, whole.iterations()[:, 3:])
    assert (used.min() < 6) == (min_iterations < 6)  # some stop early, unless none may


def test_a_single_row_runs_no_iteration_after_it_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = [], Dynamics.step_with_gains

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments)

    model = stopping_model("v4", 1)
    ids = random_ids(model, 1, 24)
    decoder = Decoder(model, Options(), rows=len(ids))
    with torch.inference_mode():
        slots = decoder.new_cache(*ids.shape)
        decoder.prefill(ids[:, :4], slots)
        monkeypatch.setattr(Dynamics, "step_with_gains", counted)
        used = [decoder.step(ids[:, place], slots).iterations for place in range(4, 24)]
    assert len(calls) == int(torch.stack(used).sum() * 2)  # two layers
    assert len(calls) < 20 * 2 * 6


def test_decoding_does_not_change_the_model() -> None:
    model = tiny_model("v4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step_by_step(Decoder(model, Options(), rows=1), random_ids(model, 1, 9), prompt=4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.fixture(params=["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`eager` traces the same graphs with the same guards, and runs them without generating code."""
    torch._dynamo.reset()
    compilation.compiled_for.cache_clear()
    if request.param == "eager":
        monkeypatch.setattr(compilation, "generate_code", lambda graph, inputs: graph.forward)
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("compiler", "reordering")
@pytest.mark.parametrize("is_whole", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("preset", ["v3", "v4", "v5", "transformer"])
@torch.no_grad()
def test_the_compiled_step_is_the_model_s_and_compiles_nothing_after_its_first_token(
    monkeypatch: pytest.MonkeyPatch, preset: str, rows: int, is_whole: bool
) -> None:
    if not is_whole:
        monkeypatch.setattr(decoding, "_MOST_REPEATED", 0)
    model = tiny_model(preset, **CHANGES[preset])
    ids = random_ids(model, rows, 24)
    decoder = Decoder(model, Options(), rows=len(ids), compiled=True)
    step_by_step(decoder, ids[:, :6], prompt=5)
    with torch.compiler.set_stance("fail_on_recompile"):
        found, _ = step_by_step(decoder, ids, prompt=5)
    torch.testing.assert_close(found, model.logits(model(ids).hidden[:, 4:]), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(
    not find_compilers() or torch.backends.cpu.get_cpu_capability() == "DEFAULT",
    reason="no C++ compiler, or no vectors: what torch 2.13 generates without them does not compile",
)
@pytest.mark.parametrize(
    ("preset", "changes"),
    [("v5", {}), pytest.param("transformer", {"transport": True}, marks=pytest.mark.slow)],
)
@torch.no_grad()
def test_rows_of_one_length_are_decoded_by_generated_code(preset: str, changes: dict[str, Any], recwarn) -> None:
    """No padding, more than one row, matrices as torch has them: the compiler is left its choice of what to fuse."""
    torch._dynamo.reset()
    compilation.compiled_for.cache_clear()
    model = tiny_model(preset, num_layers=1, **changes)
    ids = random_ids(model, 2, 9)
    found, _ = step_by_step(Decoder(model, Options(), rows=2, compiled=True), ids, prompt=6)
    torch.testing.assert_close(found, model.logits(model(ids).hidden[:, 5:]), atol=1e-5, rtol=1e-5)
    assert not [warning for warning in recwarn if issubclass(warning.category, ExecutionWarning)]


@torch.no_grad()
def test_a_compiler_that_fails_is_warned_of_and_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate_code(graph: torch.fx.GraphModule, inputs: list[Any]) -> None:
        raise RuntimeError("no space left\nand more")

    torch._dynamo.reset()
    compilation.compiled_for.cache_clear()
    monkeypatch.setattr(compilation, "generate_code", generate_code)
    model = tiny_model("v5")
    ids = random_ids(model, 2, 9)
    with pytest.warns(ExecutionWarning, match="compiled for decoding, but that failed: no space left; it runs uncomp"):
        found, _ = step_by_step(Decoder(model, Options(), rows=2, compiled=True), ids, prompt=6)
    torch.testing.assert_close(found, model.logits(model(ids).hidden[:, 5:]), atol=1e-5, rtol=1e-5)
    torch._dynamo.reset()


def test_what_torch_asks_of_itself_by_an_exception_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate_code(graph: torch.fx.GraphModule, inputs: list[Any]) -> None:
        raise TensorifyScalarRestartAnalysis

    monkeypatch.setattr(compilation, "generate_code", generate_code)
    kind = compilation._Kind(Decoder._step, "decoding", any_shape=False, is_fixed=False)
    with pytest.raises(TensorifyScalarRestartAnalysis):
        kind._generate(torch.fx.symbolic_trace(torch.nn.Identity()), [])


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("preset", ["v4", "v5", "transformer"])
@torch.no_grad()
def test_another_model_of_the_same_shapes_is_decoded_by_the_same_code(preset: str) -> None:
    first, second = tiny_model(preset, seed=0), tiny_model(preset, seed=1)
    ids = random_ids(first, 1, 9)
    step_by_step(Decoder(first, Options(), rows=1, compiled=True), ids, prompt=5)
    with torch.compiler.set_stance("fail_on_recompile"):
        found, _ = step_by_step(Decoder(second, Options(), rows=1, compiled=True), ids, prompt=5)
    torch.testing.assert_close(found, second.logits(second(ids).hidden[:, 4:]), atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("compiler")
@torch.no_grad()
def test_compiled_and_stopping_early_compiles_nothing_after_its_first_token() -> None:
    model = stopping_model("v4", 1)
    ids = random_ids(model, 1, 24)
    decoder = Decoder(model, Options(), rows=len(ids), compiled=True)
    step_by_step(decoder, ids[:, :6], prompt=5)
    with torch.compiler.set_stance("fail_on_recompile"):
        found, used = step_by_step(decoder, ids, prompt=5)
    whole = model(ids)
    torch.testing.assert_close(found, model.logits(whole.hidden[:, 4:]), atol=1e-6, rtol=1e-6)
    assert torch.equal(used, whole.iterations()[:, 4:])


@pytest.mark.usefixtures("compiler")
def test_compiled_rows_end_one_by_one_as_uncompiled_ones_do() -> None:
    settings = GenerationSettings(max_new_tokens=40, temperature=1.0, num_samples=3, stop=("e", "x"))
    model = tiny_model("v4").double()  # so that no rounding decides a draw
    plain = generate(model, tokenizer(), ["def greet(", "The"], settings)
    found = generate(model, tokenizer(), ["def greet(", "The"], replace(settings, compiled=True))
    assert [completion.text for completion in found] == [completion.text for completion in plain]
    assert len({len(completion.token_ids) for completion in plain}) > 2


@pytest.mark.parametrize(("preset", "positions"), [("v4", "rope"), ("v4", "sinusoidal"), ("v5", "rope")])
@pytest.mark.usefixtures("compiler")
def test_a_compiled_row_that_fills_the_context_does_not_stop_shorter_ones(preset: str, positions: str) -> None:
    model = tiny_model(preset, positions=positions, max_seq_len=24)
    settings = GenerationSettings(max_new_tokens=60, temperature=0.0)
    prompts = ["def greet(name): retu", "The", "T"]
    wanted = generate(model, tokenizer(), prompts, settings)
    found = generate(model, tokenizer(), prompts, replace(settings, compiled=True))
    assert [row.finish_reason for row in wanted[:2]] == ["context"] * 2
    assert [row.token_ids for row in found] == [row.token_ids for row in wanted]
