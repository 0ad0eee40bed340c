"""Whatever the input is: it is read, or set aside with a reason, or refused in one line; in bounded time and memory."""

import codecs
import gzip
import io
import json
import os
import random
import resource
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from inl_core.corpus import readers
from inl_core.corpus.dataset import TokenDataset
from inl_core.corpus.formats import sniff
from inl_core.corpus.manifest import default_directory, load_manifest
from inl_core.corpus.paths import local_path, matches, portable, shown
from inl_core.corpus.preparation import prepare, verify
from inl_core.corpus.rows import BadRow, Document
from inl_core.corpus.sources import documents
from inl_core.corpus.tokenizer import train_tokenizer
from inl_core.errors import ArtefactError, InlError, RecipeError
from tests.corpus.texts import settings

NOT_UTF8 = os.fsdecode(b"na\xffme\n.txt")


def texts(*sources: object, notes: list[str] | None = None) -> list[str]:
    items = documents([str(source) for source in sources], note=(notes if notes is not None else []).append)
    return [item.texts[0] for item in items if isinstance(item, Document)]


def bad_rows(path: Path) -> list[str]:
    return [item.reason for item in documents([str(path)]) if isinstance(item, BadRow)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with links of every kind, hidden files, a FIFO and what has no suffix."""
    root = tmp_path / "root"
    for name in ("one.txt", "sub/two.TXT", ".hidden/three.txt", "../outside/four.txt", "README"):
        (root / name).parent.mkdir(exist_ok=True, parents=True)
        (root / name).write_text(f"text of {Path(name).stem}")
    (root / "linked").symlink_to("../outside")
    (root / "sub" / "loop").symlink_to("..")
    (root / "up").symlink_to("../..")
    (root / "broken.txt").symlink_to("nowhere.txt")
    (root / "again.txt").symlink_to("one.txt")
    os.mkfifo(root / "pipe.txt")
    return root


def test_linked_directories_are_read_and_what_is_not_has_a_line(tree: Path) -> None:
    notes: list[str] = []
    assert sorted(texts(tree, notes=notes)) == ["text of four", "text of one", "text of two"]
    assert f"{tree}: 3 text files; left out: 1 without a suffix, 1 broken link, 1 not a regular file" in notes
    (passed,) = [note for note in notes if "passed over" in note]
    links = [f"1 link to a directory above it ({name})" for name in ("loop", "up")]
    assert all(what in passed for what in ["1 hidden directory .hidden", *links])


@pytest.mark.parametrize("pattern", ["*", "**", "**/*"])
def test_a_glob_reads_the_directories_it_matches(tree: Path, pattern: str) -> None:
    notes: list[str] = []
    found = texts(tree / pattern, notes=notes)
    assert sorted(found) == ["text of README", "text of four", "text of one", "text of two"]
    assert any("broken link" in note for note in notes)
    assert sorted(texts(tree / "**/*.TXT")) == ["text of two"]


def test_links_in_circles_end(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text(name)
    (tmp_path / "a" / "to-b").symlink_to("../b")
    (tmp_path / "b" / "to-a").symlink_to("../a")
    (tmp_path / "b" / "to-itself").symlink_to(".")
    assert sorted(texts(tmp_path)) == ["a", "b"]
    assert sorted(texts(tmp_path / "**/*.txt")) == ["a", "b"]
    assert matches(str(tmp_path / "**/to-b/*.txt"))


def test_an_unreadable_directory_is_an_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str):
        if str(path).endswith("sub"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ArtefactError, match="sub: cannot be read: Permission denied"):
        texts(tree)


REFUSED = [
    ("", "an empty source"),
    ("a\0b", "NUL byte"),
    ("~nobody-of-this-name/x", "no home directory is known"),
    ("x" * 5000, "no such file"),
    ("broken.txt", "a link to nowhere"),
    ("pipe.txt", "not a regular file"),
    ("/dev/zero", "not a regular file"),
    ("none*", "matches no file"),
]


@pytest.mark.parametrize(("source", "message"), REFUSED)
def test_a_source_that_names_nothing_is_refused(
    tree: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tree)
    with pytest.raises(RecipeError, match=message) as error:
        texts(source)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"."):  # by the settings already, or by the preparation
        prepare(settings(source), tree.parent / "out")


def test_the_output_is_no_source_and_a_home_directory_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("some text\n" * 40)
    manifest = prepare(settings("~"), tmp_path / "out")
    assert prepare(settings(tmp_path), tmp_path / "out") == manifest  # the same source by another name
    for source in (tmp_path / "out", tmp_path / "out" / "quarantine.jsonl"):
        with pytest.raises(RecipeError, match="belongs to the output directory"):
            prepare(settings(source), tmp_path / "out", overwrite=True)


def test_names_that_are_not_utf8_go_through_a_whole_preparation(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / NOT_UTF8).write_text("good text\n" * 30)
    (source / f"bad{NOT_UTF8}").write_bytes(b"\xff")
    (source / f"{NOT_UTF8}.jsonl").write_text("{\n" + '{"text": "\\ud800"}\n' + '{"\\ud800": 1}\n')
    notes: list[str] = []
    chosen = settings(source, max_bad_ratio=1)
    manifest = prepare(chosen, tmp_path / "out", progress=lambda event: notes.append(event.message or ""))
    assert manifest.quarantined == 4
    rows = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text("utf-8").splitlines()]
    assert all(r"na\xffme\n.txt" in row["origin"] for row in rows)
    "".join(notes).encode()
    assert verify(tmp_path / "out", settings=chosen) == manifest
    (source / NOT_UTF8).write_text("other text")
    with pytest.raises(ArtefactError, match=r"stale: .*changed"):
        verify(tmp_path / "out")


def test_a_source_whose_own_name_is_not_utf8_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / NOT_UTF8
    path.write_text("good text\n" * 30)
    source = portable(str(path))
    source.encode()
    assert local_path(source) == path
    assert portable("plain é.txt") == "plain é.txt"
    assert shown(path).endswith(r"na\xffme\n.txt")
    chosen = settings(source)
    str(default_directory(chosen)).encode()
    prepare(chosen, tmp_path / "out")
    assert load_manifest(tmp_path / "out").sources[0].path == source
    verify(tmp_path / "out", settings=chosen)


def test_a_data_set_may_lie_where_the_name_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good text\n" * 300)
    directory = tmp_path / os.fsdecode(b"out\xff")
    manifest = prepare(settings(tmp_path / "a.txt"), directory)
    assert verify(directory, deep=True) == manifest
    assert TokenDataset.open(directory).num_tokens == manifest.splits["train"].tokens


CODINGS = ["rot13", "hex", "zlib", "bz2", "base64", "uu", "quopri", "idna", "punycode", "undefined", "unicode_escape"]
CODINGS += ["raw_unicode_escape", "mbcs", "oem", "klingon", "\xff", "utf-16", "utf-32", "utf-7", "utf_8_sig"]


@pytest.mark.parametrize("coding", CODINGS)
def test_a_program_in_an_odd_encoding_is_one_bad_row(tmp_path: Path, coding: str) -> None:
    path = tmp_path / "legacy.py"
    path.write_bytes(f"# -*- coding: {coding} -*-\ncevag('uryyb') +2AA-".encode("latin-1"))
    items = list(documents([str(path)]))
    assert [type(item) for item in items] == [Document if coding == "utf_8_sig" else BadRow]


def test_a_long_first_line_of_a_program_is_not_held_against_it(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = '" + "é" * 50_000 + "'\n", encoding="utf-8")
    assert len(texts(tmp_path)) == 1


WIDE = {
    "utf-16": codecs.BOM_UTF16_LE + "text".encode("utf-16-le"),
    "utf-16-be": codecs.BOM_UTF16_BE + "text".encode("utf-16-be"),
    "no mark": "text".encode("utf-16-le"),
    "nul": b"text\0",
    "cut": "text é".encode()[:-1],
}


@pytest.mark.parametrize("content", WIDE.values(), ids=WIDE)
def test_what_is_not_utf8_text_says_why(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    (reason,) = bad_rows(tmp_path / "a.txt")
    assert "UTF-16" in reason or "byte 5: unexpected end of data" in reason


def lines_of(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


SNIFFED = [
    (b"\n \n\r\n" + lines_of({"text": "a"}), ("jsonl", None)),
    (b"\xef\xbb\xbf\n" + lines_of({"text": "a"}), ("jsonl", None)),
    (gzip.compress(lines_of({"text": "a"}), mtime=0), ("jsonl", "gz")),
    (zstandard.compress(b"plain"), ("text", "zst")),
    (b'{"text": "a", "text": "b"}\n', ("jsonl", None)),
    (b'"a string"\n', ("text", None)),
    (b"[a link](b)\n", ("text", None)),
    (b"{ a block }\n", ("text", None)),
    (b"[[1, 2], [3]]\n", ("text", None)),
    (b"[" * 100_000, ("text", None)),
    (b"", ("text", None)),
]


@pytest.mark.parametrize(("content", "format"), SNIFFED)
def test_content_tells_the_format(tmp_path: Path, content: bytes, format: tuple[str, str | None]) -> None:
    (tmp_path / "a").write_bytes(content)
    assert sniff(tmp_path / "a", "a") == format


@pytest.mark.parametrize("content", [b'[{"text": "a"}]', b"[\n{}]", b'{\n"text": "a"}', b'{"text":\n "a"}', b"[{\n"])
def test_json_of_another_kind_is_refused_not_guessed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(RecipeError, match="write one object a line"):
        sniff(tmp_path / "a", "a")


def test_json_lines_in_every_dress(tmp_path: Path) -> None:
    mark, (first, second) = b"\xef\xbb\xbf", (lines_of({"text": "a\u2028b"}), b'{"text": "\xe2\x80\xa8 c"}\r\n')
    (tmp_path / "a.jsonl").write_bytes(mark + b"\r\n" + first + mark + second)
    assert texts(tmp_path / "a.jsonl") == ["a\u2028b", "\u2028 c"]


BAD_VALUES = [None, 1, 1.5, True, "s", [], {}, [[]], [None], [1], ["s"], [[{}]], {"role": "assistant"}]
BAD_MESSAGES = [
    *([{"role": value, "content": "x"}, {"role": "assistant", "content": "y"}] for value in [*BAD_VALUES, ["user"]]),
    *([{"role": "assistant", "content": value}] for value in BAD_VALUES if value != "s"),
    *BAD_VALUES,
]


@pytest.mark.parametrize("messages", BAD_MESSAGES, ids=repr)
def test_a_conversation_of_any_shape_is_a_bad_row(tmp_path: Path, messages: object) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of({"messages": messages}))
    (reason,) = bad_rows(tmp_path / "a.jsonl")
    assert "messages" in reason or "message " in reason or "content" in reason


def nested(depth: int) -> bytes:
    return b'{"text": ' + b"[" * depth + b"]" * depth + b"}"


ODD_LINES = [
    (b'{"text": "a", "text": "b"}', "the key 'text' stands twice"),
    (b'{"text": "a", "meta": {"k": 1, "k": 2}}', "the key 'k' stands twice"),
    (b'{"text": ' + b"9" * 5000 + b"}", "not JSON: Exceeds"),
    (nested(500), "`text` is list"),
    (nested(100_000), "nested too deeply"),
    (b'{"prompt": null, "completion": "a"}', "`prompt` is NoneType"),
    (b'{"' + b"k" * 100_000 + b'": 1}', "has none of text"),
    (b'{"\\ud800": 1}', "has none of text"),
    (b'{"text": NaN}', "`text` is float"),
]


@pytest.mark.parametrize(("line", "reason"), ODD_LINES, ids=[reason for _, reason in ODD_LINES])
def test_an_odd_line_is_a_bad_row_that_can_be_written(tmp_path: Path, line: bytes, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(line)
    (row,) = documents([str(tmp_path / "a.jsonl")])
    assert isinstance(row, BadRow)
    assert reason in row.reason
    f"{row.reason}{row.excerpt}".encode()
    assert len(row.reason) <= 500 * 10


def test_a_line_of_too_many_values_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_LONG_LINE", 100)
    monkeypatch.setattr(readers, "_MAX_VALUES", 50)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": [' + b"[]," * 60 + b"0]}\n")
    assert bad_rows(tmp_path / "a.jsonl") == ["more than 50 values in one row"]


CHAT = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}]
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


def test_parquet_conversations_with_anything_beside_them(tmp_path: Path) -> None:
    rows = [{"messages": [{**message, "at": None, "tags": [str(i)]} for message in CHAT]} for i in range(5)]
    pq.write_table(pa.Table.from_pylist([*rows, {"messages": None}, {"messages": []}]), tmp_path / "a.parquet")
    items = list(documents([str(tmp_path / "a.parquet")]))
    assert [item.texts for item in items if isinstance(item, Document)] == [("ask", "tell")] * 5
    assert [item.origin.rpartition(":")[2] for item in items if isinstance(item, BadRow)] == ["6", "7"]


def test_parquet_with_two_columns_of_one_name_is_refused(tmp_path: Path) -> None:
    columns = [pa.array(["a"]), pa.array(["b"])]
    pq.write_table(pa.Table.from_arrays(columns, names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(ArtefactError, match="several columns called text"):
        texts(tmp_path / "a.parquet")


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
from inl_core.corpus.sources import documents
from inl_core.errors import ArtefactError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    found = sum(1 for _ in documents([sys.argv[1]]))
except ArtefactError as error:
    found = str(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, found)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("make", "name"), BOMBS, ids=[make.__name__ for make, _ in BOMBS])
def test_a_bomb_takes_neither_the_memory_nor_the_time(tmp_path: Path, make, name: str) -> None:
    make(tmp_path / name)
    command = [sys.executable, "-c", READ_ALL, str(tmp_path / name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    megabytes, found = done.stdout.split(" ", 1)
    assert int(megabytes) < 900, done.stdout
    assert "expand" in found or make is values_bomb


def test_a_value_that_stands_once_and_counts_a_thousand_times_is_refused_before_it_is_made(tmp_path: Path) -> None:
    flat_bomb(tmp_path / "a.parquet")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ArtefactError, match="bytes expand to more than"):
        texts(tmp_path / "a.parquet")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10


def test_zstd_that_ends_inside_a_frame_is_damaged(tmp_path: Path) -> None:
    whole = zstandard.compress(random.Random(0).randbytes(3000).hex().encode())
    for cut in (3, len(whole) // 2, len(whole) - 1):
        (tmp_path / "a.txt.zst").write_bytes(whole + whole[:cut])
        with pytest.raises(ArtefactError, match="damaged zstd data"):
            texts(tmp_path / "a.txt.zst")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text\n" * 30)

    def grow(event) -> None:
        if event.stage == "read" and not event.message:
            path.write_text("other text\n" * 40)

    with pytest.raises(ArtefactError, match=r"a\.txt: changed while it was being read"):
        prepare(settings(path), tmp_path / "out", progress=grow)


def test_one_big_file_is_counted_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inl_core.corpus.ingest.CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(readers, "MAX_DOCUMENT", 1 << 14)
    (tmp_path / "a.txt").write_text("".join(f"line {number}\n" for number in range(60_000)))
    events = []
    prepare(settings(tmp_path / "a.txt"), tmp_path / "out", progress=events.append)
    done = [event.done for event in events if event.stage == "read" and event.total]
    assert len(done) > 8
    assert done == sorted(done)
    assert done[-1] == (tmp_path / "a.txt").stat().st_size
    assert any("training a tokenizer of 300 tokens" in (event.message or "") for event in events)


LONG_WORDS = {
    "dna": lambda generator: "".join(generator.choice("ACGT") for _ in range(100_000)),
    "letters": lambda _: "a" * 100_000,
    "spaces": lambda _: " \n\t" * 30_000,
    "dashes": lambda _: "-=" * 50_000,
    "digits": lambda generator: str(generator.getrandbits(10_000))[:3000] * 30,
    "no spaces": lambda generator: "".join(chr(generator.randrange(0x4E00, 0x4F00)) for _ in range(50_000)),
}


@pytest.mark.parametrize("kind", LONG_WORDS)
def test_a_tokenizer_trains_on_one_long_word(kind: str) -> None:
    text = LONG_WORDS[kind](random.Random(0))
    start = time.process_time()
    tokenizer = train_tokenizer(iter([text]), vocab_size=400)
    assert time.process_time() - start < 10  # of 100,000 characters uncut: minutes
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_ordinary_text_trains_the_same_tokenizer_cut_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join(f"word{number} and_more" for number in range(2000))
    cut = train_tokenizer(iter([text]), vocab_size=400)
    monkeypatch.setattr("inl_core.corpus.tokenizer._LONGEST_WORD", 1 << 30)
    assert train_tokenizer(iter([text]), vocab_size=400).fingerprint == cut.fingerprint


@pytest.mark.parametrize("stdin", [None, io.StringIO()])
def test_a_closed_stdin_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stdin: io.StringIO | None) -> None:
    if stdin:
        stdin.close()
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(InlError, match="stdin, which is closed"):
        prepare(settings("-"), tmp_path / "out")
