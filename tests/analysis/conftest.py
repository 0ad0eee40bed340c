"""The inference tests' fixtures."""

from tests.inference.conftest import one_thread, workplace

__all__ = ["one_thread", "workplace"]
