"""The iterations under autograd alone, for tests that hold other backends to it or count what it does."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from inl_core.model import integrator


@contextmanager
def the_plain_loop() -> Iterator[None]:
    """No backend is found inside."""
    with patch.object(integrator, "find_backend", lambda *_: None):
        yield
