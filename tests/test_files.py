import os
from pathlib import Path

import pytest
from pydantic import BaseModel

from inl_core.errors import ArtefactError
from inl_core.files import entry_path, open_regular, read_bytes, read_json, read_record, read_text, write_whole


class Entry(BaseModel):
    size: int


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda d: d / "absent", "missing"),
        (lambda d: d, "a directory"),
        (lambda d: _fifo(d / "fifo"), "a FIFO"),
        (lambda d: _link(d / "zero", "/dev/zero"), "a device"),
        (lambda d: _link(d / "loop", "loop"), "cannot be read"),
        (lambda d: Path("a\0b"), "not a file name"),
    ],
)
def test_only_regular_files_are_opened(tmp_path, make, expected):
    with pytest.raises(ArtefactError, match=expected):
        open_regular(make(tmp_path))


def test_a_file_over_the_limit_is_not_read_whole(tmp_path):
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ArtefactError, match="larger than 1,000 bytes"):
        read_bytes(path, limit=1000)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\xff\xfe", "not UTF-8"),
        (b"[]", "JSON list where an object belongs"),
        (b"null", "NoneType"),
        (b"", "not valid JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_json_of_any_shape_is_one_line(tmp_path, content, expected):
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(ArtefactError, match=expected) as caught:
        read_json(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_record_names_the_wrong_key(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"size": "many"}')
    with pytest.raises(ArtefactError, match=r"a\.json: damaged: size: "):
        read_record(path, Entry)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "", ".", "C:/x", "a\0b"])
def test_a_manifest_cannot_name_a_file_outside(tmp_path, name):
    with pytest.raises(ArtefactError, match="not inside the directory"):
        entry_path(tmp_path, name)


def test_entries_inside_are_found(tmp_path):
    assert entry_path(tmp_path, "training_state/a.json") == tmp_path / "training_state" / "a.json"


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "recipe.yaml"
    write_whole(path, "old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"recipe\.yaml"):
        write_whole(path, "new")
    assert read_text(path) == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_written_file_has_the_usual_rights(tmp_path):
    plain, whole = tmp_path / "plain", tmp_path / "whole"
    plain.write_text("")
    write_whole(whole, "")
    assert whole.stat().st_mode == plain.stat().st_mode
