"""A JSON array of objects is read like JSON Lines of the same objects, in blocks of any size."""

import gzip
import json
from pathlib import Path

import pytest

from inl_core.corpus.reading import json_array
from inl_core.corpus.reading.rows import BadRow, Document
from inl_core.corpus.reading.whole_sources import read_prompts
from inl_core.errors import ArtefactError, RecipeError
from tests.corpus.texts import documents, texts

ALPACA = [{"instruction": f'Say [{i}], "{i}" or {{{i}}}', "input": "", "output": "é" * i} for i in range(1, 40)]


@pytest.mark.parametrize("block", [1, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 4])
def test_an_array_gives_the_documents_of_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, indent: int | None
) -> None:
    monkeypatch.setattr(json_array, "_BLOCK", block)
    (tmp_path / "a.json").write_text("\ufeff " + json.dumps(ALPACA, indent=indent, ensure_ascii=False) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    found, wanted = list(documents(tmp_path / "a.json")), list(documents(tmp_path / "a.jsonl"))
    assert [(row.texts, row.roles) for row in found if isinstance(row, Document)] == [
        (row.texts, row.roles) for row in wanted if isinstance(row, Document)
    ]
    assert len(found) == len(ALPACA)


def test_packed_arrays_and_prompts_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "packed").write_bytes(gzip.compress(json.dumps([{"text": "one"}, {"text": "two"}]).encode()))
    assert texts(tmp_path / "packed") == ["one", "two"]
    (tmp_path / "prompts.json").write_text('[{"prompt": "a"}, {"prompt": "b"}]')
    assert read_prompts(str(tmp_path / "prompts.json")) == ["a", "b"]


def test_rows_that_cannot_be_used_are_set_aside(tmp_path: Path) -> None:
    long = '{"text": "n", "n": ' + "1" * 5000 + "}"
    rows = ['{"text": "x"}', "12", '{"text": "y", "text": "z"}', '{"body": "b"}', long, '{"text": "w"}']
    (tmp_path / "a.json").write_text(f"[{', '.join(rows)}]")
    found = list(documents(tmp_path / "a.json"))
    bad = [(row.origin.rsplit("/", 1)[-1], row.reason) for row in found if isinstance(row, BadRow)]
    assert [origin for origin, _ in bad] == ["a.json[1]", "a.json[2]", "a.json[3]", "a.json[4]"]
    assert "a JSON int, not an object" in bad[0][1]
    assert "stands twice" in bad[1][1]
    assert "digits" in bad[3][1]
    assert [row.texts for row in found if isinstance(row, Document)] == [("x",), ("w",)]


def test_json_in_a_directory_is_left_out_and_how_to_read_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "alpaca.json").write_text(json.dumps(ALPACA))
    with pytest.raises(RecipeError, match=r"left out: 1 \.json\); a \.json file is read where it is named itself"):
        read_prompts(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "x"}, {"text": "y"}', r"a\.json\[1\]: the array does not end"),
        ('[{"text": "x"}, {"text": ', r"a\.json\[1\]: not JSON"),
        ('[{"text": "x"}, {text: "y"}]', r"a\.json\[1\]: not JSON: Expecting property name"),
        ('[{"text": "x"} {"text": "y"}]', r"a\.json\[1\]: no comma before it"),
        ('[{"text": "x"},, {"text": "y"}]', r"a\.json\[1\]: not JSON: Expecting value"),
        ('[{"text" "x"}, ' + '{"text": "y"}, ' * 100 + "]", r"a\.json\[0\]: not JSON: Expecting ':' delimiter"),
        ('[{"text": "x"}] [{"text": "y"}]', "goes on after the end of its array"),
        ('[{"text": "x"}, ' + "[" * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_array_is_refused_by_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArtefactError, match=message):
        list(documents(tmp_path / "a.json"))


@pytest.mark.parametrize("text", ['{\n "text": "x"\n}', "[1, 2]", "[]"])
def test_other_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RecipeError, match="is neither an array of objects nor JSON Lines"):
        list(documents(tmp_path / "a.json"))
