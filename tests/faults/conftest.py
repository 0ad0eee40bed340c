"""The stage of the fault injection, and what chooses its faults.

- INL_FAULT_SEED, default 0: the moments of the kills and the details of the damages.
- INL_FAULT_SHARE, default 1: of the kills and the damages only every n-th is tried, others with another seed.
"""

import os
from collections.abc import Sequence
from typing import TypeVar

import pytest

from tests.faults.subject import Stage, Whole, open_stage

SEED, SHARE = (int(os.environ.get(f"INL_FAULT_{name}", default)) for name, default in (("SEED", "0"), ("SHARE", "1")))
Case = TypeVar("Case")


def chosen(cases: Sequence[Case]) -> Sequence[Case]:
    """The cases that are tried."""
    return cases[SEED % SHARE :: SHARE]


def pytest_report_header() -> str:
    return f"fault injection: INL_FAULT_SEED={SEED}, INL_FAULT_SHARE={SHARE}"


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
