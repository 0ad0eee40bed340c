"""Every kind of input gives the same documents, and every bad row its place and reason."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from inl_core.corpus import readers
from inl_core.corpus.rows import BadRow, Document
from inl_core.corpus.sources import documents
from inl_core.errors import ArtefactError, RecipeError


def write_rows(path: Path, rows: list[dict]) -> None:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines[:30]) + gzip.compress(lines[30:]))
    elif path.suffix == ".zst":
        path.write_bytes(zstandard.compress(lines[:30]) + zstandard.compress(lines[30:]))
    else:
        path.write_bytes(lines)


CHAT = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}]
KINDS = {
    "text": ([{"text": f"row {i} é", "id": i} for i in range(5)], [(f"row {i} é",) for i in range(5)], ""),
    "prompt": ([{"prompt": "p", "completion": f"c{i}"} for i in range(5)], [("p", f"c{i}") for i in range(5)], "pc"),
    "messages": ([{"messages": CHAT} for _ in range(5)], [("ask", "tell")] * 5, "ua"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_each_kind_and_format(tmp_path: Path, kind: str, suffix: str) -> None:
    rows, texts, roles = KINDS[kind]
    path = tmp_path / f"rows{suffix}"
    write_rows(path, rows)
    found = list(documents([str(path)]))
    assert [(d.texts, d.roles) for d in found if isinstance(d, Document)] == [(t, roles) for t in texts]
    assert [d.origin for d in found] == [f"{path}:{number}" for number in range(1, 6)]


@pytest.mark.parametrize("suffix", [".txt", ".md", ".txt.gz", ".txt.zst"])
def test_a_text_file_is_one_document_as_it_stands(tmp_path: Path, suffix: str) -> None:
    text = "line\r\nwith é\n\n  spaces \u2028 end"
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(suffix).suffix, bytes)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(b"\xef\xbb\xbf" + text.encode()))  # with a byte order mark, which is no text
    assert [d.texts for d in documents([str(path)]) if isinstance(d, Document)] == [(text,)]


def test_a_long_text_is_cut_at_line_ends_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_DOCUMENT", 100)
    monkeypatch.setattr(readers, "_BLOCK", 37)  # odd, so that characters fall across blocks
    text = "".join(f"line {i} é🙂\n" for i in range(60)) + "x" * 250
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}))
    for name in ("long.txt", "long.jsonl"):
        pieces = [d.texts[0] for d in documents([str(tmp_path / name)]) if isinstance(d, Document)]
        assert "".join(pieces) == text
        assert all(len(piece) <= 100 for piece in pieces)
        assert sum(not piece.endswith("\n") for piece in pieces) == 3


def test_a_directory_is_read_in_order_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a.py", "sub/c.md", ".hidden.txt", "__pycache__/d.py", "picture.png", "sub/.git/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"text of {name}")
    notes: list[str] = []
    found = [d.origin for d in documents([str(tmp_path), str(tmp_path / "b.txt")], note=notes.append)]
    assert found == [str(tmp_path / name) for name in ("a.py", "b.txt", "sub/c.md")]
    assert f"{tmp_path}: 3 text files; left out: 1 .png" in notes
    assert "1 files were named more than once and are read once" in notes
    pattern = [d.origin for d in documents([str(tmp_path / "**/*.md")])]
    assert pattern == [str(tmp_path / "sub/c.md")]


def test_builtin_python_is_sources_and_topics() -> None:
    found = [d for d in documents(["builtin:python"]) if isinstance(d, Document)]
    origins = [d.origin for d in found]
    assert "python:argparse.py" in origins
    assert "pydoc:assert" in origins
    assert not [o for o in origins if "/test/" in o or "/tests/" in o or "site-packages" in o or "topics.py" in o]
    assert sum(len(d.texts[0]) for d in found) > 5_000_000


BAD_LINES = [
    (b"{broken", "not JSON"),
    (b"[1]", "a JSON list, not an object"),
    (b'{"text": 5}', "`text` is int, not a string"),
    (b'{"text": null}', "`text` is NoneType, not a string"),
    (b'{"body": "x"}', "no `text`; has body"),
    (b'{"text": "\\ud800"}', "lone surrogate U+D800"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b"[" * 100_000, "not JSON"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_bad_line_is_set_aside_with_its_place_and_reason(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good too"}')
    first, bad, last = documents([str(path)])
    assert isinstance(bad, BadRow)
    assert bad.origin == f"{path}:3"
    assert reason in bad.reason
    assert len(bad.excerpt) <= 1000
    bad.excerpt.encode()
    assert (first.origin, last.origin) == (f"{path}:1", f"{path}:4")


BAD_CHATS = [
    ([], "not a list"),
    ("hi", "not a list"),
    ([{"role": "user", "content": "q"}], "not the assistant's"),
    ([{"role": "robot", "content": "q"}], "role 'robot' is none of system, user, assistant"),
    ([{"role": "assistant", "content": ["part"]}], "`content` is list, not a string"),
    ([{"role": "assistant"}], "no `content`"),
    ([{"role": "assistant", "content": ""}], "empty: nothing to train on"),
    (["q"], "message 0 is str"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD_CHATS)
def test_a_bad_conversation_is_set_aside(tmp_path: Path, messages: object, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": messages}))
    (bad,) = documents([str(path)])
    assert isinstance(bad, BadRow)
    assert reason in bad.reason


def test_a_text_file_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 10)
    (tmp_path / "cookie.py").write_bytes("# coding: latin-1\ns = 'caf\xe9'\n".encode("latin-1"))
    (tmp_path / "nonsense.py").write_bytes(b"# coding: klingon\n")
    by_name = {Path(item.origin).name: item for item in documents([str(tmp_path)])}
    assert isinstance(by_name["latin.txt"], BadRow)
    assert "not UTF-8 text" in by_name["latin.txt"].reason
    assert isinstance(by_name["nonsense.py"], BadRow)
    python = by_name["cookie.py"]
    assert isinstance(python, Document)
    assert "café" in python.texts[0]


def test_a_line_too_long_is_skipped_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "MAX_LINE", 64)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + '{"text": "' + "b" * 200 + '"}\n{"text": "c"}\n')
    items = list(documents([str(path)]))
    assert [type(item) for item in items] == [Document, BadRow, Document]


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
        list(documents([str(path)]))
    assert str(path) in str(error.value)


USAGE = [
    ("missing.txt", "no such file or directory"),
    ("nothing/*.txt", "matches no file"),
    ("empty", "no text, .jsonl or .parquet file in this directory"),
    ("array.json", "write one object a line"),
    ("archive.tar.gz", "unknown kind of compressed file"),
]


@pytest.mark.parametrize(("name", "message"), USAGE)
def test_a_source_that_cannot_be_used_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "array.json").write_text("[\n1]")
    (tmp_path / "archive.tar.gz").write_bytes(b"")
    with pytest.raises(RecipeError, match=message):
        list(documents([str(tmp_path / name)]))


def test_near_names_are_suggested(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(RecipeError, match=r"did you mean .*corpus\.txt\?"):
        list(documents([str(tmp_path / "corpsu.txt")]))
    with pytest.raises(RecipeError, match="did you mean builtin:python"):
        list(documents(["builtin:pyhton"]))


def test_zstd_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt.zst"
    path.write_bytes(zstandard.compress(b"x"))
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(RecipeError, match=r'pip install "inl\[compression\]"'):
        list(documents([str(path)]))
