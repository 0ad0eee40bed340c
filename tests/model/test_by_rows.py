"""Chunks of rows: each row once and in order, none too large, none much smaller than the others."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from inl_core.model.by_rows import row_chunks


@given(count=st.integers(0, 5000), width=st.integers(1, 3000), kilobytes=st.integers(1, 4096))
def test_chunks_of_rows(count, width, kilobytes):
    found = list(row_chunks(torch.empty(count, 1), width, kilobytes * 1024))
    assert [row for where in found for row in range(where.start, where.stop)] == list(range(count))
    sizes = [where.stop - where.start for where in found]
    assert len(sizes) <= 64
    if len(sizes) > 1:
        most = max(16, kilobytes * 1024 // (4 * width), -(-count // 64))
        assert max(sizes) <= most
        assert len(set(sizes[:-1])) == 1
        assert max(sizes) == 16 or sizes[-1] > max(sizes) - len(sizes)
