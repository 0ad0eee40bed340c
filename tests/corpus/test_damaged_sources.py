"""Damaged source files are named, and files that unpack to far too much are refused in bounded time and memory."""

import gzip
import random
import resource
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from inl_core.errors import ArtefactError, RecipeError
from tests.corpus.texts import documents, texts, write_rows


def corrupt_parquet(path: Path) -> None:
    write_rows(path, [{"text": f"{i} " * 500} for i in range(10)])
    content = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(3).column(0)
    start = column.dictionary_page_offset or column.data_page_offset
    content[start : start + column.total_compressed_size] = b"\x00" * column.total_compressed_size
    path.write_bytes(content)


def truncated_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(b'{"text": "some text of a row"}\n' * 500)[:-20])


def flipped_zstd(path: Path) -> None:
    path.write_bytes(zstandard.compress(b'{"text": "some text"}\n' * 500)[:10] + b"\xff" * 30)


DAMAGED = [
    ("rows.parquet", corrupt_parquet, "row group 3 of 5 cannot be read"),
    ("rows.parquet", lambda path: path.write_bytes(b"PAR1 nothing"), "not a readable Parquet file"),
    ("rows.parquet", lambda path: write_rows(path, [{"body": "x"}]), "has none of the columns text"),
    ("rows.jsonl.gz", truncated_gzip, "damaged gzip data"),
    ("rows.txt.gz", lambda path: path.write_bytes(b"plain"), "damaged gzip data"),
    ("rows.jsonl.zst", flipped_zstd, "damaged zstd data"),
]


@pytest.mark.parametrize(("name", "make", "message"), DAMAGED)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, make, message: str) -> None:
    path = tmp_path / name
    make(path)
    with pytest.raises(ArtefactError, match=message) as error:
        list(documents(path))
    assert str(path) in str(error.value)


def test_zstd_that_ends_inside_a_frame_is_damaged(tmp_path: Path) -> None:
    whole = zstandard.compress(random.Random(0).randbytes(3000).hex().encode())
    for cut in (3, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.txt.zst").write_bytes(whole + whole[:cut])
        with pytest.raises(ArtefactError, match="damaged zstd data"):
            texts(tmp_path / "a.txt.zst")


def test_zstd_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"x"))
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(RecipeError, match=r'pip install "inl\[compression\]"'):
        list(documents(path))


def flat_bomb(path: Path) -> None:
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * (16 << 20)]))
    pq.write_table(pa.table({"text": column}), path, compression="zstd", dictionary_pagesize_limit=1 << 30)


def groups_bomb(path: Path) -> None:
    table = pa.table({"text": pa.array(["x" * (16 << 20)])})
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        for _ in range(40):
            writer.write_table(table)


def chat_bomb(path: Path) -> None:
    contents = pa.DictionaryArray.from_arrays(pa.array([0] * 2000, pa.int32()), pa.array(["x" * (16 << 20)]))
    message = pa.StructArray.from_arrays([pa.array(["user"] * 2000), contents], names=["role", "content"])
    column = pa.ListArray.from_arrays(pa.array([0, 2000], pa.int32()), message)
    pq.write_table(pa.table({"messages": column}), path, compression="zstd", dictionary_pagesize_limit=1 << 30)


def prefix_bomb(path: Path) -> None:
    table = pa.table({"text": pa.array(["x" * (16 << 20)] * 20)})
    pq.write_table(table, path, use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY", compression="zstd")


def list_bomb(path: Path) -> None:
    column = pa.ListArray.from_arrays(pa.array([0, 50_000_000], pa.int32()), pa.nulls(50_000_000, pa.string()))
    pq.write_table(pa.table({"text": column}), path)


def gzip_bomb(path: Path) -> None:
    path.write_bytes(gzip.compress(b"x" * (320 << 20), 1))


def zstd_bomb(path: Path) -> None:
    path.write_bytes(zstandard.compress(b"x" * (320 << 20)))


def values_bomb(path: Path) -> None:
    path.write_bytes(b'{"text": [' + b"{}," * (20 << 20) + b"0]}\n")


BOMBS = [
    (flat_bomb, "a.parquet"),
    (groups_bomb, "a.parquet"),
    (chat_bomb, "a.parquet"),
    (prefix_bomb, "a.parquet"),
    (list_bomb, "a.parquet"),
    (gzip_bomb, "a.jsonl.gz"),
    (zstd_bomb, "a.txt.zst"),
    (values_bomb, "a.jsonl"),
]


READ_ALL = """
import resource, sys
from tests.corpus.texts import documents
from inl_core.errors import ArtefactError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    found = sum(1 for _ in documents(sys.argv[1]))
except ArtefactError as error:
    found = str(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, found)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("make", "name"), BOMBS, ids=[make.__name__ for make, _ in BOMBS])
def test_a_bomb_takes_neither_the_memory_nor_the_time(tmp_path: Path, make, name: str) -> None:
    make(tmp_path / name)
    command = [sys.executable, "-c", READ_ALL, str(tmp_path / name)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=True, cwd=Path(__file__).parents[2]
    )
    megabytes, found = done.stdout.split(" ", 1)
    assert int(megabytes) < 900, done.stdout
    assert "expand" in found or make is values_bomb


def test_a_value_that_stands_once_and_counts_a_thousand_times_is_refused_before_it_is_made(tmp_path: Path) -> None:
    flat_bomb(tmp_path / "a.parquet")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtefactError, match="bytes expand to more than"):
        texts(tmp_path / "a.parquet")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10
