"""Fixtures of the inference tests: one thread, for tiny tensors gain nothing from more, and shared artefacts."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.inference.tiny import write_checkpoint, write_data


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data/tiny and runs of it: v3, v4, transformer. Tests must not change it."""
    path = tmp_path_factory.mktemp("workplace")
    data = write_data(path / "data" / "tiny")
    for preset in ("v3", "transformer", "v4"):  # v4 is the newest
        write_checkpoint(path / "runs" / preset, preset, data=data)
    return path
