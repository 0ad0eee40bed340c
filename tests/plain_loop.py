"""The reference that every faster form is held to."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from inl_core.model import feed_forward, integrator
from inl_core.model.native import build


@contextmanager
def without_native() -> Iterator[None]:
    """No operations in C++ inside, as on a machine without a compiler."""
    with patch.object(build, "_mkl", lambda: None):
        build.library.cache_clear()
        yield
    build.library.cache_clear()


@contextmanager
def the_plain_loop() -> Iterator[None]:
    """No backend is found inside, and autograd differentiates the library's own operations."""
    with (
        without_native(),
        patch.object(integrator, "find_backend", lambda *_: None),
        patch.object(feed_forward, "gated_down", feed_forward.plain_gated_down),
    ):
        yield
