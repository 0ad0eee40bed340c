"""How the library of operations in C++ is made and kept, and what goes on without it."""

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from inl_core.model.backends import native
from inl_core.model.backends.select import describe_backend
from inl_core.model.native import build as native_build
from inl_core.model.native import calls
from inl_core.recipe import IntegratorConfig
from tests.model.test_native import RULE, flat_inputs
from tests.model.test_native import test_a_model_trains_alike_by_either_way as train_by_either_way

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no compiler here, or torch has other threads")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, and a process that has not looked for the library yet, which is a small one: a part of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(native_build, "_SOURCES", small_library(tmp_path))
    native_build.library.cache_clear()
    yield tmp_path / "cache" / "inl"
    native_build.library.cache_clear()


def small_library(directory: Path) -> Path:
    sources = directory / "sources"
    sources.mkdir()
    for name in ("common.h", "entropy.h", "norm.h", "tiles.h", "products.cpp", "rows.cpp"):
        (sources / name).write_bytes((native_build._SOURCES / name).read_bytes())
    return sources


def compiler_script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


def test_the_library_is_compiled_once_and_kept(cache, monkeypatch):
    monkeypatch.setattr(native_build, "_SOURCES", Path(native_build.__file__).parent)  # all of it
    assert native_build.library() is not None
    assert native.run(RULE, flat_inputs()).x.isfinite().all()
    (kept,) = cache.iterdir()
    native_build.library.cache_clear()
    with patch.object(native_build, "_build", side_effect=AssertionError("compiled again")):
        assert native_build.library() is not None
    assert kept.stat().st_size > 0


def test_who_asks_is_told_that_it_will_take_some_seconds(cache, request):
    assert native_build.is_to_be_compiled()
    assert native_build.library() is not None
    assert not native_build.is_to_be_compiled()
    native_build.library.cache_clear()
    assert not native_build.is_to_be_compiled()  # kept
    next(cache.iterdir()).unlink()
    request.getfixturevalue("no_compiler")
    assert not native_build.is_to_be_compiled()


def test_a_node_without_a_compiler_takes_what_another_compiled(cache, request):
    assert native_build.library() is not None
    native_build.library.cache_clear()
    request.getfixturevalue("no_compiler")
    assert native_build.library() is not None


def test_another_source_processor_library_or_torch_is_another_library(tmp_path):
    names = {native_build._fingerprint()}
    other = tmp_path / "other.cpp"
    other.write_text("int x;")
    with patch.object(native_build, "_SOURCES", tmp_path):
        names.add(native_build._fingerprint())
    with patch.object(native_build, "_processor", lambda: b"another"):
        names.add(native_build._fingerprint())
    with patch.object(native_build.platform, "libc_ver", lambda: ("glibc", "2.0")):
        names.add(native_build._fingerprint())
    with patch.object(native_build.torch, "__version__", "2.0"):
        names.add(native_build._fingerprint())
    assert len(names) == 5


def test_another_or_an_updated_compiler_is_another_library(cache, tmp_path, monkeypatch):
    compiler = Path(compiler_script(tmp_path / "compiler", f'exec {native_build.find_compilers()[-1]} "$@"'))
    other = tmp_path / "other"
    shutil.copy2(compiler, other)
    names = {native_build._ending(str(compiler)), native_build._ending(str(other))}
    os.utime(other, ns=(0, 0))
    names.add(native_build._ending(str(other)))
    assert len(names) == 3
    monkeypatch.setattr(native_build, "find_compilers", lambda: [str(compiler)])
    assert native_build.library() is not None
    assert native_build._kept() is not None
    os.utime(compiler, ns=(0, 0))
    assert native_build._kept() is None


@pytest.mark.parametrize("damage", ["cut short", "another's", "writable by all"])
def test_a_library_that_is_refused_is_compiled_again(cache, damage):
    cache.mkdir(parents=True, mode=0o700)
    kept = cache / f"native-{native_build._fingerprint()}-{native_build._ending(native_build.find_compilers()[0])}"
    kept.write_bytes(b"\x7fELF libgomp")
    if damage == "writable by all":
        kept.chmod(0o666)
    elif damage == "another's":
        if os.getuid():
            pytest.skip("only root gives files away")
        os.chown(kept, 12345, 12345)
    with pytest.warns(RuntimeWarning, match="compiled code is not taken from"):
        assert native_build.library() is not None
    with warnings.catch_warnings(action="error"):
        assert native_build._kept() is not None
    assert kept.stat().st_size > 10_000
    assert kept.stat().st_uid == os.getuid()


def test_the_next_compiler_is_taken_where_one_fails(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", compiler_script(tmp_path / "broken", "exit 1"))
    assert native_build.library() is not None


@pytest.mark.parametrize(
    "trouble",
    ["no compiler", "one that fails", "a source it refuses", "its own OpenMP", "other threads", "another BLAS"],
)
def test_without_what_it_needs_there_is_none_and_training_goes_on(cache, tmp_path, monkeypatch, request, trouble):
    message = None
    if trouble == "no compiler":
        request.getfixturevalue("no_compiler")
    elif trouble == "one that fails":
        broken = compiler_script(tmp_path / "broken", "echo out of luck >&2; exit 1")
        monkeypatch.setattr(native_build, "find_compilers", lambda: [broken])
        message = "out of luck"
    elif trouble == "a source it refuses":
        monkeypatch.setattr(native_build, "_SOURCES", tmp_path)
        (tmp_path / "bad.cpp").write_text("this is no C++")
        message = "error"
    elif trouble == "its own OpenMP":
        flags = [flag for flag in native_build._FLAGS if flag != "-fopenmp"]
        monkeypatch.setattr(native_build, "_SOURCES", tmp_path)
        (tmp_path / "other.cpp").write_text("int x;")
        monkeypatch.setattr(native_build, "_FLAGS", flags)
        message = "an OpenMP of its own"
    elif trouble == "other threads":
        monkeypatch.setattr(native_build, "_threads_are_gnu", lambda: False)
    else:
        monkeypatch.setattr(native_build, "_mkl", lambda: None)
    with pytest.warns(RuntimeWarning, match=f"in C\\+\\+ are not there: .*{message}") if message else nullcontext():
        assert native_build.library() is None
    assert not native.is_available()
    plan = describe_backend(IntegratorConfig(backend="native"), torch.device("cpu"), is_compiled=False)
    for said in (plan, calls.describe(is_compiled=False)):
        reason = str(said).partition("GNU's OpenMP")[2]
        assert (message in reason and reason.startswith(" (here: ")) if message else not reason
    train_by_either_way()


@pytest.mark.parametrize("trouble", ["a file in its place", "no home", "a full disk"])
def test_a_cache_that_cannot_be_used_costs_a_compilation_and_nothing_else(cache, tmp_path, monkeypatch, trouble):
    if trouble == "a file in its place":
        (tmp_path / "cache").write_text("")
    elif trouble == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    else:
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    assert native_build.library() is not None
    assert not list(cache.iterdir() if cache.is_dir() else [])


def test_processes_that_start_together_do_not_disturb_each_other(tmp_path):
    code = "import sys, pathlib\nfrom inl_core.model.native import build\nbuild._SOURCES = pathlib.Path(sys.argv[1])\n"
    code += "assert build.library() is not None"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    sources = str(small_library(tmp_path))
    started = [subprocess.Popen([sys.executable, "-c", code, sources], env=environment) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    assert len(list((tmp_path / "inl").iterdir())) == 1


def test_without_onednns_kernel_the_other_is_taken(monkeypatch):
    monkeypatch.setattr(native_build, "_BRGEMM", "no_such_function")
    native_build.library.cache_clear()
    try:
        assert native_build.library() is not None
        assert not native_build.library().has_brgemm(torch.float32)
        train_by_either_way()
    finally:
        native_build.library.cache_clear()


def test_the_model_is_there_without_the_compiler():
    """torch._dynamo takes a second to import, and Triton with it; a command that compiles nothing does without."""
    code = "import sys, inl_core.model; sys.exit(any(name in sys.modules for name in ('torch._dynamo', 'triton')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
