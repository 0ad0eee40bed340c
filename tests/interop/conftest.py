"""Fixtures of the interop tests."""

from pathlib import Path

import pytest

from tests.inference.tiny import tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json of 300 tokens."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer().save(path)
    return path
