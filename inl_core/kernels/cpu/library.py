"""The operations in C++ (*.cpp) as one library: compiled by this machine's compiler on first use, then kept (cache.py).

- Some seconds, once for each source, processor, compiler, C library and torch: the file's name tells them apart, so
  machines that share a home directory but not a processor each get their own. A node without a compiler takes what
  another one compiled.
- Needed: a compiler; GNU's OpenMP in torch and in the library, for threads of another kind would compete with torch's
  own for the processor; and a torch with MKL, whose products can be told to use one thread. Where one of them is
  missing there is no library, and `Unavailable` says which. Compilers that are there and all fail are worth a warning.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from inl_core.errors import ExecutionWarning
from inl_core.kernels.cpu import cache
from inl_core.kernels.cpu.structures import Blas, check_sizes

_SOURCES = Path(__file__).parent
"""The directory of *.cpp and *.h."""
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
_LONGEST_BUILD = 120  # seconds
_BRGEMM = "_ZN2at6native7cpublas6brgemmEllllllbPKfS3_Pfb"
"""at::native::cpublas::brgemm(M, N, K, steps of A, B and C, whether to add, A, B, C, false), float32."""


NAMES = {torch.float32: "float32", torch.float64: "float64"}
"""The precisions there are, as the library's functions name them."""


PRODUCTS = ("MKL", "oneDNN")
"""The libraries whose matrix product an operation may call."""


class Library(NamedTuple):
    """The compiled operations, and what they call."""

    code: ctypes.CDLL
    mkl: dict[torch.dtype, Blas]
    onednn: Blas | None
    """oneDNN's product in single precision, where torch has it and it works on this processor."""

    def blas(self, dtype: torch.dtype, product: str) -> Blas:
        """What an operation is to call; MKL's product where oneDNN's is not there."""
        with_onednn = product == "oneDNN" and dtype == torch.float32
        return self.onednn if with_onednn and self.onednn is not None else self.mkl[dtype]

    @property
    def products(self) -> tuple[str, ...]:
        """The products there are, in single precision."""
        return PRODUCTS if self.onednn is not None else PRODUCTS[:1]


class Unavailable(Exception):
    """Why there is no library, in one line."""


def library() -> Library | None:
    """The compiled operations, or None where this machine cannot have them."""
    return _found()[0]


def why_missing() -> str:
    """Why there is no library, in one line; empty where there is one."""
    return _found()[1]


@lru_cache(maxsize=1)
def _found() -> tuple[Library | None, str]:
    try:
        return _opened(), ""
    except Unavailable as error:
        return None, str(error)


def forget() -> None:
    """Look for the library again at the next question, for tests that hide the compiler."""
    _found.cache_clear()


def _opened() -> Library:
    blas = _mkl()
    if blas is None:
        raise Unavailable("this torch has no MKL")
    if not _threads_are_gnu():
        raise Unavailable("this torch has another OpenMP than GNU's")
    code = _opened_kept()
    if code is None:
        compilers = find_compilers()
        if not compilers:
            raise Unavailable("there is no C++ compiler (g++, c++ or $CXX)")
        try:
            code = _compiled(compilers)
        except Unavailable as error:
            warnings.warn(f"the operations in C++ are not there: {error}", ExecutionWarning, stacklevel=2)
            raise
    check_sizes(code)
    set_threads = _address(blas.MKL_Set_Num_Threads_Local)
    gemm = {torch.float32: blas.sgemm_, torch.float64: blas.dgemm_}
    mkl = {dtype: Blas(_address(function), set_threads, None) for dtype, function in gemm.items()}
    return Library(code, mkl, _onednn(code, blas, mkl[torch.float32]))


def _onednn(code: ctypes.CDLL, blas: ctypes.CDLL, known: Blas) -> Blas | None:
    """oneDNN's kernel for small products, where torch exports it and it works here.

    It is what the code that torch.compile writes for a CPU calls; not every build of torch or processor has it.
    """
    function = getattr(blas, _BRGEMM, None)
    if function is None:
        return None
    found = Blas(known.gemm, known.set_threads, _address(function))
    return found if code.brgemm_works(ctypes.byref(found)) else None


def is_to_be_compiled() -> bool:
    """Whether the first call of `library()` will take some seconds, so that a caller can say so."""
    if _found.cache_info().currsize or _mkl() is None or not _threads_are_gnu():
        return False
    return bool(find_compilers()) and _kept() is None


def find_compilers() -> list[str]:
    """$CXX, g++ and c++, those that are there."""
    names = [os.environ.get("CXX", ""), "g++", "c++"]
    return list(dict.fromkeys(found for name in names if name and (found := shutil.which(name))))


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


def _kept() -> bytes | None:
    """The code an earlier process left; one of any compiler where there is none here."""
    return cache.find(f"native-{fingerprint()}-", [_ending(compiler) for compiler in find_compilers()])


def _opened_kept() -> ctypes.CDLL | None:
    code = _kept()
    try:
        return None if code is None else cache.load(code)
    except OSError:  # whole, and yet not for this machine
        return None


def _compiled(compilers: list[str]) -> ctypes.CDLL:
    """The library made by the first compiler that can; Unavailable with the first one's reason."""
    failure: Unavailable | None = None
    for compiler in compilers:
        try:
            with tempfile.TemporaryDirectory(prefix="inl-") as directory:
                code = _build(compiler, Path(directory) / "native.so").read_bytes()
            if b"libgomp" not in code:  # named among the libraries it needs
                raise Unavailable(f"{compiler}: has an OpenMP of its own, where torch has GNU's")
            opened = cache.load(code)
            cache.keep(f"native-{fingerprint()}-{_ending(compiler)}", code)
            return opened
        except Unavailable as error:
            failure = failure or error
        except OSError as error:
            failure = failure or Unavailable(f"{compiler}: {error}")
    assert failure is not None
    raise failure


def _sources(*endings: str) -> list[Path]:
    return sorted(path for path in _SOURCES.iterdir() if path.suffix in endings)


def _build(compiler: str, target: Path) -> Path:
    """Each source by a process of its own, then all as one library."""
    sources = _sources(".cpp")
    objects = [target.with_name(f"{source.stem}.o") for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda pair: _run(compiler, "-c", pair[0], "-o", pair[1]), zip(sources, objects, strict=True)))
    _run(compiler, "-shared", *objects, "-o", target)
    return target


def _run(compiler: str, *arguments: str | Path) -> None:
    command = [compiler, *_FLAGS, *(str(argument) for argument in arguments)]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=_LONGEST_BUILD)
    except subprocess.SubprocessError as error:
        said = getattr(error, "stderr", None) or b""
        reason = said.decode(errors="replace").strip().partition("\n")[0] or error
        raise Unavailable(f"{compiler}: {reason}") from error


def fingerprint() -> str:
    """What the library is made from and made for, except the compiler, in 16 letters."""
    sources = (path.read_bytes() for path in _sources(".cpp", ".h"))
    system = (" ".join(_FLAGS), *platform.libc_ver(), torch.__version__)
    parts = (*sources, *(part.encode() for part in system), _processor())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _ending(compiler: str) -> str:
    """The part of the file's name that tells compilers apart: an updated one has another size or date."""
    path = Path(compiler).resolve()
    found = path.stat()
    mark = f"{path} {found.st_size} {found.st_mtime_ns}"
    return f"{hashlib.sha256(os.fsencode(mark)).hexdigest()[:8]}.so"


def _processor() -> bytes:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
    except OSError:
        return platform.processor().encode()
    wanted = (b"model name", b"flags", b"Features", b"CPU part")
    return b"\n".join(sorted({line for line in lines if line.startswith(wanted)}))
