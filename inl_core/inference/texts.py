"""The text a model is measured on: a split of a prepared data set, text in any form, or Python's own sources.

- The split is the run's validation split unless told otherwise. Its tokenizer must be the model's.
- A text is scored in windows of S tokens, each of which begins `stride` tokens after the one before. At stride S a
  token has 0 to S - 1 tokens of context. A smaller stride gives each S - stride or more, and takes S / stride as long.
"""

import argparse
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from inl_core.corpus.dataset import TokenDataset, TokenStream
from inl_core.corpus.encoding import document_stream
from inl_core.corpus.loader import Batch, evaluation_batches
from inl_core.corpus.manifest import SPLITS, check_ids, load_manifest
from inl_core.corpus.reading.paths import shown
from inl_core.corpus.reading.rows import Document
from inl_core.corpus.reading.sources import STDIN
from inl_core.corpus.reading.whole_sources import whole_documents
from inl_core.errors import ArtefactError, RecipeError
from inl_core.inference.data_location import find_data
from inl_core.inference.evaluate import ByteCounts, byte_counts
from inl_core.inference.loading import LoadedModel
from inl_core.recipe import DataSettings
from inl_core.recipe.data import ColumnSettings
from inl_core.recipe.load import load_recipe


@dataclass(frozen=True)
class Text:
    """A text to measure a model on."""

    name: str
    """What it is, for people."""
    loaded: LoadedModel
    source: TokenStream
    num_bytes: int
    """Size of the source text in UTF-8, before it became tokens."""
    warnings: tuple[str, ...] = ()

    @property
    def num_targets(self) -> int:
        """Tokens that can be predicted."""
        return self.source.num_tokens - 1

    def byte_counts(self, max_tokens: int | None = None) -> ByteCounts:
        """How many bytes its tokens stand for, when the first `max_tokens` targets are scored (None: all)."""
        is_whole = max_tokens is None or max_tokens >= self.num_targets
        return byte_counts(self.loaded.tokenizer, self.source, self.num_bytes, is_whole=is_whole)

    def windows(
        self, *, window: int, stride: int | None = None, batch_size: int = 16, max_tokens: int | None = None
    ) -> Iterator[Batch]:
        """Batches in which every target is scored once, or the first `max_tokens` of them.

        Raises:
            RecipeError: the window is longer than the model's context, or the stride longer than the window.
        """
        self.check_window(window)
        if stride is not None and not 0 < stride <= window:
            raise RecipeError(f"stride {stride}: must be between 1 and the window of {window:,} tokens")
        return evaluation_batches(
            self.source, sequence_length=window, stride=stride, batch_size=batch_size, max_tokens=max_tokens
        )

    def check_window(self, window: int) -> None:
        """Refuse a window that is longer than the model's context."""
        limit = self.loaded.model.config.max_seq_len
        if not 0 < window <= limit:
            raise RecipeError(f"window {window}: must be between 1 and the model's context of {limit:,} tokens")


def default_window(loaded: LoadedModel) -> int:
    """The window the model was trained on."""
    return min(loaded.config.get("sequence_length") or 512, loaded.model.config.max_seq_len)


def open_split(loaded: LoadedModel, directory: Path | None = None, split: str = "validation") -> Text:
    """A split of `directory`, by default of the data the checkpoint was trained on.

    Raises:
        ArtefactError: the data set is missing or damaged, or another tokenizer encoded it.
    """
    if split not in SPLITS:
        raise RecipeError(f"split {split!r}: must be one of {', '.join(SPLITS)}")
    directory = directory or find_data(loaded.path, loaded.config)
    manifest = load_manifest(directory)
    if manifest.tokenizer_fingerprint != loaded.tokenizer.fingerprint:
        sizes = f"{manifest.vocab_size:,} tokens there, {loaded.tokenizer.vocab_size:,} in the model"
        raise ArtefactError(
            f"{directory}: encoded by another tokenizer than the model's ({sizes}); prepare the text with "
            f"inl prepare-data ... --tokenizer {loaded.path / 'tokenizer.json'}"
        )
    check_ids(directory, manifest, loaded.tokenizer)
    trained = _data_settings(loaded)
    dataset = TokenDataset.open(directory, split, document_mask=trained.document_mask, loss_on=trained.loss_on)
    name, warnings = f"{directory}, {split} split", _leakage(loaded, directory, manifest.fingerprint)
    return Text(name, loaded, dataset, dataset.num_bytes, warnings)


def plain_text(loaded: LoadedModel, name: str, text: str) -> Text:
    """A text as one document, called `name`."""
    return _from_documents(loaded, name, [Document(name, (text,))])


def open_text(
    loaded: LoadedModel,
    source: str | Path,
    *,
    note: Callable[[str], None] = lambda message: None,
    columns: ColumnSettings = ColumnSettings(),
) -> Text:
    """Any text that `inl prepare-data` reads: a file, a directory or a glob of any format, or `-` for stdin.

    A text file is one document. Of prompts and chats what was trained on is scored: mostly the answers alone.

    Args:
        note: is told what was found and what was left out.
        columns: which columns of rows hold the text.

    Raises:
        RecipeError: it is missing or cannot be used.
        ArtefactError: it is empty, a file is damaged, or a row cannot be used.
    """
    name = "stdin" if str(source) == STDIN else shown(source)
    documents = whole_documents(str(source), note=note, columns=columns)
    if not documents:
        raise ArtefactError(f"{name}: is empty; there is nothing to measure")
    name += f" ({len(documents):,} documents)" if len(documents) > 1 else ""
    has_answers = any(document.roles for document in documents) and _data_settings(loaded).loss_on != "all"
    name += ", completions only" if has_answers else ""
    return _from_documents(loaded, name, documents)


def open_default(loaded: LoadedModel) -> Text:
    """The run's validation split if it can be found, else a text that comes with Python: the source of argparse."""
    try:
        return open_split(loaded)
    except ArtefactError as error:
        name = f"the source of Python's argparse ({error})"
        return plain_text(loaded, name, inspect.getsource(argparse))


def _from_documents(loaded: LoadedModel, name: str, documents: list[Document]) -> Text:
    trained = _data_settings(loaded)
    document_mask = len(documents) > 1 and trained.document_mask
    stream = document_stream(loaded.tokenizer, documents, document_mask=document_mask, loss_on=trained.loss_on)
    if not stream.num_tokens:
        raise ArtefactError(f"{name}: this tokenizer leaves nothing of it; there is nothing to measure")
    return Text(name, loaded, stream, sum(len(text.encode()) for document in documents for text in document.texts))


def _data_settings(loaded: LoadedModel) -> DataSettings:
    """How the model was trained on its data, and so should be measured: with document masks or without, on answers."""
    path = loaded.path / "recipe.yaml"
    try:
        return load_recipe(path, allow_pipe=False).data if path.is_file() else DataSettings()
    except RecipeError as error:
        raise ArtefactError(str(error)) from None


def _leakage(loaded: LoadedModel, directory: Path, fingerprint: str) -> tuple[str, ...]:
    """A warning when the data set is not the one the model was trained on: its held-out documents may be others."""
    trained_on = {event.get("data") for event in loaded.config.get("provenance", [])}
    if not trained_on or fingerprint in trained_on:
        return ()
    return (f"{directory}: is not the data the model was trained on, which may hold some of these documents",)
