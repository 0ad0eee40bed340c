"""Filters and draws against a plain numpy reference."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from inl_core.errors import NonFiniteError, RecipeError
from inl_core.inference.sampling import Sampler, candidates, draw, penalise
from inl_core.inference.settings import GenerationSettings


def reference(logits: np.ndarray, settings: GenerationSettings) -> np.ndarray:
    """The distribution over V of one row, one filter after the other, in float64."""
    kept = np.ones(len(logits), dtype=bool)
    scaled = logits.astype(np.float64) / settings.temperature

    def probabilities() -> np.ndarray:
        weights = np.where(kept, np.exp(scaled - scaled.max()), 0.0)
        return weights / weights.sum()

    if settings.top_k is not None:
        kept &= scaled >= np.sort(scaled)[::-1][min(settings.top_k, len(scaled)) - 1]
    if settings.top_p is not None:
        total, p, allowed = 0.0, probabilities(), set()
        for token in np.argsort(-p, kind="stable"):
            if total >= settings.top_p:
                break
            allowed.add(int(token))
            total += p[token]
        kept &= np.array([token in allowed for token in range(len(kept))])
    if settings.min_p is not None:
        p = probabilities()
        kept &= p >= settings.min_p * p.max()
    return probabilities()


def distribution(logits: torch.Tensor, settings: GenerationSettings) -> torch.Tensor:
    """What `candidates` gives, put back in the order of the vocabulary."""
    probabilities, ids = candidates(logits, settings)
    return probabilities if ids is None else torch.zeros_like(logits).scatter(1, ids, probabilities)


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.05, 5),
    top_k=st.none() | st.integers(1, 60),
    top_p=st.none() | st.floats(0.01, 0.99),
    min_p=st.none() | st.floats(0.001, 0.9),
)
def test_filters_equal_the_reference(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, min_p: float | None
) -> None:
    settings = GenerationSettings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    logits = np.random.default_rng(seed).normal(0, 3, (3, 50)).astype(np.float32)
    wanted = np.stack([reference(row, settings) for row in logits])
    found = distribution(torch.from_numpy(logits), settings).double().numpy()
    np.testing.assert_allclose(found, wanted, atol=2e-6)


def test_a_filter_never_empties_the_distribution() -> None:
    settings = GenerationSettings(temperature=1.0, top_k=1, top_p=1e-9, min_p=1.0)
    found = distribution(torch.tensor([[0.0, 3.0, 2.0]]), settings)
    assert found.tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("temperature", [1e-12, 1e-45])
def test_a_tiny_temperature_is_greedy_not_nan(temperature: float) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.9999]])
    assert distribution(logits, GenerationSettings(temperature=temperature)).tolist() == [[0.0, 1.0, 0.0]]


@pytest.mark.parametrize("settings", [GenerationSettings(), GenerationSettings(top_k=4), GenerationSettings(top_p=0.8)])
def test_draws_follow_the_distribution(settings: GenerationSettings) -> None:
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    number = 20_000
    evenly = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    drawn = draw(*(None if x is None else x.expand(number, -1) for x in candidates(logits, settings)), evenly)  # type: ignore[arg-type]
    frequency = torch.bincount(drawn, minlength=12) / number
    torch.testing.assert_close(frequency, distribution(logits, settings)[0], atol=2 / number, rtol=0)


def test_the_extreme_draws_take_possible_tokens() -> None:
    probabilities = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    assert draw(probabilities, None, torch.zeros(1).double()).tolist() == [1]
    assert draw(probabilities, None, 1 - torch.full((1,), 2.0**-53, dtype=torch.float64)).tolist() == [3]


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits, seen = torch.tensor([[2.0, -2.0, 1.0, -1.0]]), torch.tensor([[True, True, False, False]])
    assert penalise(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.0, -1.0]]


def test_the_sampler_remembers_prompts_and_choices_row_by_row() -> None:
    settings = GenerationSettings(temperature=0, repetition_penalty=10.0)
    prompts = torch.tensor([[0, 1], [0, 2]])
    sampler = Sampler(settings, banned=torch.tensor([0]), prompts=prompts, vocab_size=5)
    logits = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0]).repeat(2, 1)
    assert sampler(logits, torch.zeros(2).double()).tolist() == [
        2,
        1,
    ]  # 0 is banned, and each row penalises its own prompt
    assert sampler(logits, torch.zeros(2).double()).tolist() == [3, 3]
    sampler.select(torch.tensor([1]))
    assert sampler(logits[:1], torch.zeros(1).double()).tolist() == [4]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    sampler = Sampler(
        GenerationSettings(), banned=torch.tensor([0]), prompts=torch.zeros(1, 1, dtype=torch.long), vocab_size=3
    )
    sampler(torch.tensor([[0.0, value, 1.0]]), torch.tensor([0.5]).double())
    sampler(torch.tensor([[0.0, 1.0, 1.0]]), torch.tensor([0.5]).double())
    with pytest.raises(NonFiniteError, match="not finite"):
        sampler.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max-new-tokens 0: must be at least 1"),
        ({"temperature": -0.1}, "temperature -0.1"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top-k 0"),
        ({"top_p": 0.0}, "top-p 0: must be above 0"),
        ({"top_p": 1.5}, "top-p 1.5"),
        ({"min_p": -1.0}, "min-p -1"),
        ({"min_p": 2.0}, "min-p 2"),
        ({"repetition_penalty": 0.0}, "repetition-penalty 0"),
        ({"num_samples": 0}, "num-samples 0"),
        ({"num_iterations": 0}, "iterations 0"),
        ({"stop": ("x", "")}, "empty stop string"),
    ],
)
def test_impossible_settings_are_named(changes: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        GenerationSettings(**changes)


def test_settings_without_effect_are_named() -> None:
    assert GenerationSettings(top_k=3).without_effect() == []
    found = GenerationSettings(temperature=0, top_k=3, min_p=0.1, num_samples=2).without_effect()
    assert [text.split()[0] for text in found] == ["top-k", "min-p", "2"]


TEMPERATURES = (0.0, -0.0, 5e-324, 1e-46, 1e-30, 1e-20, 1.0, 1e20, 1e308)
PENALTIES = (5e-324, 1e-30, 1.0, 1e30, 1e308)


@pytest.mark.parametrize(
    "filters", [{}, {"top_p": 1e-300}, {"min_p": 1.0}, {"min_p": 5e-324}, {"top_k": 10**30}, {"top_k": 1, "top_p": 1.0}]
)
def test_extremes_work_as_their_limits(filters: dict[str, Any]) -> None:
    prompts, logits = torch.tensor([[0, 3, 4]]), torch.tensor([[9.0, 5.0, -3.0, 0.0, 8.0, -60.0]])
    for temperature, penalty in itertools.product(TEMPERATURES, PENALTIES):
        settings = GenerationSettings(temperature=temperature, repetition_penalty=penalty, **filters)
        sampler = Sampler(settings, banned=torch.tensor([0]), prompts=prompts, vocab_size=6)
        found = int(sampler(logits, torch.zeros(1).double()))
        assert found != 0, f"a banned token at {settings}"
        if penalty == 1.0 and (temperature < 1e-20 or filters.get("top_k") == 1):
            assert found == 4, settings
        probabilities = candidates(logits, settings)[0] if not settings.is_greedy else torch.ones(1)
        assert bool(probabilities.isfinite().all()), settings


@pytest.mark.parametrize(
    "settings",
    [
        *({"temperature": value} for value in (-1e-320, float("nan"), float("inf"))),
        *({"top_p": value} for value in (0.0, -1.0, 1.0000001, float("nan"))),
        *({"min_p": value} for value in (-1e-300, 1.5, float("nan"))),
        *({"top_k": value} for value in (0, -(10**30))),
        *({"repetition_penalty": value} for value in (0.0, -1.0, float("nan"), float("inf"))),
        *({"num_samples": value} for value in (0, 10**9)),
        *({"num_iterations": value} for value in (0, 10**9)),
        {"max_new_tokens": 0},
    ],
)
def test_what_has_no_limit_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(RecipeError) as error:
        GenerationSettings(**settings)
    assert len(str(error.value)) < 200
