"""The stage of the fault injection, and the seed that chooses its moments and damages: INL_FAULT_SEED, default 0."""

import os

import pytest

from tests.faults.subject import Stage, Whole, open_stage

SEED = int(os.environ.get("INL_FAULT_SEED", "0"))


def pytest_report_header() -> str:
    return f"fault injection: INL_FAULT_SEED={SEED}"


@pytest.fixture(scope="session")
def opened(tmp_path_factory):
    with open_stage(tmp_path_factory.mktemp("faults")) as found:
        yield found


@pytest.fixture
def stage(opened) -> Stage:
    """The directory that commands run in; bring it to a state first."""
    return opened[0]


@pytest.fixture
def whole(opened) -> Whole:
    """The undisturbed run."""
    return opened[1]
