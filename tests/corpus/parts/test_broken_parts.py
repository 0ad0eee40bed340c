"""Parts that are missing, foreign, damaged, killed or at work are named, and nothing that was made is lost."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from inl_core.corpus.manifest import MANIFEST, WORK, verify
from inl_core.corpus.preparation import Part, PrepareProgress, finish, prepare, prepare_part
from inl_core.corpus.preparation import workspace as working_files
from inl_core.errors import ArtefactError
from inl_core.recipe.data import DataSettings
from tests.corpus.parts.making import chosen_settings, make_small, prepare_parts
from tests.corpus.test_restart import Stopped, overwrite_four_bytes
from tests.corpus.texts import contents, settings


@pytest.fixture
def prepared(source: Path, tokenizer_file: Path, tmp_path: Path, three_parts: Path) -> Iterator[DataSettings]:
    """The settings of three parts, which lie in `out`; the sources may be changed."""
    shutil.copytree(three_parts, tmp_path / "out")
    shutil.copytree(source, tmp_path / "saved")
    yield chosen_settings(source, tokenizer_file)
    shutil.copytree(tmp_path / "saved", source, dirs_exist_ok=True)


@pytest.fixture(scope="module")
def three_parts(source: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three parts, and the same data set as a whole in `whole` beside it."""
    directory = tmp_path_factory.mktemp("prepared") / "out"
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        prepare_parts(chosen_settings(source, tokenizer_file), directory, 3)
        prepare(chosen_settings(source, tokenizer_file), directory.parent / "whole")
    return directory


def part_directory(directory: Path, number: int) -> Path:
    return Part(number, 3).directory(directory)


def grow(directory: Path, source: Path) -> None:
    with (source / "z.txt").open("a") as file:
        file.write("more")


SPOILED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "missing": (lambda out, source: shutil.rmtree(part_directory(out, 2)), "missing parts: 2/3; prepare each"),
    "two missing": (
        lambda out, source: [shutil.rmtree(part_directory(out, number)) for number in (1, 3)],
        "missing parts: 1/3, 3/3; prepare each",
    ),
    "no plan": (lambda out, source: (part_directory(out, 1) / "plan.json").unlink(), "part 1/3: was stopped before"),
    "not read": (
        lambda out, source: sorted(part_directory(out, 2).glob("tokens-*.arrow"))[-1].unlink(),
        "part 2/3: was stopped before its end; prepare it again with --part 2/3",
    ),
    "damaged": (
        lambda out, source: overwrite_four_bytes(sorted(part_directory(out, 3).glob("tokens-*.arrow"))[0]),
        "part 3/3: tokens-00000.arrow is damaged; prepare it again with --part 3/3",
    ),
    "damaged plan": (
        lambda out, source: overwrite_four_bytes(part_directory(out, 1) / "plan.json"),
        "part 1/3: plan.json is damaged",
    ),
    "another's": (
        lambda out, source: (
            shutil.rmtree(part_directory(out, 2)),
            shutil.copytree(part_directory(out, 1), part_directory(out, 2)),
        ),
        "part 2/3: was made from other sources: .* is new",
    ),
    "changed source": (grow, r"part 3/3: was made from other sources: .*z\.txt changed; prepare it again"),
    "removed source": (
        lambda out, source: (source / "z.txt").unlink(),
        r"part 3/3: was made from other sources: .*z\.txt is not one of its files",
    ),
    "two kinds": (
        lambda out, source: shutil.copytree(part_directory(out, 2), Part(2, 4).directory(out)),
        r"two preparations, 3 of 3 and 1 of 4; delete the directories part-\*-of-00003 or part-\*-of-00004",
    ),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=SPOILED)
def test_a_missing_or_foreign_part_is_named(
    prepared: DataSettings, source: Path, tmp_path: Path, spoil: Callable[[Path, Path], object], message: str
) -> None:
    out = tmp_path / "out"
    spoil(out, source)
    with pytest.raises(ArtefactError, match=message) as error:
        finish(prepared, out)
    assert "\n" not in str(error.value)
    assert not (out / MANIFEST).exists()


@pytest.mark.parametrize("kind", ["two missing", "not read", "damaged", "another's", "no plan"])
def test_what_the_error_says_to_do_helps(
    prepared: DataSettings, source: Path, tmp_path: Path, three_parts: Path, kind: str
) -> None:
    SPOILED[kind][0](tmp_path / "out", source)
    prepare_parts(prepared, tmp_path / "out", 3)
    finish(prepared, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(three_parts.parent / "whole")


def test_parts_of_other_settings_or_versions_are_named(
    source: Path, tokenizer_file: Path, three_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, chosen = three_parts, chosen_settings(source, tokenizer_file)
    with pytest.raises(ArtefactError, match=r"part 1/3: was made otherwise: num_shards was 2, is now 5; prepare it"):
        finish(chosen.model_copy(update={"num_shards": 5}), out)
    with pytest.raises(ArtefactError, match=r"part 1/3: was made otherwise: sample_bytes was None, is now 200000000"):
        finish(chosen_settings(source, None), out)
    monkeypatch.setattr(working_files, "versions", lambda: {"inl": "99", "tokenizers": "0", "Unicode": "1"})
    with pytest.raises(ArtefactError, match=r"part 1/3: was made otherwise: Unicode was [\d.]+, is now 1; prepare it"):
        finish(chosen, out)


def test_damaged_files_of_the_joining_are_made_again(source: Path, tokenizer_file: Path, tmp_path: Path) -> None:
    chosen, out = chosen_settings(source, None), tmp_path / "out"
    prepare(chosen, tmp_path / "whole")
    prepare_parts(chosen, out, 3)

    def stop(event: PrepareProgress) -> None:
        if event.stage == "shards":
            raise Stopped

    for name in ("tokenizer.json", "split.json", "plan.json", "tokens-00001.arrow"):
        with pytest.raises(Stopped):
            finish(chosen, out, progress=stop)
        overwrite_four_bytes(out / WORK / name)
        said: list[str] = []

        def listen(event: PrepareProgress, said: list[str] = said) -> None:
            said.append(event.message or "")
            stop(event)

        with pytest.raises(Stopped):
            finish(chosen, out, progress=listen)
        assert any("starting over" in message for message in said), name
    finish(chosen, out)
    assert contents(out) == contents(tmp_path / "whole")


def test_only_parts_work_at_the_same_time(source: Path, tmp_path: Path) -> None:
    chosen, out, tried = chosen_settings(source, None), tmp_path / "out", []

    def during_part(event: PrepareProgress) -> None:
        if tried:
            return
        for run in (
            lambda: prepare_part(chosen, out, Part(1, 2)),
            lambda: finish(chosen, out),
            lambda: prepare(chosen, out),
        ):
            with pytest.raises(ArtefactError, match=r"another process is preparing (part 1/2|this data set)"):
                run()
        prepare_part(chosen, out, Part(2, 2))
        tried.append(True)

    prepare_part(chosen, out, Part(1, 2), progress=during_part)
    assert tried
    tried.clear()

    def during_whole(event: PrepareProgress) -> None:
        if not tried:
            with pytest.raises(ArtefactError, match="another process is preparing this data set"):
                prepare_part(chosen, out, Part(1, 2))
            tried.append(True)

    with pytest.raises(ArtefactError, match="holds parts of a preparation; join them with --finish, or delete"):
        prepare(chosen, out)
    finish(chosen, out, progress=during_whole)
    assert tried
    prepare(chosen, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_data_set_that_is_complete_is_left_alone(source: Path, tmp_path: Path) -> None:
    chosen, out = chosen_settings(source, None), tmp_path / "out"
    prepare_parts(chosen, out, 2)
    manifest = finish(chosen, out)
    before = contents(out)
    assert prepare_part(chosen, out, Part(1, 2)) is None
    assert finish(chosen, out) == manifest
    assert contents(out) == before
    other = chosen.model_copy(update={"num_shards": 1})
    for run in (lambda: prepare_part(other, out, Part(1, 2)), lambda: finish(other, out)):
        with pytest.raises(ArtefactError, match="num_shards was 2, is now 1"):
            run()
    prepare_parts(other, out, 2, overwrite=True)
    assert verify(out, settings=chosen) == manifest  # until the parts are joined
    assert len(finish(other, out, overwrite=True).splits["train"].shards) == 1


def test_parts_left_by_a_kill_at_the_very_end_are_removed(source: Path, tmp_path: Path) -> None:
    chosen, out = chosen_settings(source, None), tmp_path / "out"
    prepare_parts(chosen, out, 2)

    def stop(event: PrepareProgress) -> None:
        if event.stage == "done":
            raise Stopped

    with pytest.raises(Stopped):
        finish(chosen, out, progress=stop)
    assert Part(1, 2).directory(out).exists()
    assert finish(chosen, out, overwrite=True).rows
    assert not (out / WORK).exists()


KILLED = """
import os, random, signal, sys
from inl_core.corpus.preparation import Part, finish, prepare_part, shards, text_chunks
from inl_core.recipe.data import DataSettings
text_chunks.CHUNK_BYTES = shards._BUFFERED_TOKENS = 4_000
source, directory, what, seed = sys.argv[1:]
def kill(event):
    if draw.random() < 0.1:
        os.kill(os.getpid(), signal.SIGKILL)
draw = random.Random(f"{what} {seed}")
values = {"sources": [source], "tokenizer": {"vocab_size": 300}, "max_bad_ratio": 0.5}
settings = DataSettings.model_validate(values)
if what == "finish":
    finish(settings, directory, progress=kill)
else:
    prepare_part(settings, directory, Part(int(what), 3), progress=kill)
"""


@pytest.mark.slow
def test_killed_parts_that_run_at_once_are_continued_by_the_same_commands(source: Path, tmp_path: Path) -> None:
    num_killed = 0

    def run(*whats: str) -> None:
        nonlocal num_killed
        for seed in count():
            started = [
                subprocess.Popen(
                    [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out"), what, str(seed)],
                    cwd=Path(__file__).parents[3],
                )
                for what in whats
            ]
            codes = [process.wait() for process in started]
            assert set(codes) <= {0, -signal.SIGKILL}
            num_killed += sum(code != 0 for code in codes)
            whats = tuple(what for what, code in zip(whats, codes, strict=True) if code)
            if not whats:
                return

    run("1", "2", "3")
    run("finish")
    assert num_killed >= 4
    chosen = settings(source, max_bad_ratio=0.5)
    prepare(chosen, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
