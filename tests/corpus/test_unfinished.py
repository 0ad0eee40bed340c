"""Whatever became of the files of a stopped preparation, it ends like one never stopped, or says what to do."""

import os
import random
import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from inl_core.corpus import ingest
from inl_core.corpus.preparation import PrepareProgress, prepare, verify
from inl_core.corpus.sealed import sealed_aside
from inl_core.errors import ArtefactError
from inl_core.recipe.data import DataSettings
from tests.corpus.test_prepare import Stopped, contents
from tests.corpus.texts import random_text, settings


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSettings, Path, Path]:
    """Settings, the data set they make, and one that was stopped with chunks of text and of tokens."""
    root, generator = tmp_path_factory.mktemp("unfinished"), random.Random(3)
    lines = "".join(f"{number} {random_text(generator, 30)}\n" for number in range(60))
    for number in range(12):
        (root / f"{number}.md").write_text(f"{number} {lines[number * 500 : number * 500 + 500]}")
    chosen, sizes = settings(*sorted(root.glob("*.md")), num_shards=1), [0]

    def stop(event: PrepareProgress) -> None:
        if event.stage == "tokenise":
            sizes[0] += 1
            if sizes[0] == 3:
                raise Stopped

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ingest, "CHUNK_BYTES", 1500)
        prepare(chosen, root / "whole")
        with pytest.raises(Stopped):
            prepare(chosen, root / "stopped", progress=stop)
    names = [path.name for path in (root / "stopped" / ".prepare").glob("*.arrow")]
    assert {name.split("-")[0] for name in names} == {"text", "tokens"}
    return chosen, root / "whole", root / "stopped"


def put_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def put_directory(path: Path) -> None:
    path.unlink()
    (path / "inner").mkdir(parents=True)


def put_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("nothing")


def overwrite_four_bytes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4] = b"ZZZZ"
    path.write_bytes(data)


DAMAGE = {
    "list": lambda path: path.write_text("[1]"),
    "another object": lambda path: path.write_text('{"settings": 1}'),
    "deeply nested": lambda path: path.write_text("[" * 100_000),
    "fifo": put_fifo,
    "directory": put_directory,
    "link to nothing": put_link,
    "four bytes": overwrite_four_bytes,
}
RECORDS = [(name, kind) for name in ("plan.json", "split.json") for kind in DAMAGE]
CHUNKS = [
    (name, kind)
    for name in ("text-*.arrow", "tokens-*.arrow", "tokenizer.json", "text-*.sha256")
    for kind in ("four bytes", "fifo")
]


@pytest.mark.parametrize(("name", "kind"), RECORDS + CHUNKS)
def test_damaged_working_files_are_never_used(
    stopped: tuple[DataSettings, Path, Path], tmp_path: Path, name: str, kind: str
) -> None:
    chosen, whole, left = stopped
    shutil.copytree(left, tmp_path / "out")
    DAMAGE[kind](sorted((tmp_path / "out" / ".prepare").glob(name))[-1])
    said: list[str] = []
    prepare(chosen, tmp_path / "out", progress=lambda event: said.append(event.message or ""))
    assert contents(tmp_path / "out") == contents(whole)
    verify(tmp_path / "out", deep=True)
    assert kind == "link to nothing" or any("starting over" in message for message in said)


@pytest.mark.parametrize("text", ['{"next_file": "x"}', "[]", "", "[" * 100_000])
def test_a_chunk_that_another_version_wrote_is_not_used(
    stopped: tuple[DataSettings, Path, Path], tmp_path: Path, text: str
) -> None:
    chosen, whole, left = stopped
    shutil.copytree(left, tmp_path / "out")
    path = sorted((tmp_path / "out" / ".prepare").glob("text-*.arrow"))[-1]
    table = pa.ipc.open_file(pa.py_buffer(path.read_bytes())).read_all().replace_schema_metadata({"inl": text})
    with sealed_aside(path) as aside, pa.ipc.new_file(str(aside), table.schema) as file:
        file.write_table(table)
    prepare(chosen, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize("kind", ["fifo", "directory", "link"])
def test_a_lock_that_is_no_regular_file_is_refused_by_name(
    stopped: tuple[DataSettings, Path, Path], tmp_path: Path, kind: str
) -> None:
    shutil.copytree(stopped[2], tmp_path / "out")
    lock, victim = tmp_path / "out" / ".prepare" / "lock", tmp_path / "victim"
    victim.write_text("precious")
    lock.unlink()
    {"fifo": lambda: os.mkfifo(lock), "directory": lock.mkdir, "link": lambda: lock.symlink_to(victim)}[kind]()
    with pytest.raises(ArtefactError, match="lock: not a regular file"):
        prepare(stopped[0], tmp_path / "out")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["plan.json.tmp", "text-00000.arrow.tmp", "../train-00000-of-00001.arrow.tmp"])
def test_nothing_is_written_through_what_stands_where_a_file_is_made(
    stopped: tuple[DataSettings, Path, Path], tmp_path: Path, name: str
) -> None:
    chosen, whole, _ = stopped
    (tmp_path / "out" / ".prepare").mkdir(parents=True)
    os.mkfifo(tmp_path / "out" / ".prepare" / name)
    prepare(chosen, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)
