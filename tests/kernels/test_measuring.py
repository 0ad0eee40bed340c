"""Which way is chosen by what was measured, and how that is remembered."""

import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from inl_core.kernels import measuring
from inl_core.kernels.cpu import cache
from inl_core.kernels.measuring import fastest
from inl_core.recipe import ModelConfig
from tests.kernels.native import PRODUCTS, needs_library, without_library

pytestmark = needs_library
CONFIG = ModelConfig.model_validate({"preset": "v4", "d_model": 64})
MKL, ONEDNN = "C++ with MKL", "C++ with oneDNN"
SECONDS = {
    "attention": {"torch": 3.0, MKL: 2.0, ONEDNN: 1.5},
    "integrator": {"torch": 1.0, MKL: 0.99, ONEDNN: 1.2},
}


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A machine on which nothing is remembered; the numbers of threads that something was measured with."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found: list[int] = []
    monkeypatch.setattr(
        measuring, "measure", lambda part, *_: (found.append(torch.get_num_threads()), SECONDS[part])[1]
    )
    measuring._remembered.cache_clear()
    yield found
    measuring._remembered.cache_clear()


@pytest.mark.usefixtures("measured")
def test_the_fastest_way_is_chosen_where_it_saves_something():
    assert fastest("attention", CONFIG) == (ONEDNN, "2.00 times as fast as torch, measured here")
    assert fastest("integrator", CONFIG).way == "torch"
    assert fastest("integrator", CONFIG).why == "C++ is 1.01 times as fast, measured here"


def test_what_was_measured_is_remembered_from_one_process_to_the_next(measured):
    first = fastest("attention", CONFIG)
    measuring._remembered.cache_clear()  # as a new process begins
    assert fastest("attention", CONFIG) == first
    assert len(measured) == 1


def test_a_run_keeps_the_way_it_was_computed_by_unless_another_is_much_faster(measured):
    assert fastest("attention", CONFIG, MKL) == (ONEDNN, "2.00 times as fast as torch, measured here")
    assert fastest("integrator", CONFIG, ONEDNN) == (ONEDNN, "as before")
    assert fastest("integrator", CONFIG, "C++ with something that is gone").way == "torch"
    assert len(measured) == 2


def test_other_widths_are_measured_anew(measured):
    for width in (64, 128, 64):
        fastest("integrator", ModelConfig.model_validate({"preset": "v4", "d_model": width}))
    assert len(measured) == 2


def test_what_is_measured_is_small_whatever_the_model_is():
    huge = {
        "preset": "v4",
        "d_model": 2**20,
        "num_heads": 2**12,
        "integrator": {"num_iterations": 5000, "controller": {"width": 2**16}},
    }
    config = ModelConfig.model_validate(huge)
    assert measuring._sizes("attention", config) == (16, 16, 128)
    assert measuring._sizes("integrator", config) == (1024, 256, 8)
    grouped = ModelConfig.model_validate({"d_model": 4096, "num_heads": 64, "num_kv_heads": 2})
    assert measuring._sizes("attention", grouped) == (16, 1, 64)


def test_another_number_of_threads_is_measured_anew(measured):
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            fastest("attention", CONFIG)
    finally:
        torch.set_num_threads(threads)
    assert measured == [1, 2]


def test_another_library_is_measured_anew(measured, monkeypatch):
    fastest("attention", CONFIG)
    measuring._remembered.cache_clear()
    monkeypatch.setattr(measuring, "fingerprint", lambda: "another")
    fastest("attention", CONFIG)
    assert len(measured) == 2


def test_what_was_damaged_is_measured_anew_with_a_warning(measured):
    fastest("attention", CONFIG)
    (kept,) = cache.cache_directory().iterdir()
    assert json.loads(kept.read_bytes()[:-32]) == SECONDS["attention"]
    kept.write_bytes(kept.read_bytes()[:-1])
    measuring._remembered.cache_clear()
    with pytest.warns(RuntimeWarning, match="damaged; remove it"):
        assert fastest("attention", CONFIG).way == ONEDNN
    assert len(measured) == 2


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{}", b'{"torch": 0.0}', b'{"torch": "1"}', b"\xff"])
def test_what_another_version_kept_is_measured_anew(content, measured):
    fastest("attention", CONFIG)
    (kept,) = cache.cache_directory().iterdir()
    cache.keep(kept.name, content)
    measuring._remembered.cache_clear()
    assert fastest("attention", CONFIG).way == ONEDNN
    assert len(measured) == 2


def test_where_nothing_can_be_kept_it_is_measured_in_each_process(measured, tmp_path):
    (tmp_path / "inl").write_text("a file in its place")
    for _ in range(2):
        measuring._remembered.cache_clear()
        assert fastest("attention", CONFIG).way == ONEDNN
    assert len(measured) == 2


def test_without_a_library_nothing_is_measured(measured):
    with without_library():
        assert fastest("attention", CONFIG) == ("torch", "no operations in C++: this torch has no MKL")
    assert measured == []


def test_a_measurement_tries_every_way_and_leaves_random_numbers_and_gradient_mode_as_they_were():
    state = torch.get_rng_state()
    with torch.no_grad(), patch.object(measuring, "_TURNS", 1), patch.object(measuring, "_ELEMENTS", 2**12):
        found = [
            measuring.measure("attention", (4, 2, 8), PRODUCTS),
            measuring.measure("integrator", (32, 8, 2), PRODUCTS),
        ]
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    ways = {"torch", *(f"C++ with {product}" for product in PRODUCTS)}
    assert [set(seconds) for seconds in found] == [ways, ways]
    assert all(0 < value < float("inf") for seconds in found for value in seconds.values())
