"""Text files and JSON Lines give the same documents in every form, and every bad row has its place and its reason."""

import codecs
import gzip
import json
from pathlib import Path

import pytest
import zstandard

from inl_core.corpus.reading import jsonl, pieces
from inl_core.corpus.reading import text as text_reader
from inl_core.corpus.reading.formats import format_of_content
from inl_core.corpus.reading.rows import BadRow, Document, named_forms
from inl_core.corpus.reading.sources import read_source, resolve_sources
from inl_core.errors import ArtefactError, RecipeError
from inl_core.recipe.data import ColumnSettings
from tests.corpus.texts import bad_rows, documents, lines_of, texts, write_rows

CHAT = [{"role": "user", "content": "ask"}, {"role": "assistant", "content": "tell"}]


SHARED = [{"from": "system", "value": "be brief"}, {"from": "human", "value": "ask"}, {"from": "gpt", "value": "tell"}]
KINDS = {
    "ShareGPT": ([{"id": "1", "conversations": SHARED} for _ in range(5)], [("be brief", "ask", "tell")] * 5, "sua"),
    "Alpaca": (
        [{"instruction": f"do {i}", "input": "this" if i % 2 else "", "output": "done"} for i in range(5)],
        [(f"do {i}\n\nthis" if i % 2 else f"do {i}", "done") for i in range(5)],
        "ua",
    ),
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
    found = list(documents(path))
    assert [(d.texts, d.roles) for d in found if isinstance(d, Document)] == [(t, roles) for t in texts]
    assert [d.origin for d in found] == [f"{path}:{number}" for number in range(1, 6)]


@pytest.mark.parametrize("suffix", [".txt", ".md", ".txt.gz", ".txt.zst"])
def test_a_text_file_is_one_document_as_it_stands(tmp_path: Path, suffix: str) -> None:
    text = "line\r\nwith é\n\n  spaces \u2028 end"
    pack = {".gz": gzip.compress, ".zst": zstandard.compress}.get(Path(suffix).suffix, bytes)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(pack(b"\xef\xbb\xbf" + text.encode()))  # with a byte order mark, which is no text
    assert [d.texts for d in documents(path) if isinstance(d, Document)] == [(text,)]


def test_a_long_text_is_cut_at_line_ends_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "MAX_DOCUMENT", 100)
    monkeypatch.setattr(text_reader, "_BLOCK", 37)  # odd, so that characters fall across blocks
    text = "".join(f"line {i} é🙂\n" for i in range(60)) + "x" * 250
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": text}))
    for name in ("long.txt", "long.jsonl"):
        found = texts(tmp_path / name)
        assert "".join(found) == text
        assert all(len(piece) <= 100 for piece in found)
        assert sum(not piece.endswith("\n") for piece in found) == 3


def test_a_text_file_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 10)
    (tmp_path / "cookie.py").write_bytes("# coding: latin-1\ns = 'caf\xe9'\n".encode("latin-1"))
    (tmp_path / "nonsense.py").write_bytes(b"# coding: klingon\n")
    by_name = {Path(item.origin).name: item for item in documents(tmp_path)}
    assert isinstance(by_name["latin.txt"], BadRow)
    assert "not UTF-8 text" in by_name["latin.txt"].reason
    assert isinstance(by_name["nonsense.py"], BadRow)
    python = by_name["cookie.py"]
    assert isinstance(python, Document)
    assert "café" in python.texts[0]


CODINGS = ["rot13", "hex", "zlib", "bz2", "base64", "uu", "quopri", "idna", "punycode", "undefined", "unicode_escape"]
CODINGS += ["raw_unicode_escape", "mbcs", "oem", "klingon", "\xff", "utf-16", "utf-32", "utf-7", "utf_8_sig"]


@pytest.mark.parametrize("coding", CODINGS)
def test_a_program_in_an_odd_encoding_is_one_bad_row(tmp_path: Path, coding: str) -> None:
    path = tmp_path / "legacy.py"
    path.write_bytes(f"# -*- coding: {coding} -*-\ncevag('uryyb') +2AA-".encode("latin-1"))
    items = list(documents(path))
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
    assert format_of_content(tmp_path / "a", "a") == format


@pytest.mark.parametrize("content", [b'{\n"text": "a"}', b'{"text":\n "a"}', b"[{\n"])
def test_json_of_another_kind_is_refused_not_guessed(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(RecipeError, match="write one object a line"):
        format_of_content(tmp_path / "a", "a")


def test_json_lines_in_every_dress(tmp_path: Path) -> None:
    mark, (first, second) = b"\xef\xbb\xbf", (lines_of({"text": "a\u2028b"}), b'{"text": "\xe2\x80\xa8 c"}\r\n')
    (tmp_path / "a.jsonl").write_bytes(mark + b"\r\n" + first + mark + second)
    assert texts(tmp_path / "a.jsonl") == ["a\u2028b", "\u2028 c"]


def nested(depth: int) -> bytes:
    return b'{"text": ' + b"[" * depth + b"]" * depth + b"}"


BAD_LINES = [
    (b"{broken", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[1]", "a JSON list, not an object"),
    (b'{"text": 5}', "`text` is int, not a string"),
    (b'{"text": null}', "`text` is NoneType, not a string"),
    (b'{"text": NaN}', "`text` is float"),
    (nested(500), "`text` is list"),
    (nested(100_000), "nested too deeply"),
    (b'{"text": ' + b"9" * 5000 + b"}", "not JSON: Exceeds"),
    (b'{"body": "x"}', "no `text`; has body"),
    (b'{"text": "\\ud800"}', "lone surrogate U+D800"),
    (b'{"text": "\xff"}', "not UTF-8"),
    (b'{"text": "a", "text": "b"}', "the key 'text' stands twice"),
    (b'{"text": "a", "meta": {"k": 1, "k": 2}}', "the key 'k' stands twice"),
]
BAD_FIRST_LINES = [
    (b'{"prompt": null, "completion": "a"}', "`prompt` is NoneType"),
    (b'{"' + b"k" * 100_000 + b'": 1}', "has none of text"),
    (b'{"\\ud800": 1}', "has none of text"),
]
GOOD = b'{"text": "good"}\n\n'


@pytest.mark.parametrize(
    ("before", "line", "reason"),
    [*((GOOD, *bad) for bad in BAD_LINES), *((b"", *bad) for bad in BAD_FIRST_LINES)],
    ids=[reason for _, reason in BAD_LINES + BAD_FIRST_LINES],
)
def test_a_bad_line_is_set_aside_with_its_place_and_reason(
    tmp_path: Path, before: bytes, line: bytes, reason: str
) -> None:
    path, number = tmp_path / "rows.jsonl", before.count(b"\n") + 1
    path.write_bytes(before + line + b'\n{"text": "good too"}')
    *_, bad, last = documents(path)
    assert isinstance(bad, BadRow)
    assert (bad.origin, last.origin) == (f"{path}:{number}", f"{path}:{number + 1}")
    assert reason in bad.reason
    f"{bad.reason}{bad.excerpt}".encode()
    assert len(bad.reason) <= 5000
    assert isinstance(bad.excerpt, str)
    assert len(bad.excerpt) <= 1000


def test_a_line_of_too_many_values_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "_LONG_LINE", 100)
    monkeypatch.setattr(jsonl, "_MAX_VALUES", 50)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": [' + b"[]," * 60 + b"0]}\n")
    assert bad_rows(tmp_path / "a.jsonl") == ["more than 50 values in one row"]


def test_a_line_too_long_is_skipped_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE", 64)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n' + '{"text": "' + "b" * 200 + '"}\n{"text": "c"}\n')
    items = list(documents(path))
    assert [type(item) for item in items] == [Document, BadRow, Document]


BAD_CONVERSATIONS = [
    ([], "not a list"),
    ("hi", "not a list"),
    ([{"role": "user", "content": "q"}], "not the assistant's"),
    ([{"role": "robot", "content": "q"}], "role 'robot' is none of system, user, assistant"),
    ([{"role": "assistant", "content": ["part"]}], "`content` is list, not a string"),
    ([{"role": "assistant"}], "no `content`"),
    ([{"role": "assistant", "content": ""}], "empty: nothing to train on"),
    (["q"], "message 0 is str"),
]


BAD_VALUES = [None, 1, 1.5, True, "s", [], {}, [[]], [None], [1], ["s"], [[{}]], {"role": "assistant"}]


BAD_CONVERSATIONS += [
    *(([{"role": value, "content": "x"}, CHAT[1]], "message 0: role") for value in [*BAD_VALUES, ["user"]]),
    *(([{"role": "assistant", "content": value}], "`content` is") for value in BAD_VALUES if value != "s"),
    *((value, "message") for value in BAD_VALUES),
]


@pytest.mark.parametrize(("messages", "reason"), BAD_CONVERSATIONS, ids=repr)
def test_a_conversation_of_any_other_shape_is_a_bad_row(tmp_path: Path, messages: object, reason: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines_of({"messages": messages}))
    (found,) = bad_rows(tmp_path / "a.jsonl")
    assert reason in found


NAMED = {
    "text": ({"text": "body"}, {"body": "a", "text": "b"}, (("a",), "")),
    "prompts": ({"prompt": "q", "completion": "a"}, {"q": "ask", "a": "tell", "text": "b"}, (("ask", "tell"), "pc")),
    "one of two": ({"completion": "a"}, {"prompt": "ask", "a": "tell"}, (("ask", "tell"), "pc")),
    "messages": ({"messages": "chat"}, {"chat": CHAT, "messages": SHARED}, (("ask", "tell"), "ua")),
    "ShareGPT": ({"messages": "chat"}, {"chat": SHARED}, (("be brief", "ask", "tell"), "sua")),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("case", NAMED)
def test_text_is_looked_for_in_the_columns_that_are_named_and_in_no_others(
    tmp_path: Path, case: str, suffix: str
) -> None:
    names, row, expected = NAMED[case]
    forms = named_forms(ColumnSettings(**names))
    for content, is_there in ((row, True), ({"text": "b", "messages": CHAT}, False)):
        path = tmp_path / f"{is_there}{suffix}"
        write_rows(path, [content])
        (file,) = resolve_sources([str(path)])
        try:
            (item,) = read_source(file, note=lambda text: None, forms=forms)
        except ArtefactError as error:
            item = BadRow("", str(error))
        if is_there:
            assert isinstance(item, Document)
            assert (item.texts, item.roles) == expected
        else:
            assert isinstance(item, BadRow)
            assert "has none of" in item.reason
            assert "text, messages" not in item.reason.split("; has")[0]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "do", "output": ""}, "the last completion is empty"),
        ({"instruction": "do", "input": 3, "output": "done"}, "`input` is int, not a string"),
        ({"conversations": SHARED[:2]}, "the last message is not the assistant's"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "message 0: from 'robot' is none of system, user"),
        ({"conversations": [{"from": "gpt"}]}, "no `value`"),
        ({"conversations": "x"}, "`conversations` is not a list of {role, content} or {from, value}"),
    ],
)
def test_a_bad_row_of_a_foreign_form_says_what_is_wrong(tmp_path: Path, row: dict, reason: str) -> None:
    write_rows(tmp_path / "rows.jsonl", [row])
    (found,) = bad_rows(tmp_path / "rows.jsonl")
    assert reason in found
