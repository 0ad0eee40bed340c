"""Tokenizers made elsewhere, of kinds that do not keep every byte, and text for them."""

from functools import cache
from pathlib import Path

from inl_core.corpus.tokenizer import Tokenizer
from inl_core.inference.loading import LoadedModel
from inl_core.model import IntegratorLanguageModel
from tests.inference.tiny import config, perturb

DIRECTORY = Path(__file__).parents[1] / "tokenizers"
KINDS = ("wordpiece", "meta", "added", "prefix")
"""WordPiece lowers and cuts at spaces; Metaspace and `prefix` put a space before; an added token takes spaces away."""

WORDS = "near falls and reads  roofs on the river the small grey town. old model "
"""Text that all of them can spell, though not keep."""


@cache
def foreign_tokenizer(kind: str) -> Tokenizer:
    """One of KINDS."""
    return Tokenizer.load(DIRECTORY / f"{kind}.json")


def foreign_model(kind: str) -> LoadedModel:
    """A tiny model with random weights and a tokenizer of that kind."""
    tokenizer = foreign_tokenizer(kind)
    model = IntegratorLanguageModel(config("v4").with_vocab_size(tokenizer.vocab_size))
    perturb(model, 0)
    return LoadedModel(model.eval(), tokenizer, Path("here"), {})
