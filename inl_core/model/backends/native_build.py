"""The C++ loop (native_loop.cpp) as a library: compiled by this machine's compiler on first use, then kept.

- A second or two, once for each source, compiler and processor: the file's name tells them apart, so machines that
  share a home directory but not a processor each get their own. Kept in $XDG_CACHE_HOME/inl, else ~/.cache/inl, or for
  the process alone where that cannot be written.
- Needed: a compiler; GNU's OpenMP in torch, for threads of another kind would compete with torch's own for the
  processor; and a torch with MKL, whose products can be told to use one thread. Without any of them there is no
  library, and callers do without. A compiler that is there and fails is worth a warning.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

_SOURCE = Path(__file__).with_name("native_loop.cpp")
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_LONGEST_BUILD = 120  # seconds


class Library(NamedTuple):
    """The loop, and by address the functions of MKL that it calls."""

    loop: ctypes.CDLL
    gemm: dict[str, int]
    """sgemm and dgemm, by the precision's name"""
    set_threads: int
    """how many threads this thread's products take -> how many it was"""


@lru_cache(maxsize=1)
def library() -> Library | None:
    """The compiled loop, or None where this machine cannot have it."""
    compiler, blas = find_compiler(), _mkl()
    if compiler is None or blas is None or not _threads_are_gnu():
        return None
    try:
        loop = _load(compiler)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or b""
        reason = said.decode(errors="replace").strip().partition("\n")[0] or error
        warnings.warn(
            f"{compiler}: model.integrator.backend native is not there: {reason}", RuntimeWarning, stacklevel=2
        )
        return None
    gemm = {"float32": _address(blas.sgemm_), "float64": _address(blas.dgemm_)}
    return Library(loop, gemm, _address(blas.MKL_Set_Num_Threads_Local))


def find_compiler() -> str | None:
    """$CXX, g++ or c++, whichever is first found."""
    names = [os.environ.get("CXX", ""), "g++", "c++"]
    return next((found for name in names if name and (found := shutil.which(name))), None)


def _mkl() -> ctypes.CDLL | None:
    """torch's own library, if it has the functions of MKL."""
    try:
        found = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None
    return found if all(hasattr(found, name) for name in ("sgemm_", "dgemm_", "MKL_Set_Num_Threads_Local")) else None


def _address(function: Any) -> int:
    found = ctypes.cast(function, ctypes.c_void_p).value
    assert found is not None
    return found


def _threads_are_gnu() -> bool:
    """Whether the OpenMP runtime the library would be linked with is in this process already, as torch's own."""
    try:
        ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except (OSError, AttributeError):  # not loaded; a system without the question
        return False
    return True


def _load(compiler: str) -> ctypes.CDLL:
    name = f"loop-{_fingerprint(compiler)}.so"
    kept = _cache_directory() / name
    if not kept.exists():
        try:
            kept.parent.mkdir(parents=True, exist_ok=True)
            _build(compiler, kept)
        except OSError:  # a home that cannot be written
            with tempfile.TemporaryDirectory(prefix="inl-") as directory:
                _build(compiler, Path(directory) / name)
                return ctypes.CDLL(str(Path(directory) / name))  # stays in memory when its file is gone
    return ctypes.CDLL(str(kept))


def _build(compiler: str, target: Path) -> None:
    """Compile beside the target and move it there whole: ranks that start together may all do so."""
    with tempfile.TemporaryDirectory(prefix=".build-", dir=target.parent) as directory:
        output = Path(directory) / target.name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(output)]
        subprocess.run(command, check=True, capture_output=True, timeout=_LONGEST_BUILD)
        output.replace(target)


def _cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inl"


def _fingerprint(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True, timeout=_LONGEST_BUILD).stdout
    parts = (_SOURCE.read_bytes(), version, " ".join(_FLAGS).encode(), _processor())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    wanted = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(sorted({line for line in lines if line.startswith(wanted)}))
