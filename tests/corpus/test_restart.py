"""A preparation that was stopped, wherever it was and whatever became of its files, ends like one never stopped."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from itertools import count
from pathlib import Path

import pyarrow as pa
import pytest

from inl_core.corpus.manifest import verify
from inl_core.corpus.preparation import PrepareProgress, prepare, text_chunks
from inl_core.corpus.preparation.sealed import sealed_aside
from inl_core.errors import ArtefactError
from inl_core.recipe.data import DataSettings
from tests import damage
from tests.corpus.texts import contents, random_text, settings


class Stopped(BaseException):
    """Raised in the place of a kill."""


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_chunks, "CHUNK_BYTES", 4000)


@pytest.mark.usefixtures("small_chunks")
def test_a_run_stopped_anywhere_ends_like_one_never_stopped(tmp_path: Path) -> None:
    generator, source = random.Random(5), tmp_path / "source"
    source.mkdir()
    lines = [json.dumps({"text": random_text(generator, 40)}) for _ in range(120)]
    (source / "rows.jsonl").write_text("\n".join([*lines, "{bad", *lines[:10]]))
    (source / "a.txt").write_text(random_text(generator, 100))
    chosen = settings(source, num_shards=2, max_bad_ratio=0.5)
    events: list[PrepareProgress] = []
    prepare(chosen, tmp_path / "whole", progress=events.append)
    num_tokenise = sum(event.stage == "tokenise" for event in events)
    expected = contents(tmp_path / "whole")

    stopped_in = []
    for moment in count(1):
        directory, events = tmp_path / f"at-{moment}", []

        def stop(event: PrepareProgress, moment: int = moment, events: list = events) -> None:
            events.append(event)
            if len(events) == moment:
                raise Stopped

        try:
            prepare(chosen, directory, progress=stop)
            break
        except Stopped:
            stage = events[-1].stage
            stopped_in.append(stage)
        if stage != "done":
            with pytest.raises(ArtefactError, match=r"not finished|no data set here"):
                verify(directory)
        again = []
        prepare(chosen, directory, progress=again.append)
        if stage in ("tokenise", "shards"):  # what was read and tokenised before is not done again
            assert not any(event.stage in ("read", "tokenizer") and event.total for event in again)
            assert sum(event.stage == "tokenise" for event in again) <= num_tokenise - stopped_in.count("tokenise") + 1
        assert contents(directory) == expected
        shutil.rmtree(directory)
    assert set(stopped_in) == {"hash", "read", "tokenizer", "tokenise", "shards", "done"}
    assert len(stopped_in) > 25


@pytest.mark.usefixtures("small_chunks")
def test_one_document_cut_in_two_survives_a_stop_after_its_tokens(tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("".join(f"line {i}\n" for i in range(300)))
    chosen = settings(tmp_path / "only.txt")
    prepare(chosen, tmp_path / "whole")

    def stop(event: PrepareProgress) -> None:
        if event.stage == "tokenise":
            raise Stopped

    with pytest.raises(Stopped):
        prepare(chosen, tmp_path / "out", progress=stop)
    prepare(chosen, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


KILLED = """
import os, signal, sys
from pathlib import Path
from inl_core.corpus.preparation import text_chunks
from inl_core.corpus.preparation import prepare
from inl_core.recipe.data import DataSettings
text_chunks.CHUNK_BYTES = 4_000
def kill(event):
    if event.stage == "tokenise" and event.done > 10_000 and len(sys.argv) > 3:
        os.kill(os.getpid(), signal.SIGKILL)
settings = DataSettings.model_validate({"sources": [sys.argv[1]], "tokenizer": {"vocab_size": 300}})
prepare(settings, sys.argv[2], progress=kill)
"""


def test_a_killed_process_is_continued(text_directory: Path, tmp_path: Path) -> None:
    def run(name: str, *arguments: str) -> int:
        command = [sys.executable, "-c", KILLED, str(text_directory), str(tmp_path / name), *arguments]
        return subprocess.run(command, check=False, cwd=Path(__file__).parents[2]).returncode

    assert run("killed", "kill") == -signal.SIGKILL
    assert list((tmp_path / "killed" / ".prepare").glob("tokens-*.arrow"))
    assert run("killed") == 0
    assert run("whole") == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_other_settings_after_a_stop_start_over(text_directory: Path, tmp_path: Path) -> None:
    def stop(event: PrepareProgress) -> None:
        if event.stage == "shards":
            raise Stopped

    with pytest.raises(Stopped):
        prepare(settings(text_directory), tmp_path / "out", progress=stop)
    changed, notes = settings(text_directory, vocab_size=290), []
    prepare(changed, tmp_path / "out", progress=lambda event: notes.append(event.message))
    assert any("starting over" in note for note in notes if note)
    prepare(changed, tmp_path / "fresh")
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[DataSettings, Path, Path]:
    """(settings, the data set that they make, the same when it was stopped with chunks of text and of tokens)."""
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
        patch.setattr(text_chunks, "CHUNK_BYTES", 1500)
        prepare(chosen, root / "whole")
        with pytest.raises(Stopped):
            prepare(chosen, root / "stopped", progress=stop)
    names = [path.name for path in (root / "stopped" / ".prepare").glob("*.arrow")]
    assert {name.split("-")[0] for name in names} == {"text", "tokens"}
    return chosen, root / "whole", root / "stopped"


def overwrite_four_bytes(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4] = b"ZZZZ"
    path.write_bytes(data)


DAMAGE = {
    "list": lambda path: path.write_text("[1]"),
    "another object": lambda path: path.write_text('{"settings": 1}'),
    "deeply nested": lambda path: path.write_text("[" * 100_000),
    "fifo": damage.fifo,
    "directory": damage.directory,
    "link to nothing": damage.linked_to("nothing"),
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
