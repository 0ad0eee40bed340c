"""Operations in C++ and what stands in for them: tests of either."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest

from inl_core.model.native import build
from tests.plain_loop import without_native


@pytest.fixture(params=["in C++", "without"])
def either_way(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the operations in C++ are there: once as on this machine, once as on one without a compiler."""
    is_native = request.param != "without"
    if is_native and build.library() is None:
        pytest.skip("no compiler here, or torch has other threads")
    with nullcontext() if is_native else without_native():
        yield is_native
