"""The data section of a recipe: where text comes from, and how it becomes tokens."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from inl_core.recipe.base import FilePath, Section, Source, Total, Unit

Fraction = Annotated[float, Field(gt=0, lt=1)]

Weight = Annotated[float, Field(gt=0, le=100)]

Column = Annotated[str, Field(min_length=1, max_length=1000)]

LossOn = Literal["answers", "last_answer", "all"]
"""Of which tokens the loss is the mean. Of plain text it is all of them in any case."""


class TokenizerSettings(Section):
    """The byte-level BPE tokenizer."""

    vocab_size: Annotated[int, Field(ge=272, le=100_000_000)] = 2048
    """Size of a tokenizer trained on the data, special tokens included."""
    file: FilePath | None = None
    """A tokenizer.json to use, in the place of training one."""
    sample_bytes: Total = 200_000_000
    """Train the tokenizer on at most this many bytes of text, taken evenly from the training documents."""


class ColumnSettings(Section):
    """In which columns of JSON Lines and Parquet the text is. Without any name the usual ones are recognised: messages;
    prompt and completion; text; conversations (ShareGPT); instruction, input and output (Alpaca)."""

    text: Column | None = None
    """The column of plain text."""
    prompt: Column | None = None
    """The column of prompts; completions are in `completion`."""
    completion: Column | None = None
    """The column of completions; prompts are in `prompt`."""
    messages: Column | None = None
    """The column of conversations: lists of {role, content} or {from, value}."""


class DataSettings(Section):
    """Text sources, the tokenizer and the split."""

    sources: tuple[Source, ...] = ("builtin:python",)
    """Files, directories, globs, `-` (stdin) or builtin:python; prepared when `directory` does not hold them yet.
    Empty, or left out beside `directory`: the data set there as it is, with the tokenizer it was made with."""
    weights: tuple[Weight, ...] = ()
    """How often the documents of each source are taken, a number for each: 2 is twice, 0.5 every second one, chosen by
    a hash of its text, in both splits. An epoch then has them so often. Empty takes all once."""
    directory: FilePath | None = None
    """Where the prepared data set is; null is data/NAME, with a name made from the sources and the tokenizer."""
    columns: ColumnSettings = ColumnSettings()
    """The columns of rows that hold the text."""
    tokenizer: TokenizerSettings = TokenizerSettings()
    """The tokenizer."""
    validation_fraction: Fraction = 0.05
    """Share of the documents that are held out for validation, chosen by a hash of their text."""
    num_shards: Annotated[int, Field(gt=0, le=10_000)] = 8
    """Number of training shards. Documents go to them by hash, so that neighbours in the sources come apart."""
    max_bad_ratio: Unit = 0.01
    """Preparation fails when a larger share of the rows cannot be used."""
    loss_on: LossOn = "answers"
    """What of prompt+completion and chat rows is learned: all answers, the last answer of a row, or all of its text."""
    document_mask: bool = True
    """Within a window, attention does not cross from one document to another, and positions start anew in each."""

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        if self.directory is not None and "sources" not in self.model_fields_set:
            # Where only the directory is named, the sources are those of its data set.
            object.__setattr__(self, "sources", ())
        if not self.sources and self.directory is None:
            raise ValueError(
                "sources is empty: name a file, a directory, a glob or builtin:python, or a prepared data set as "
                "data.directory"
            )
        if self.weights and len(self.weights) != len(self.sources):
            counts = f"{len(self.weights)} numbers for {len(self.sources)} sources"
            raise ValueError(f"weights has {counts}; give one for each")
        return self

    @property
    def is_directory_alone(self) -> bool:
        """Whether the data is a prepared data set, taken as it is."""
        return not self.sources
