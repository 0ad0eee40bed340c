"""Fixtures of the interop tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from inl_core.inference.loading import LoadedModel, open_checkpoint
from tests.inference.tiny import tokenizer, write_checkpoint
from tests.interop.served import Served, serving_of


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of 300 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer().save(path)
    return path


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    run = tmp_path_factory.mktemp("server") / "tiny"
    write_checkpoint(run, "v5")
    return open_checkpoint(run)


@pytest.fixture(scope="module")
def served(loaded: LoadedModel) -> Iterator[Served]:
    with serving_of(loaded) as found:
        yield found
