"""Log-probabilities of tokens, against a slow count of one prefix after the other in float64."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from inl_core.errors import NonFiniteError, RecipeError
from inl_core.inference.loading import LoadedModel
from inl_core.inference.scoring import score_texts, score_tokens
from tests.inference.tiny import TEXT, tiny_model, tokenizer

IDS = tokenizer().encode(TEXT * 3)
BOS = tokenizer().bos_id


def slow_scores(model, seen: list[int], token: int) -> tuple[float, bool]:
    """Log-probability of one token after `seen`, and whether it is the most probable one; one pass for one token."""
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([seen])).hidden)[0, -1].double()
    return float(logits[token] - logits.logsumexp(0)), int(logits.argmax()) == token


def assert_scores(found, expected: list[tuple[float, bool]]) -> None:
    np.testing.assert_allclose(found.log_probabilities, [value for value, _ in expected], atol=1e-4)
    assert found.is_best.tolist() == [best for _, best in expected]
    assert found.total == pytest.approx(sum(value for value, _ in expected), abs=1e-3)
    assert found.is_greedy == all(best for _, best in expected)


@pytest.mark.parametrize("preset", ["v3", "v4", "v5", "transformer"])
def test_batched_scores_are_those_of_one_prefix_after_the_other(preset: str) -> None:
    model = tiny_model(preset)
    best = int(model.logits(model(torch.tensor([[BOS, *IDS[:3]]])).hidden)[0, -1].argmax())
    pairs = [
        ([BOS], IDS[:40]),
        ([BOS, *IDS[:7]], IDS[7:19]),
        ([BOS, *IDS[:3]], [best]),  # these three share a row
        ([BOS, *IDS[:3]], IDS[3:4]),
        ([BOS], [*IDS[:3], IDS[9]]),
        ([BOS, *IDS[:5]], []),
    ]
    for batch_size in (1, 4, 16):
        for (context, wanted), found in zip(pairs, score_tokens(model, pairs, batch_size=batch_size), strict=True):
            assert found.ids == tuple(wanted)
            ids = [*context, *wanted]
            places = range(len(context), len(ids))
            assert_scores(found, [slow_scores(model, ids[:place], ids[place]) for place in places])


@pytest.mark.parametrize("preset", ["v4", "v5"])
def test_a_context_that_several_continuations_share_is_read_once(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = tiny_model(preset), 0
    forward = model.forward

    def counted(ids: torch.Tensor, **arguments: Any) -> Any:
        nonlocal read
        read += ids.numel()
        return forward(ids, **arguments)

    contexts = [[BOS, *IDS[:30]], [BOS, *IDS[5:25]], [BOS, *IDS[:54]]]
    answers = [IDS[30:31], IDS[40:45], IDS[60:62], IDS[70:78], IDS[3:4]]
    pairs = [(context, answer) for context in contexts for answer in answers]
    expected = []
    for context, answer in pairs:
        ids = [*context, *answer]
        expected.append([slow_scores(model, ids[:place], ids[place]) for place in range(len(context), len(ids))])
    monkeypatch.setattr(model, "forward", counted)
    for batch_size in (1, 2, 10, 99):
        for found, wanted in zip(score_tokens(model, pairs, batch_size=batch_size), expected, strict=True):
            assert_scores(found, wanted)
    read = 0
    score_tokens(model, pairs, batch_size=99)
    # Three contexts of at most 55 tokens, and of 15 answers at most 7 tokens before the last one.
    assert read == 3 * 55 + 15 * 7


def test_a_text_beyond_the_context_is_scored_whole_with_what_fits_before_each_token() -> None:
    model = tiny_model("v5")
    ids, longest = [BOS, *IDS[:150]], model.config.max_seq_len  # 64
    (continuation,) = score_tokens(model, [(ids[:100], ids[100:110])])
    first = 109 - longest  # the row that ends before the last token
    assert_scores(continuation, [slow_scores(model, ids[first:place], ids[place]) for place in range(100, 110)])
    (whole,) = score_tokens(model, [(ids[:1], ids[1:])])
    expected = []
    for place in range(1, len(ids)):  # 64 in the first window, then 32 in each
        end = 65 if place <= longest else min(len(ids), 65 + 32 * (1 + (place - 65) // 32))
        expected.append(slow_scores(model, ids[max(0, end - 1 - longest) : place], ids[place]))
    assert_scores(whole, expected)


def test_texts_are_scored_as_documents_and_as_continuations_of_contexts() -> None:
    loaded = LoadedModel(tiny_model("v5"), tokenizer(), Path(), {})
    encode = tokenizer().encode
    (alone,) = score_texts(loaded, ["The quick brown fox"])
    (expected,) = score_tokens(loaded.model, [([BOS], encode("The quick brown fox"))])
    np.testing.assert_array_equal(alone.log_probabilities, expected.log_probabilities)
    after, spaced = score_texts(loaded, [" brown fox", "brown fox"], ["The quick", "The quick "])
    ids, before = encode("The quick brown fox"), len(encode("The quick"))
    assert after.ids == spaced.ids == tuple(ids[before:])
    np.testing.assert_allclose(after.log_probabilities, alone.log_probabilities[before:], atol=1e-5)


def test_the_model_keeps_its_mode_and_bad_input_is_refused() -> None:
    model = tiny_model("v5").train()
    score_tokens(model, [([BOS], IDS[:4])])
    assert model.training
    with pytest.raises(RecipeError, match="pair 1: an empty context"):
        score_tokens(model, [([BOS], IDS[:4]), ([], IDS[:4])])
    for token in (-1, 100_000):
        with pytest.raises(RecipeError, match=f"pair 0: token {token} is not in the model's vocabulary"):
            score_tokens(model, [([BOS], [token])])
    with pytest.raises(RecipeError, match="1 contexts for 2 texts"):
        score_texts(LoadedModel(model, tokenizer(), Path(), {}), ["a", "b"], ["c"])
    with torch.no_grad():
        model.embedding.table.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="not finite"):
        score_tokens(model, [([BOS], IDS[:4])])
