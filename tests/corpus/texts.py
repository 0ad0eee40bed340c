"""Random words with awkward characters, and short settings."""

import random

from inl_core.recipe.data import DataSettings, TokenizerSettings

_PLAIN = "alpha beta gamma delta naïve 東京 🙂 the of and if else return def class 12 345 <|bos|>"
WORDS = [*_PLAIN.split(), "", "\t"]


def random_text(generator: random.Random, num_words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(num_words)) + "\n"


def settings(*sources: object, vocab_size: int = 300, **changes: object) -> DataSettings:
    changes.setdefault("tokenizer", TokenizerSettings(vocab_size=vocab_size))
    return DataSettings(sources=tuple(map(str, sources)), **changes)  # pyright: ignore
