"""Generation against the same model run without cache, without batch and without early stopping."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from inl_core.errors import NonFiniteError, RecipeError
from inl_core.inference.decoding import Decoder
from inl_core.inference.generate import Completion, GenerationSettings, generate, stream, token_texts
from inl_core.model import IntegratorLanguageModel, Options
from tests.inference.tiny import PRESETS, tiny_model, tokenizer

# The penalty keeps a random model from repeating one token for ever.
GREEDY = GenerationSettings(max_new_tokens=24, temperature=0, repetition_penalty=1.3)
PROMPTS = ["def greet(", "", "The quick brown fox jumps over", "\u3053\u3093"]


def prompt_ids(prompt: str) -> list[int]:
    return [tokenizer().bos_id, *tokenizer().encode(prompt)]


@torch.no_grad()
def greedy_without_cache(model: IntegratorLanguageModel, prompt: str, number: int) -> list[int]:
    """The most probable allowed token, from the whole text, again and again."""
    banned = [id for id in tokenizer().special_ids.values() if id != tokenizer().eos_id]
    ids = prompt_ids(prompt)
    start = len(ids)
    while len(ids) < start + number and ids[-1] != tokenizer().eos_id:
        logits = model.logits(model(torch.tensor([ids])).hidden[0, -1])
        for seen in set(ids):
            logits[seen] = logits[seen] / 1.3 if logits[seen] > 0 else logits[seen] * 1.3
        logits[banned] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[start:]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("prompt", PROMPTS[:2])
def test_cached_greedy_tokens_equal_uncached_ones(preset: str, prompt: str) -> None:
    model = tiny_model(preset).double()  # so that no rounding decides
    (completion,) = generate(model, tokenizer(), [prompt], GREEDY)
    assert list(completion.token_ids) == greedy_without_cache(model, prompt, 24)
    assert len(set(completion.token_ids)) > 3  # a model stuck on one token would prove nothing


@pytest.mark.parametrize("preset", PRESETS)
@torch.no_grad()
def test_cached_logits_equal_uncached_ones(preset: str) -> None:
    model = tiny_model(preset)
    ids = torch.randint(6, model.vocab_size, (3, 30), generator=torch.Generator().manual_seed(0))
    whole = model.logits(model(ids).hidden)
    cache = model.new_cache(3, 30)
    parts = [model(part, cache=cache) for part in (ids[:, :11], *ids[:, 11:].split([1, 1, 4, *[1] * 13], dim=1))]
    found = torch.cat([model.logits(part.hidden) for part in parts], dim=1)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("positions", ["rope", "sinusoidal"])  # rope alone would not notice shifted positions
@torch.no_grad()
def test_padded_logits_equal_those_of_the_row_alone(preset: str, positions: str) -> None:
    model = tiny_model(preset, positions=positions)
    rows = [prompt_ids(prompt) for prompt in PROMPTS]
    width = max(map(len, rows))
    cache = model.new_cache(len(rows), width + 1)
    cache.padding = torch.tensor([width - len(row) for row in rows])
    padded = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    steps = [model(padded, cache=cache).hidden[:, -1], model(torch.full((len(rows), 1), 77), cache=cache).hidden[:, -1]]
    for index, row in enumerate(rows):
        alone = model.logits(model(torch.tensor([[*row, 77]])).hidden[0, -2:])
        found = torch.stack([model.logits(step[index]) for step in steps])
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "settings",
    [
        GREEDY,
        GenerationSettings(max_new_tokens=8, temperature=1.0, top_p=0.95, num_samples=3),
        GenerationSettings(
            max_new_tokens=500, temperature=1.0, batch_size=3, num_samples=2
        ),  # to the end of the context
    ],
)
def test_a_row_in_a_batch_is_the_row_alone(preset: str, settings: GenerationSettings) -> None:
    model = tiny_model(preset, max_seq_len=32).double()  # so that no rounding decides a draw
    together = generate(model, tokenizer(), PROMPTS, settings)
    alone = [completion for prompt in PROMPTS for completion in generate(model, tokenizer(), [prompt], settings)]
    assert [replace(completion, prompt_index=0) for completion in together] == alone
    assert [completion.prompt for completion in together] == [p for p in PROMPTS for _ in range(settings.num_samples)]


def test_the_batch_size_changes_no_text() -> None:
    model, settings = tiny_model("v4").double(), GenerationSettings(max_new_tokens=12, num_samples=2)
    assert generate(model, tokenizer(), PROMPTS, settings) == generate(
        model, tokenizer(), PROMPTS, replace(settings, batch_size=1)
    )


def test_seeds_samples_and_repeated_prompts_draw_apart_and_again_alike() -> None:
    model = tiny_model("v4").double()  # so that no rounding decides a draw

    def texts(prompts: list[str], **changes: Any) -> list[str]:
        settings = GenerationSettings(max_new_tokens=12, temperature=1.0, **changes)
        return [completion.text for completion in generate(model, tokenizer(), prompts, settings)]

    assert texts(["a"]) == texts(["a"])
    assert texts(["a"], seed=1) != texts(["a"])
    assert len(set(texts(["a"], num_samples=4))) == 4
    assert texts(["a", "a"]) == texts(["a"], num_samples=2)


THRESHOLDS = {"v3": 0.4, "v4": 0.8}  # some tokens stop early, others do not


def stopping_model(preset: str, threshold: float) -> IntegratorLanguageModel:
    changes = {"num_iterations": 6, "early_stopping": {"convergence_threshold": threshold, "min_iterations": 2}}
    uniform = {"budget": {"strategy": "uniform"}}
    return tiny_model(preset, integrator=changes | uniform | ({"mu": {"group_size": 8}} if preset == "v3" else {}))


@pytest.mark.parametrize("preset", ["v3", "v4"])
def test_threshold_zero_and_early_stopping_off_give_the_same_tokens(preset: str) -> None:
    settings = GenerationSettings(max_new_tokens=12, temperature=1.0)
    runs: dict[str, list[Completion]] = {}
    for name, threshold, early_stopping in (
        ("zero", 0.0, True),
        ("off", THRESHOLDS[preset], False),
        ("never reached", 1e-30, True),
        ("on", THRESHOLDS[preset], True),
    ):
        model = stopping_model(preset, threshold).double()  # so that no rounding decides a draw
        runs[name] = generate(model, tokenizer(), PROMPTS, replace(settings, early_stopping=early_stopping))
    assert runs["zero"] == runs["off"] == runs["never reached"]
    assert all(used == 6 for completion in runs["off"] for used in completion.iterations)
    used = [used for completion in runs["on"] for used in completion.iterations]
    assert 2 <= min(used) < max(used) <= 6  # it does stop, token by token, and this test could fail


@pytest.mark.parametrize("preset", ["v3", "v4"])
@torch.no_grad()
def test_early_stopping_off_leaves_the_same_hidden_states(preset: str) -> None:
    ids = torch.tensor([prompt_ids(PROMPTS[2])])
    zero = stopping_model(preset, 0.0)(ids).hidden
    off = stopping_model(preset, THRESHOLDS[preset])(ids, options=Options(early_stopping=False)).hidden
    on = stopping_model(preset, THRESHOLDS[preset])(ids).hidden
    torch.testing.assert_close(off, zero, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(on, off, atol=1e-3)


def test_iterations_are_those_asked_for_and_change_the_text() -> None:
    model = tiny_model("v4")
    own = generate(model, tokenizer(), ["a"], GREEDY)[0]
    more = generate(model, tokenizer(), ["a"], replace(GREEDY, num_iterations=7))[0]
    assert set(own.iterations) == {2.0}
    assert set(more.iterations) == {7.0}
    assert own.token_ids != more.token_ids
    assert set(generate(tiny_model("transformer"), tokenizer(), ["a"], GREEDY)[0].iterations) == {0.0}


def test_pieces_join_to_the_completions() -> None:
    model, heard = tiny_model("v4"), {}
    settings = GenerationSettings(max_new_tokens=30, temperature=1.5, num_samples=2)
    for piece in stream(model, tokenizer(), PROMPTS, settings):
        key = piece.prompt_index, piece.sample_index
        heard[key] = heard.get(key, "") + piece.text
        if piece.completion:
            ids = [id for id in piece.completion.token_ids if id != tokenizer().eos_id]
            assert heard[key] == piece.completion.text == tokenizer().decode(ids)
            assert "".join(text for text, _ in token_texts(tokenizer(), piece.completion)) == heard[key]
    assert len(heard) == 8


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], IntegratorLanguageModel]:
    """A model that predicts the given tokens one after the other, whatever it reads."""

    def build(ids: list[int]) -> IntegratorLanguageModel:
        model, following = tiny_model("v4"), iter(ids)

        def logits(*_: object) -> torch.Tensor:
            return torch.nn.functional.one_hot(torch.tensor([next(following)]), model.vocab_size).float()

        monkeypatch.setattr(model, "logits", logits)  # after the prompt
        monkeypatch.setattr(Decoder, "logits", logits)  # after each token
        return model

    return build


def test_a_stop_string_ends_the_text_before_it_and_is_never_shown(scripted: Callable) -> None:
    model = scripted(tokenizer().encode("one two STOP three"))
    pieces = list(stream(model, tokenizer(), [""], replace(GREEDY, stop=("STOP", "four"))))
    completion = pieces[-1].completion
    assert completion is not None
    assert (completion.text, completion.finish_reason) == ("one two ", "stop")
    assert "".join(piece.text for piece in pieces) == "one two "
    assert tokenizer().decode(completion.token_ids).rstrip().endswith("STOP")
    assert "".join(text for text, _ in token_texts(tokenizer(), completion)) == "one two "


def test_a_beginning_of_a_stop_string_is_shown_once_it_is_decided(scripted: Callable) -> None:
    ids = [*tokenizer().encode("STO"), tokenizer().eos_id]
    (completion,) = generate(scripted(ids), tokenizer(), [""], replace(GREEDY, stop=("STOP",)))
    assert (completion.text, completion.finish_reason) == ("STO", "eos")
    assert completion.token_ids[-1] == tokenizer().eos_id


def test_no_piece_splits_a_character(scripted: Callable) -> None:
    text = "\U0001f600 \u3053 \u00fc"
    ids = [*tokenizer().encode(text), tokenizer().eos_id]
    pieces = [piece.text for piece in stream(scripted(ids), tokenizer(), [""], replace(GREEDY, max_new_tokens=99))]
    assert "".join(pieces) == text
    assert len(pieces) < len(ids) - 1


def test_a_character_left_unfinished_becomes_a_replacement(scripted: Callable) -> None:
    ids = tokenizer().encode("a\U0001f600")[:-1]
    (completion,) = generate(scripted(ids), tokenizer(), [""], replace(GREEDY, max_new_tokens=len(ids)))
    assert (completion.text, completion.finish_reason) == ("a\ufffd", "length")


def test_special_tokens_other_than_eos_are_never_chosen() -> None:
    settings = GenerationSettings(max_new_tokens=60, temperature=1e6, num_samples=16)
    completions = generate(tiny_model("transformer"), tokenizer(), [""], settings)
    special = set(tokenizer().special_ids.values())
    chosen = [token for completion in completions for token in completion.token_ids if token in special]
    assert chosen
    assert set(chosen) == {tokenizer().eos_id}
    assert all(c.finish_reason == ("eos" if c.token_ids[-1] == tokenizer().eos_id else "length") for c in completions)


def longest_prompt() -> str:
    """A prompt that with bos fills the context of 64 exactly."""
    return tokenizer().decode(tokenizer().encode("x#" * 63)[:63])


def test_a_full_context_ends_the_text() -> None:
    settings = replace(GREEDY, max_new_tokens=1000)
    (completion,) = generate(tiny_model("v4"), tokenizer(), ["x#x#"], settings)
    assert completion.finish_reason == "context"
    assert completion.prompt_tokens + len(completion.token_ids) == 64 + 1  # the last one is predicted, never read
    (completion,) = generate(tiny_model("v4"), tokenizer(), [longest_prompt()], settings)
    assert (completion.prompt_tokens, len(completion.token_ids)) == (64, 1)


def test_a_prompt_longer_than_the_context_is_refused_before_anything_is_generated() -> None:
    with pytest.raises(RecipeError, match=r"prompt 2: 65 tokens .* context holds 64; shorten it by 1 "):
        stream(tiny_model("v4"), tokenizer(), ["a", longest_prompt() + "x"], GREEDY)


def test_a_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"the prompt: not UTF-8 text \(at character 1\)"):
        stream(tiny_model("v4"), tokenizer(), ["a\udcff"], GREEDY)


def test_a_prompt_may_begin_without_the_token_that_begins_a_document() -> None:
    model, ids = tiny_model("v5").double(), tokenizer().encode(PROMPTS[0])
    settings = replace(GREEDY, bos=False, repetition_penalty=1.0, max_new_tokens=1)
    (completion,) = generate(model, tokenizer(), [PROMPTS[0]], settings)
    banned = sorted(set(tokenizer().special_ids.values()) - {tokenizer().eos_id})
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([ids])).hidden[0, -1])
    logits[banned] = -torch.inf
    assert completion.token_ids == (int(logits.argmax()),)
    assert completion.prompt_tokens == len(ids)
    assert completion.prompt_tokens + 1 == generate(model, tokenizer(), [PROMPTS[0]], GREEDY)[0].prompt_tokens
    with pytest.raises(RecipeError, match="the prompt: is empty, and without the beginning-of-text token"):
        generate(model, tokenizer(), [""], settings)


def test_a_diverged_model_is_named() -> None:
    model = tiny_model("v4")
    with torch.no_grad():
        next(model.norm_final.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="diverged"):
        generate(model, tokenizer(), ["a"], GREEDY)


def test_the_model_is_left_in_the_mode_it_came_in() -> None:
    model = stopping_model("v4", THRESHOLDS["v4"]).train()
    completion = generate(model, tokenizer(), ["a"], GREEDY)[0]
    assert model.training
    assert min(completion.iterations) < 6  # generated in evaluation mode


def test_more_completions_than_memory_holds_are_refused() -> None:
    settings = GenerationSettings(num_samples=10_000)
    with pytest.raises(RecipeError, match="110,000 completions at once, above 100,000"):
        stream(tiny_model("v4"), tokenizer(), ["a"] * 11, settings)
