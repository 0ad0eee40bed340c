"""What all tests share: finished runs of tiny models, and Hypothesis without a clock."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes on a machine that others use too says nothing about the code.
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with data/tiny and runs of it: v3, transformer, v5, v4. Tests must not change it."""
    from tests.inference.tiny import write_checkpoint, write_data

    path = tmp_path_factory.mktemp("workplace")
    data = write_data(path / "data" / "tiny")
    for preset in ("v3", "transformer", "v5", "v4"):  # v4 is the newest
        write_checkpoint(path / "runs" / preset, preset, data=data)
    return path
