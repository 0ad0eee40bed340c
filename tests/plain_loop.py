"""The reference that every faster form is held to."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from inl_core.model import feed_forward, integrator


@contextmanager
def the_plain_loop() -> Iterator[None]:
    """No backend is found inside, and autograd differentiates the feed-forward's plain operations."""
    with (
        patch.object(integrator, "find_backend", lambda *_: None),
        patch.object(feed_forward, "gated_down", feed_forward.plain_gated_down),
    ):
        yield
