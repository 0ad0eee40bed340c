"""The structures that the operations in C++ are called with: whole numbers, doubles, products, addresses of tensors.

Each has the fields of the struct of its name in the operation's source, in the same order.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

INPUTS = ("x", "v", "hoisted", "candidate", "inner", "outer", "bias", "mu", "forcing", "fraction")
"""The integrator's inputs, which may need gradients."""
RESULTS = ("x_out", "v_out", "speed", "energy")
"""The integrator's results, which may have gradients."""


class Blas(ctypes.Structure):
    """Addresses of the functions that the library calls, MKL's and oneDNN's; common.h has the same fields."""

    _fields_ = (("gemm", ctypes.c_void_p), ("set_threads", ctypes.c_void_p), ("brgemm", ctypes.c_void_p))


def _structure(name: str, numbers: Sequence[str], doubles: Sequence[str], pointers: Sequence[str]) -> Any:
    of_type = ((numbers, ctypes.c_int64), (doubles, ctypes.c_double), (("blas",), Blas), (pointers, ctypes.c_void_p))
    return type(name, (ctypes.Structure,), {"_fields_": [(field, kind) for names, kind in of_type for field in names]})


Attention = _structure(
    "Attention",
    ("threads", "batch", "length", "heads", "key_heads", "size", "tables"),
    ("scale",),
    ("packed", "cosines", "sines", "first", "out", "log_sums", "grad_out", "grad_packed"),
)
Integrator = _structure(
    "Integrator",
    ("threads", "rows", "dim", "width", "groups", "iterations", "kept", "activation", "tile"),
    ("stride", "kappa", "beta_max", "power"),
    (
        "speed_weights",
        *INPUTS,
        "hidden",
        *RESULTS,
        *(f"grad_{name}" for name in RESULTS),
        *(f"grad_{name}" for name in INPUTS),
    ),
)
STRUCTURES = {"attention": Attention, "integrator": Integrator}
"""By the names under which the library tells their sizes."""


def check_sizes(code: ctypes.CDLL) -> None:
    """Assert that each structure has the size it has in C++; else addresses would be read from the wrong places."""
    for name, kind in STRUCTURES.items():
        size_of = getattr(code, f"size_of_{name}")
        size_of.restype = ctypes.c_int64
        size = size_of()
        assert size == ctypes.sizeof(kind), f"{name}: {size} bytes in C++, {ctypes.sizeof(kind)} in Python"
