"""Small matrix products in one thread, by MKL's sgemm and by oneDNN's brgemm, as the operations in C++ call them.

    .venv/bin/python benchmarks/products.py        # needs a C++ compiler

GFLOP/s, the best of 20 turns of many calls each. Matrices stay in the core's own cache; a call from Python adds a
microsecond or two to each product.
"""

import ctypes
import time
from collections.abc import Callable

import torch
from inl_core.model.native.build import library

SIZES = ((256, 640, 128), (64, 640, 128), (256, 384, 64), (64, 64, 512), (64, 2048, 128), (1024, 512, 512))
TURNS, SECONDS = 20, 0.02


def main() -> None:
    """Print the table."""
    found = library()
    if found is None or not found.has_brgemm(torch.float32):
        raise SystemExit("the operations in C++, or oneDNN's product, are not there")
    blas, number, pointer = found.blas(torch.float32), ctypes.c_int64, ctypes.c_void_p
    brgemm = ctypes.CFUNCTYPE(None, *[number] * 6, ctypes.c_bool, *[pointer] * 3, ctypes.c_bool)(blas.brgemm)
    sgemm = ctypes.CFUNCTYPE(None, *[pointer] * 13)(blas.gemm)
    ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(blas.set_threads)(1)
    print("| m x n x k | MKL's sgemm | oneDNN's brgemm |\n|---|---|---|")
    for m, n, k in SIZES:
        left, right, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)
        places = [tensor.data_ptr() for tensor in (left, right, out)]
        sizes = [ctypes.c_int(size) for size in (n, m, k)]  # column-major: of the transposes
        one, zero, plain = ctypes.c_float(1), ctypes.c_float(0), ctypes.c_char(b"N")
        words = [plain, plain, *sizes, one, places[1], sizes[0], places[0], sizes[2], zero, places[2], sizes[0]]
        arguments = [word if isinstance(word, int) else ctypes.addressof(word) for word in words]
        by_mkl = rate(lambda arguments=arguments: sgemm(*arguments), m * n * k)
        torch.testing.assert_close(out, left @ right, rtol=1e-4, atol=1e-3)
        by_onednn = rate(lambda a=(m, n, k, k, n, n, False, *places, False): brgemm(*a), m * n * k)
        torch.testing.assert_close(out, left @ right, rtol=1e-4, atol=1e-3)
        print(f"| {m:,} x {n:,} x {k} | {by_mkl:.1f} | {by_onednn:.1f} |")


def rate(call: Callable[[], None], size: int) -> float:
    """GFLOP/s of a product of m n k = `size`."""
    calls = max(1, round(SECONDS * 50e9 / size))
    best = float("inf")
    for _ in range(TURNS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return 2e-9 * size / best


if __name__ == "__main__":
    main()
