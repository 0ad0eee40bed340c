"""`inl eval --text` and `inl generate --prompt-file` read what `inl prepare-data` reads, in the same way."""

import gzip
import io
import json
import math
import os
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from inl_core.corpus.loader import IGNORED
from inl_core.corpus.reading import whole_sources
from inl_core.corpus.reading.whole_sources import read_prompts, whole_documents
from inl_core.errors import ArtefactError, InlError, RecipeError
from inl_core.inference.evaluate import evaluate
from inl_core.inference.loading import LoadedModel
from inl_core.inference.texts import Text, open_text
from tests.inference.tiny import TEXT, tiny_model, tokenizer

MARK = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return LoadedModel(tiny_model("v4"), tokenizer(), Path("here"), {})


def lines_of(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def bits(text: Text) -> float:
    model = text.loaded.model
    return evaluate(model, text.windows(window=32), tokenizer().token_num_bytes).loss


def targets(text: Text) -> list[int]:
    found = [batch.targets.reshape(-1) for batch in text.windows(window=32)]
    return [int(token) for row in found for token in row if token != IGNORED]


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_one_text_scores_the_same_in_every_dress(loaded: LoadedModel, tmp_path: Path) -> None:
    plain = open_text(loaded, write(tmp_path / "a.txt", TEXT.encode()))
    dresses = [
        write(tmp_path / "mark.txt", MARK + TEXT.encode()),
        write(tmp_path / "a.txt.gz", gzip.compress(TEXT.encode())),
        write(tmp_path / "a.jsonl", MARK + b"\n" + lines_of({"text": TEXT})),
        write(tmp_path / "without", lines_of({"text": TEXT})),
    ]
    pq.write_table(pa.table({"text": [TEXT]}), tmp_path / "a.parquet")
    for path in [*dresses, tmp_path / "a.parquet"]:
        text = open_text(loaded, path)
        assert targets(text) == targets(plain)
        assert bits(text) == pytest.approx(bits(plain), rel=1e-6)
        assert text.name == str(path)


def test_a_long_text_file_stays_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inl_core.corpus.reading.pieces.MAX_DOCUMENT", 100)
    text = "".join(f"line {number}\n" for number in range(60))
    (document,) = whole_documents(str(write(tmp_path / "a.txt", text.encode())))
    assert document.texts == (text,)
    two = [{"text": text}, {"text": text + "."}]
    assert [d.texts[0] for d in whole_documents(str(write(tmp_path / "a.jsonl", lines_of(*two))))] == [text, text + "."]


def test_several_documents_are_scored_apart_and_prompts_are_not(loaded: LoadedModel, tmp_path: Path) -> None:
    rows = lines_of({"text": "one two"}, {"text": "three"})
    both = open_text(loaded, write(tmp_path / "a.jsonl", rows))
    ids = [[*tokenizer().encode(text), tokenizer().eos_id] for text in ("one two", "three")]
    assert targets(both) == ids[0] + ids[1]
    assert both.name == f"{tmp_path / 'a.jsonl'} (2 documents)"
    rows = lines_of(*({"prompt": "ask", "completion": "tell"} for _ in range(2)))
    prompts = open_text(loaded, write(tmp_path / "b.jsonl", rows))
    assert targets(prompts) == 2 * [*tokenizer().encode("tell"), tokenizer().eos_id]
    assert prompts.name.endswith("(2 documents), completions only")
    assert math.isfinite(bits(prompts))


def test_a_directory_is_read_and_what_is_left_out_is_told(loaded: LoadedModel, tmp_path: Path) -> None:
    for name in ("a.txt", "b.md", "c.bin"):
        write(tmp_path / name, name.encode())
    notes: list[str] = []
    text = open_text(loaded, tmp_path, note=notes.append)
    assert "2 documents" in text.name
    assert notes == [f"{tmp_path}: 2 text files; left out: 1 .bin"]


BAD_TEXTS = [
    ("a.txt", b"text\0", ArtefactError, "NUL bytes"),
    ("a.jsonl", b'{"text": "a"}\n{"text": 1}\n', ArtefactError, r"a\.jsonl:2: `text` is int"),
    ("a.jsonl", b'{"text": ""}\n', ArtefactError, "is empty"),
    ("a.json", b'[{"text": 1}]', ArtefactError, r"a\.json\[0\]: `text` is int"),
    ("a.txt.gz", b"plain", ArtefactError, "damaged gzip"),
    ("a.parquet", b"plain", ArtefactError, "not a readable Parquet file"),
]


@pytest.mark.parametrize(("name", "content", "kind", "message"), BAD_TEXTS)
def test_text_that_cannot_be_scored_is_refused(
    loaded: LoadedModel, tmp_path: Path, name: str, content: bytes, kind: type[InlError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        open_text(loaded, write(tmp_path / name, content))


def test_a_file_of_a_terabyte_is_refused_before_it_is_read(tmp_path: Path) -> None:
    for name in ("huge.txt", "huge.jsonl"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 10**12)
        for read in (read_prompts, whole_documents):
            with pytest.raises(RecipeError, match=f"{name}: 1,000,000,000,000 bytes"):
                read(str(tmp_path / name))


def test_more_text_than_memory_should_hold_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_sources, "MAX_CHARACTERS", 100)
    with pytest.raises(RecipeError, match="inl prepare-data"):
        whole_documents(str(write(tmp_path / "a.txt", b"x" * 101)))


PROMPTS = [
    ("p.txt", MARK + b"the small\r\n\n \nmodel reads\r\n", ["the small", "model reads"]),
    ("p.TXT", b"a\x0cb\xe2\x80\xa8c\n", ["a\x0cb\u2028c"]),
    ("p.txt.gz", gzip.compress(b"one\ntwo", mtime=0), ["one", "two"]),
    ("p.jsonl", MARK + b'\n"a\\nb"\r\n{"prompt": "c", "other": 1}\n', ["a\nb", "c"]),
    ("p.ndjson", b'"a"\n', ["a"]),
    ("p.jsonl.gz", gzip.compress(b'{"prompt": "c"}', mtime=0), ["c"]),
    ("p", b'\n{"prompt": "c"}\n', ["c"]),
    ("-", b'\n\n{"prompt": "c"}\n', ["c"]),
    ("-", MARK + b"x\ny\n", ["x", "y"]),
]


@pytest.mark.parametrize(("name", "content", "prompts"), PROMPTS)
def test_prompts_of_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, prompts: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
    source = name if name == "-" else str(write(tmp_path / name, content))
    assert read_prompts(source) == prompts


def test_prompts_from_parquet_and_long_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(pa.table({"prompt": ["a", "b"], "other": [1, 2]}), tmp_path / "p.parquet")
    assert read_prompts(str(tmp_path / "p.parquet")) == ["a", "b"]
    monkeypatch.setattr("inl_core.corpus.reading.pieces.MAX_DOCUMENT", 10)
    assert read_prompts(str(write(tmp_path / "p.txt", b"x" * 35 + b"\nshort\n"))) == ["x" * 35, "short"]
    with pytest.raises(RecipeError, match=r"p\.txt:1: a line of more than 40 characters"):
        read_prompts(str(write(tmp_path / "p.txt", b"x" * 60)))


BAD_PROMPTS = [
    ("p.txt", b"\xff", r"not UTF-8 text \(byte 0"),
    ("p.txt", b"\n \n", "holds no prompt"),
    ("p.txt", "text".encode("utf-16"), "UTF-16"),
    ("p.jsonl", b'{"prompt": 1}', "neither a string nor an object"),
    ("p.jsonl", b'{"prompt": "a", "prompt": "b"}', "stands twice"),
    ("p.jsonl", b'"\\ud800"', "not UTF-8 text"),
    ("p.jsonl", b"[" * 100_000, "nested too deeply"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_PROMPTS)
def test_a_bad_prompt_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        read_prompts(str(write(tmp_path / name, content)))
    assert name in str(error.value)


@pytest.mark.parametrize("command", [("eval", "--text"), ("generate", "--prompt-file"), ("inspect-params", "--text")])
def test_an_empty_name_is_not_the_current_directory(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, str]
) -> None:
    from typer.testing import CliRunner

    from inl_cli.app import app

    monkeypatch.chdir(workplace)
    result = CliRunner().invoke(app, [*command, ""])
    assert result.exit_code == 2, result.output
    assert "an empty source" in result.stderr


def test_a_prompt_argument_that_is_not_utf8_is_refused(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from inl_cli.app import app

    monkeypatch.chdir(workplace)
    result = CliRunner().invoke(app, ["generate", "--prompt", os.fsdecode(b"a\xff")])
    assert result.exit_code == 2, result.output
    assert "--prompt: not UTF-8 text" in result.stderr
