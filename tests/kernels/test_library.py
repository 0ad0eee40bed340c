"""How the library of operations in C++ is made and kept, and what goes on without it."""

import ctypes
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from inl_core.kernels import apply
from inl_core.kernels.cpu import calls, library, structures
from tests.kernels.native import (
    PRODUCTS,
    assert_alike,
    build_model,
    losses_and_gradients,
    needs_library,
    put_own,
    some_ids,
    without_library,
)
from tests.kernels.test_integrator import make_case, ours, plain

pytestmark = needs_library


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has not looked for the library yet, which is a small one here."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library, "_SOURCES", small_library(tmp_path))
    library.forget()
    yield tmp_path / "cache" / "inl"
    library.forget()


def small_library(directory: Path) -> Path:
    """Sources that compile in a moment: threads, the structures' sizes, and oneDNN's product said not to work."""
    sources = directory / "sources"
    sources.mkdir()
    functions = ["int brgemm_works(const void *) { return omp_get_max_threads() < 0; }"]
    for name, kind in structures.STRUCTURES.items():
        functions.append(f"long size_of_{name}() {{ return {ctypes.sizeof(kind)}; }}")
    lines = ["#include <omp.h>", *(f'extern "C" {function}' for function in functions)]
    (sources / "small.cpp").write_text("\n".join(lines), encoding="utf-8")
    return sources


def compiler_script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_the_library_is_compiled_once_and_kept(cache):
    assert library.library() is not None
    (kept,) = cache.iterdir()
    library.forget()
    with patch.object(library, "_build", side_effect=AssertionError("compiled again")):
        assert library.library() is not None
    assert kept.stat().st_size > 0


def test_who_asks_is_told_that_it_will_take_some_seconds(cache, request):
    assert library.is_to_be_compiled()
    assert library.library() is not None
    assert not library.is_to_be_compiled()
    library.forget()
    assert not library.is_to_be_compiled()  # kept
    next(cache.iterdir()).unlink()
    request.getfixturevalue("no_compiler")
    assert not library.is_to_be_compiled()


def test_a_node_without_a_compiler_takes_what_another_compiled(cache, request):
    assert library.library() is not None
    library.forget()
    request.getfixturevalue("no_compiler")
    assert library.library() is not None


def test_another_source_processor_library_or_torch_is_another_library(tmp_path):
    names = {library.fingerprint()}
    other = tmp_path / "other.cpp"
    other.write_text("int x;")
    with patch.object(library, "_SOURCES", tmp_path):
        names.add(library.fingerprint())
    with patch.object(library, "_processor", lambda: b"another"):
        names.add(library.fingerprint())
    with patch.object(library.platform, "libc_ver", lambda: ("glibc", "2.0")):
        names.add(library.fingerprint())
    with patch.object(library.torch, "__version__", "2.0"):
        names.add(library.fingerprint())
    assert len(names) == 5


def test_another_or_an_updated_compiler_is_another_library(cache, tmp_path, monkeypatch):
    compiler = Path(compiler_script(tmp_path / "compiler", f'exec {library.find_compilers()[-1]} "$@"'))
    other = tmp_path / "other"
    shutil.copy2(compiler, other)
    names = {library._ending(str(compiler)), library._ending(str(other))}
    os.utime(other, ns=(0, 0))
    names.add(library._ending(str(other)))
    assert len(names) == 3
    monkeypatch.setattr(library, "find_compilers", lambda: [str(compiler)])
    assert library.library() is not None
    assert library._kept() is not None
    os.utime(compiler, ns=(0, 0))
    assert library._kept() is None


@pytest.mark.parametrize("damage", ["cut short", "another's", "writable by all"])
def test_a_library_that_is_refused_is_compiled_again(cache, damage):
    cache.mkdir(parents=True, mode=0o700)
    kept = cache / f"native-{library.fingerprint()}-{library._ending(library.find_compilers()[0])}"
    kept.write_bytes(b"\x7fELF libgomp")
    if damage == "writable by all":
        kept.chmod(0o666)
    elif damage == "another's":
        if os.getuid():
            pytest.skip("only root gives files away")
        os.chown(kept, 12345, 12345)
    with pytest.warns(RuntimeWarning, match="compiled code is not taken from"):
        assert library.library() is not None
    with warnings.catch_warnings(action="error"):
        assert library._kept() is not None
    assert kept.stat().st_size > 10_000
    assert kept.stat().st_uid == os.getuid()


def test_the_next_compiler_is_taken_where_one_fails(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler_script(tmp_path / "broken", "exit 1"))
    assert library.library() is not None


# trouble -> why there is no library, and whether that is worth a warning
TROUBLES = {
    "no compiler": ("there is no C++ compiler", False),
    "one that fails": ("out of luck", True),
    "a source it refuses": ("error", True),
    "its own OpenMP": ("has an OpenMP of its own", True),
    "other threads": ("another OpenMP than GNU's", False),
    "another BLAS": ("no MKL", False),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_without_what_it_needs_there_is_none_and_training_goes_on(cache, tmp_path, monkeypatch, request, trouble):
    reason, is_worth_a_warning = TROUBLES[trouble]
    if trouble == "no compiler":
        request.getfixturevalue("no_compiler")
    elif trouble == "one that fails":
        broken = compiler_script(tmp_path / "broken", "echo out of luck >&2; exit 1")
        monkeypatch.setattr(library, "find_compilers", lambda: [broken])
    elif trouble == "a source it refuses":
        monkeypatch.setattr(library, "_SOURCES", tmp_path)
        (tmp_path / "bad.cpp").write_text("this is no C++")
    elif trouble == "its own OpenMP":
        flags = [flag for flag in library._FLAGS if flag != "-fopenmp"]
        monkeypatch.setattr(library, "_SOURCES", tmp_path)
        (tmp_path / "other.cpp").write_text("int x;")
        monkeypatch.setattr(library, "_FLAGS", flags)
    elif trouble == "other threads":
        monkeypatch.setattr(library, "_threads_are_gnu", lambda: False)
    else:
        monkeypatch.setattr(library, "_mkl", lambda: None)
    warned = pytest.warns(RuntimeWarning, match=f"in C\\+\\+ are not there: .*{reason}")
    with warned if is_worth_a_warning else nullcontext():
        assert library.library() is None
    assert reason in library.why_missing()
    model, ids = build_model(), some_ids()
    expected = losses_and_gradients(model, ids)
    choices = apply(model)
    assert {choices[part].way for part in ("attention", "integrator")} == {"torch"}
    assert all(reason in choices[part].why for part in ("attention", "integrator"))
    assert_alike(losses_and_gradients(model, ids), expected)


def test_a_library_that_is_hidden_comes_back():
    with without_library():
        assert library.library() is None
        assert library.why_missing() == "this torch has no MKL"
    assert library.library() is not None
    assert library.why_missing() == ""


@pytest.mark.parametrize("trouble", ["a file in its place", "no home", "a full disk"])
def test_a_cache_that_cannot_be_used_costs_a_compilation_and_nothing_else(cache, tmp_path, monkeypatch, trouble):
    if trouble == "a file in its place":
        (tmp_path / "cache").write_text("")
    elif trouble == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    assert library.library() is not None
    assert not list(cache.iterdir() if cache.is_dir() else [])


def test_compilations_that_start_together_do_not_disturb_each_other(cache):
    """As ranks on one machine do; each writes aside, and what is kept is whole."""
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: library._opened(), range(3)))
    assert all(one.code.brgemm_works(None) == 0 for one in found)
    (kept,) = cache.iterdir()
    library.forget()
    with patch.object(library, "_build", side_effect=AssertionError("compiled again")):
        assert library.library() is not None
    assert kept.suffix == ".so"


# The libraries' products, and the structures.


@pytest.mark.skipif("oneDNN" not in PRODUCTS, reason="no product of oneDNN's here")
def test_a_model_trains_alike_by_either_product():
    model, ids = build_model(), some_ids()
    by_mkl = losses_and_gradients(put_own(model, "MKL"), ids)
    assert_alike(losses_and_gradients(put_own(model, "oneDNN"), ids), by_mkl)


def test_without_onednn_s_product_mkl_s_is_taken(monkeypatch):
    monkeypatch.setattr(library, "_BRGEMM", "no_such_function")
    library.forget()
    try:
        assert library.library().products == ("MKL",)
        case = make_case()
        torch.testing.assert_close(ours(case, "oneDNN"), plain(case), rtol=1e-4, atol=1e-5)
    finally:
        library.forget()


def test_a_structure_of_another_size_than_in_the_library_is_refused_when_that_is_loaded(cache, monkeypatch):
    """Addresses would be read from the wrong places."""
    monkeypatch.setitem(structures.STRUCTURES, "attention", structures.Blas)
    with pytest.raises(AssertionError, match=r"attention: .* bytes in C"):
        library.library()


def test_an_operation_that_has_no_memory_says_so():
    calls_made = []

    class Refusing:
        def __getattr__(self, name):
            calls_made.append(name)
            return lambda _: 0

    found = library.library()
    with (
        patch.object(calls, "library", lambda: found._replace(code=Refusing())),
        pytest.raises(MemoryError, match=r"the integrator \(iterate\) over 33 tokens"),
    ):
        ours(make_case())
    assert calls_made == ["iterate_float32"]


def test_the_model_and_its_operations_are_there_without_torch_s_compiler():
    """torch._dynamo takes a second to import; a command that compiles nothing does without."""
    code = "import sys, inl_core.model, inl_core.kernels; sys.exit('torch._dynamo' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
