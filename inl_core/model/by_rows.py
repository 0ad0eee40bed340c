"""What hand-written forward and backward passes share: they go over the tokens a few rows at a time, so that what lies
between two operations stays in the processor's cache, and take autocast's precision in matrix products alone.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

_MOST_CHUNKS = 64


def row_chunks(x: Tensor, width: int, chunk_bytes: int) -> Iterator[slice]:
    """Rows of x that are worked on together: on a CPU at least 16, and at most 64 times; a GPU takes all at once.

    All but the last are equally many, and the last nearly: no small rest for which products are slow.

    Args:
        x: (N, ...), whose device and element size count.
        width: elements a row of the tensor that must fit.
        chunk_bytes: bytes of it at a time.
    """
    count = x.shape[0]
    rows = max(count, 1)
    if x.device.type == "cpu":
        most = max(16, chunk_bytes // (width * x.element_size()), _ceiling(count, _MOST_CHUNKS))
        rows = max(16, _ceiling(count, _ceiling(count, most)))
    for start in range(0, count, rows):
        yield slice(start, min(start + rows, count))


def _ceiling(count: int, parts: int) -> int:
    return -(-count // max(parts, 1))


def matrix_dtype(x: Tensor) -> torch.dtype:
    """The precision of the matrix products: autocast's where it is on, else the state's."""
    kind = x.device.type
    if x.is_meta:  # has no autocast
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right; in one operation where the precisions agree, and never summed in the lower one."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)
