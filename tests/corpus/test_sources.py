"""The sources that a user names are found and read in a fixed order, and what is left out is told."""

import io
import json
import os
import sys
from pathlib import Path

import pytest

from inl_core.corpus.dataset import TokenDataset
from inl_core.corpus.manifest import default_directory, load_manifest, verify
from inl_core.corpus.preparation import prepare
from inl_core.corpus.reading.paths import local_path, matches, portable, shown
from inl_core.corpus.reading.rows import Document
from inl_core.errors import ArtefactError, InlError, RecipeError
from tests.corpus.texts import documents, settings, texts


def test_a_directory_is_read_in_order_and_says_what_it_leaves_out(tmp_path: Path) -> None:
    for name in ("b.txt", "a.py", "sub/c.md", ".hidden.txt", "__pycache__/d.py", "picture.png", "sub/.git/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f"text of {name}")
    notes: list[str] = []
    found = [d.origin for d in documents(tmp_path, tmp_path / "b.txt", note=notes.append)]
    assert found == [str(tmp_path / name) for name in ("a.py", "b.txt", "sub/c.md")]
    assert f"{tmp_path}: 3 text files; left out: 1 .png" in notes
    assert "1 files were named more than once and are read once" in notes
    pattern = [d.origin for d in documents(tmp_path / "**/*.md")]
    assert pattern == [str(tmp_path / "sub/c.md")]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A directory with links of every kind, hidden files, a FIFO, and a file without a suffix."""
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
    assert sorted(texts(tree, note=notes.append)) == ["text of four", "text of one", "text of two"]
    assert f"{tree}: 3 text files; left out: 1 without a suffix, 1 broken link, 1 not a regular file" in notes
    (passed,) = [note for note in notes if "passed over" in note]
    links = [f"1 link to a directory above it ({name})" for name in ("loop", "up")]
    assert all(what in passed for what in ["1 hidden directory .hidden", *links])


@pytest.mark.parametrize("pattern", ["*", "**", "**/*"])
def test_a_glob_reads_the_directories_it_matches(tree: Path, pattern: str) -> None:
    notes: list[str] = []
    found = texts(tree / pattern, note=notes.append)
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
    ("s3://bucket/x.txt", "s3://bucket/x.txt: a URL"),
    ("broken.txt", "a link to nowhere"),
    ("pipe.txt", "not a regular file"),
    ("/dev/zero", "not a regular file"),
    ("none*", "matches no file"),
    ("empty", "no text, .jsonl or .parquet file in this directory"),
    ("array.json", "write one object a line"),
    ("archive.tar.gz", "unknown kind of compressed file"),
]


@pytest.mark.parametrize(("source", "message"), REFUSED)
def test_a_source_that_cannot_be_used_is_refused(
    tree: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    (tree / "empty").mkdir()
    (tree / "array.json").write_text("[\n1]")
    (tree / "archive.tar.gz").write_bytes(b"")
    monkeypatch.chdir(tree)
    with pytest.raises(RecipeError, match=message) as error:
        texts(source)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"."):  # the settings or the preparation refuse it
        prepare(settings(source), tree.parent / "out")


def test_near_names_are_suggested(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("x")
    with pytest.raises(RecipeError, match=r"did you mean .*corpus\.txt\?"):
        list(documents(tmp_path / "corpsu.txt"))
    with pytest.raises(RecipeError, match="did you mean builtin:python"):
        list(documents("builtin:pyhton"))


def test_the_output_is_no_source_and_a_home_directory_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "text.txt").write_text("some text\n" * 40)
    manifest = prepare(settings("~"), tmp_path / "out")
    assert prepare(settings(tmp_path), tmp_path / "out") == manifest  # the same source by another name
    for source in (tmp_path / "out", tmp_path / "out" / "quarantine.jsonl"):
        with pytest.raises(RecipeError, match="belongs to the output directory"):
            prepare(settings(source), tmp_path / "out", overwrite=True)


NOT_UTF8 = os.fsdecode(b"na\xffme\n.txt")


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


def test_builtin_python_is_sources_and_topics() -> None:
    found = [d for d in documents("builtin:python") if isinstance(d, Document)]
    origins = [d.origin for d in found]
    assert "python:argparse.py" in origins
    assert "pydoc:assert" in origins
    assert not [o for o in origins if "/test/" in o or "/tests/" in o or "site-packages" in o or "topics.py" in o]
    assert sum(len(d.texts[0]) for d in found) > 5_000_000


@pytest.mark.parametrize("stdin", [None, io.StringIO()])
def test_a_closed_stdin_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stdin: io.StringIO | None) -> None:
    if stdin:
        stdin.close()
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(InlError, match="stdin, which is closed"):
        prepare(settings("-"), tmp_path / "out")
