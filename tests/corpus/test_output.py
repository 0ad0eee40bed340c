"""A preparation writes over nothing but data sets, and in these over nothing but its own files."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from inl_core.corpus.manifest import verify
from inl_core.corpus.preparation import chunks, prepare
from inl_core.errors import InlError, RecipeError
from tests.corpus.texts import settings

RECORD = json.dumps({"format": 1, "step": 30, "files": {"config.json": {"bytes": 2, "sha256": "0" * 64}}})
OTHERS = {
    "a checkpoint": {"manifest.json": RECORD, "model.safetensors": "w", "config.json": "{}", "tokenizer.json": "{}"},
    "an unfinished checkpoint": {"training_state/optimizer.safetensors": "moments"},
    "a shard of someone else": {"manifest.json": "{}", "train-00000-of-00001.arrow": "mine"},
    "a web page": {"manifest.json": '{"name": "page", "icons": []}', "index.html": "<p>"},
    "a thesis": {"thesis.tex": "precious"},
    "a model in a data set": {"manifest.json": '{"tokenizer_fingerprint": ""}', "model.safetensors": "w"},
    "a model beside a stopped preparation": {".prepare/plan.json": "{}", "config.json": "{}"},
    "a manifest that is a directory": {"manifest.json/a": "b"},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("some words to prepare, " * 20)
    return tmp_path / "text.txt"


def tree(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("files", OTHERS.values(), ids=OTHERS)
def test_what_is_no_data_set_is_never_written_over(
    source: Path, tmp_path: Path, files: dict[str, str], overwrite: bool
) -> None:
    for name, text in files.items():
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text(text)
    before = tree(tmp_path)
    with pytest.raises(RecipeError, match=r"mine: not empty and not a data set; name another --output$"):
        prepare(settings(source), tmp_path / "mine", overwrite=overwrite)
    assert tree(tmp_path) == before


DAMAGE = {
    "no keys": lambda path: (path / "manifest.json").write_text("{}"),
    "empty": lambda path: (path / "manifest.json").write_text(""),
    "cut short": lambda path: os.truncate(path / "manifest.json", 300),
    "noise": lambda path: (path / "manifest.json").write_bytes(bytes(range(256))),
    "no tokenizer": lambda path: (path / "tokenizer.json").unlink(),
    "no quarantine": lambda path: (path / "quarantine.jsonl").unlink(),
}


def test_a_damaged_data_set_is_replaced_and_what_else_lies_there_stays(source: Path, tmp_path: Path) -> None:
    intact, mine = tmp_path / "intact", ("train-notes.arrow", "train-00000-of-00001.arrow.bak", "README.md")
    manifest = prepare(settings(source), intact)
    for name, damage in DAMAGE.items():
        directory = Path(shutil.copytree(intact, tmp_path / name))
        for file in mine:
            (directory / file).write_text("mine")
        (directory / "train-00003-of-00009.arrow").write_text("of an earlier preparation")
        damage(directory)
        assert prepare(settings(source), directory, overwrite=True) == manifest
        assert verify(directory, deep=True) == manifest
        ours = {path.name for path in directory.iterdir()} - {*mine, ".verified.json"}
        assert ours == {path.name for path in intact.iterdir()} - {".verified.json"}
        assert [(directory / file).read_text() for file in mine] == ["mine"] * 3


@pytest.mark.parametrize(("number", "fix"), [(errno.ENOSPC, "make room there"), (errno.EFBIG, "raise `ulimit -f`")])
def test_a_disk_without_room_is_one_line_with_the_file_and_the_fix(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fix: str
) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as full:
        full.setattr(chunks.pa.ipc, "new_file", refuse)
        with pytest.raises(InlError) as told:
            prepare(settings(source), tmp_path / "out")
    file = tmp_path / "out" / ".prepare" / "text-00000.arrow"
    assert str(told.value) == f"{file}: {os.strerror(number)}; {fix} and run the same again, which goes on from here"
    assert prepare(settings(source), tmp_path / "out").splits["train"].documents
