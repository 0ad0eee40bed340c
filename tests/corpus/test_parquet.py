"""Parquet of every type and encoding is read; columns of other types give bad rows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inl_core.corpus.reading.rows import BadRow, Document
from inl_core.errors import ArtefactError
from tests.corpus.texts import bad_rows, documents, texts

STRINGS = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]


@pytest.mark.parametrize("kind", STRINGS, ids=str)
def test_parquet_strings_of_every_type_are_read(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array(["a", "é🙂", "a"]).cast(kind)
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet") == ["a", "é🙂", "a"]


@pytest.mark.parametrize("encoding", ["PLAIN", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd", "gzip"])
def test_parquet_encodings_are_read(tmp_path: Path, encoding: str, compression: str) -> None:
    rows = [f"common beginning {i}" for i in range(50)]
    options = {"use_dictionary": False, "column_encoding": encoding, "compression": compression}
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet", row_group_size=20, **options)
    assert texts(tmp_path / "a.parquet") == rows


ODD_COLUMNS = [
    pa.array([1, 2]),
    pa.array([b"a", b"\xff"]),
    pa.array([None, None]),
    pa.array([None, None], pa.string()),
    pa.array([{"a": 1}, None]),
    pa.array([["a"], []]),
    pa.array([["a", "b"], ["c", "d"]], pa.list_(pa.string(), 2)),
    pa.array([[("k", "v")], []], pa.map_(pa.string(), pa.string())),
    pa.array([2**62, 0], pa.timestamp("us")),
    pa.array([b"\xff", b"\xfe"]).view(pa.string()),
    pa.array([True, None]),
]


@pytest.mark.parametrize("name", ["text", "messages"])
@pytest.mark.parametrize("column", ODD_COLUMNS, ids=[str(column.type) for column in ODD_COLUMNS])
def test_parquet_columns_of_other_types_are_bad_rows(tmp_path: Path, column: pa.Array, name: str) -> None:
    pq.write_table(pa.table({name: column}), tmp_path / "a.parquet")
    assert len(bad_rows(tmp_path / "a.parquet")) == 2


CHAT = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}]


def test_parquet_conversations_with_anything_beside_them(tmp_path: Path) -> None:
    rows = [{"messages": [{**message, "at": None, "tags": [str(i)]} for message in CHAT]} for i in range(5)]
    pq.write_table(pa.Table.from_pylist([*rows, {"messages": None}, {"messages": []}]), tmp_path / "a.parquet")
    items = list(documents(tmp_path / "a.parquet"))
    assert [item.texts for item in items if isinstance(item, Document)] == [("ask", "tell")] * 5
    assert [item.origin.rpartition(":")[2] for item in items if isinstance(item, BadRow)] == ["6", "7"]


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ArtefactError, match="several columns called text"):
        texts(tmp_path / "a.parquet")
