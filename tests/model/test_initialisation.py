"""What a fresh model is like: hardly worse than a guess at any width, and its embeddings spread as the recipe says."""

import math

import pytest
import torch
from torch.nn import functional as F

from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import ModelConfig

VOCAB = 1024


def fresh(**values: object) -> IntegratorLanguageModel:
    model = IntegratorLanguageModel(ModelConfig.model_validate({"vocab_size": VOCAB, "num_layers": 1, **values}))
    model.initialise(0)
    return model


@pytest.mark.parametrize("rank", [None, 64])
@pytest.mark.parametrize("preset", ["v4", "v5", "transformer"])
@pytest.mark.parametrize("d_model", [64, 128, 768])
def test_a_fresh_model_is_hardly_worse_than_a_guess_at_any_width(d_model: int, preset: str, rank: int | None) -> None:
    model = fresh(d_model=d_model, preset=preset, embedding_rank=rank)
    ids = torch.randint(VOCAB, (8, 65), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model.logits(model(ids[:, :-1]).hidden)
    assert math.log(VOCAB) < float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())) < math.log(VOCAB) + 1.5


@pytest.mark.parametrize("rank", [None, 64])
def test_embeddings_have_the_spread_of_the_recipe(rank: int | None) -> None:
    ids = torch.arange(VOCAB)[None]
    with torch.no_grad():
        embeddings = fresh(d_model=256, embedding_std=0.3, embedding_norm=False, embedding_rank=rank).embedding(ids)[0]
    assert float(embeddings.std()) == pytest.approx(0.3, rel=0.02)
