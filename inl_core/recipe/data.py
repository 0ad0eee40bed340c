"""The data section of a recipe: where text comes from and how it becomes token shards."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from inl_core.recipe.base import FilePath, Section, Source, Total, Unit

Fraction = Annotated[float, Field(gt=0, lt=1)]


class TokenizerSettings(Section):
    """The byte-level BPE tokenizer."""

    vocab_size: Annotated[int, Field(ge=272, le=100_000_000)] = 2048
    """Size of a tokenizer trained on the data, special tokens included."""
    file: FilePath | None = None
    """Use this tokenizer.json and train none."""
    sample_bytes: Total = 200_000_000
    """The tokenizer trains on at most this many bytes of text, taken evenly from the training documents."""


class DataSettings(Section):
    """Text sources, the tokenizer and the split."""

    sources: tuple[Source, ...] = ("builtin:python",)
    """Files, directories, globs, `-` or built-in corpora; prepared when `directory` does not hold them yet."""
    directory: FilePath | None = None
    """The prepared data set; null derives data/NAME from the sources and the tokenizer."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    """The tokenizer."""
    validation_fraction: Fraction = 0.05
    """Share of the documents held out, chosen by a hash of their text."""
    num_shards: Annotated[int, Field(gt=0, le=10_000)] = 8
    """Training shards; documents go to them by hash, which is the global shuffle."""
    max_bad_ratio: Unit = 0.01
    """Preparation fails when a larger share of the rows is unreadable."""
    document_mask: bool = True
    """Attention does not cross documents inside a window, and positions restart."""

    @model_validator(mode="after")
    def _has_sources(self) -> Self:
        if not self.sources:
            raise ValueError("sources is empty: name a file, a directory, a glob or builtin:python")
        return self
