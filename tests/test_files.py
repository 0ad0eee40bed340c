import os
from pathlib import Path

import pytest
from pydantic import BaseModel

from inl_core.errors import ArtefactError, RecipeError
from inl_core.files import (
    HTML,
    entry_path,
    open_regular,
    output_file,
    read_bytes,
    read_json,
    read_record,
    read_text,
    refuse_no_directory,
    write_whole,
)


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


def test_a_file_is_written_where_links_lead(tmp_path):
    link, other = tmp_path / "link.html", tmp_path / "other"
    link.symlink_to("target.html")
    other.symlink_to("link.html")
    assert output_file(other) == tmp_path / "target.html"
    write_whole(output_file(other), "page")
    assert (link.is_symlink(), other.is_symlink(), read_text(tmp_path / "target.html")) == (True, True, "page")
    assert output_file(other) == tmp_path / "target.html"


def test_what_is_no_file_is_refused_as_an_output(tmp_path):
    pipe, link, loop = (tmp_path / name for name in ("pipe", "link", "loop"))
    os.mkfifo(pipe)
    link.symlink_to("pipe")
    loop.symlink_to("loop")
    for path, reason in (
        (pipe, "is a FIFO"),
        (link, "is a FIFO"),
        (tmp_path, "is a directory"),
        (loop, "symbolic links"),
    ):
        with pytest.raises(RecipeError, match=f"{path}: .*{reason}"):
            output_file(path)


def test_a_page_replaces_a_page_and_nothing_else(tmp_path):
    page, empty, recipe = tmp_path / "page", tmp_path / "empty", tmp_path / "recipe.yaml"
    page.write_text("<!DOCTYPE html><p>")
    empty.touch()
    recipe.write_text("name: mine")
    assert [output_file(path, HTML) for path in (page, empty, tmp_path / "new")] == [page, empty, tmp_path / "new"]
    with pytest.raises(RecipeError, match=f"{recipe}: does not begin with <!doctype html, .* name another file"):
        output_file(recipe, HTML)


def test_an_output_directory_is_new_or_a_directory(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to("nowhere")
    (tmp_path / "linked").symlink_to(tmp_path)
    for path in (tmp_path, tmp_path / "new" / "one", tmp_path / "linked" / "new"):
        refuse_no_directory(path, "--csv")
    for name, reason in (("file", "is a file"), ("file/new", "is a file"), ("gone", "is a link that leads nowhere")):
        with pytest.raises(RecipeError, match=f"{reason}; --csv names a directory"):
            refuse_no_directory(tmp_path / name, "--csv")
