"""Parts prepared apart and joined are, byte for byte, the data set that is prepared as a whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from inl_cli.app import app
from inl_core.corpus.manifest import MANIFEST, verify
from inl_core.corpus.preparation import Part, PrepareProgress, finish, prepare, prepare_part, text_chunks
from inl_core.corpus.preparation.parts import shares
from inl_core.corpus.reading.sources import SourceFile, read_source
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError, RecipeError
from inl_core.recipe.data import TokenizerSettings
from tests.corpus.parts.making import chosen_settings, prepare_parts
from tests.corpus.test_restart import Stopped
from tests.corpus.texts import contents, settings


@pytest.mark.parametrize("num_parts", [1, 2, 4, 13])
@pytest.mark.parametrize("is_given", [True, False], ids=["tokenizer given", "tokenizer trained"])
def test_any_number_of_parts_gives_the_data_set_of_one_preparation(
    source: Path, tokenizer_file: Path, tmp_path: Path, num_parts: int, is_given: bool
) -> None:
    chosen = chosen_settings(source, tokenizer_file if is_given else None)
    manifest = prepare(chosen, tmp_path / "whole")
    prepare_parts(chosen, tmp_path / "parts", num_parts)
    assert not (tmp_path / "parts" / MANIFEST).exists()
    has_tokens = list((tmp_path / "parts").rglob("tokens-*.arrow"))
    assert bool(has_tokens) == is_given
    assert finish(chosen, tmp_path / "parts") == manifest
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert manifest.duplicates == 33
    assert manifest.quarantined == manifest.empty == 6
    verify(tmp_path / "parts", deep=True, settings=chosen)


def test_each_file_is_read_by_one_part_alone(
    source: Path, tokenizer_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def spy(file: SourceFile, **options: object) -> object:
        opened.append(file.name)
        return read_source(file, **options)  # pyright: ignore

    monkeypatch.setattr(text_chunks, "read_source", spy)
    chosen, by_part = chosen_settings(source, tokenizer_file), {}
    for number in range(1, 5):
        prepare_part(chosen, tmp_path / "out", Part(number, 4))
        by_part[number], opened[:] = list(opened), []
    finish(chosen, tmp_path / "out")
    assert opened == []
    together = [name for names in by_part.values() for name in names]
    assert sorted(together) == sorted(map(str, source.iterdir()))
    assert min(map(len, by_part.values())) >= 1


@given(sizes=st.lists(st.integers(0, 10**12), max_size=40), count=st.integers(1, 50))
def test_shares_are_neighbours_and_no_part_has_much_more_than_its_share(sizes: list[int], count: int) -> None:
    files = [SourceFile(str(number), str(number), "", "text", size=size) for number, size in enumerate(sizes)]
    shared = shares(files, count)
    assert [file for number in range(1, count + 1) for file in shared[number]] == files
    for part in shared.values():
        assert sum(file.size for file in part) <= sum(sizes) / count + max(sizes, default=0) + 1


def test_what_shards_hold_does_not_depend_on_where_chunks_end(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = chosen_settings(source, None)
    for size in (700, 4000, 1 << 30):
        monkeypatch.setattr(text_chunks, "CHUNK_BYTES", size)
        prepare(chosen, tmp_path / str(size))
        assert contents(tmp_path / str(size)) == contents(tmp_path / "700")


@pytest.mark.parametrize("is_given", [True, False], ids=["tokenizer given", "tokenizer trained"])
def test_parts_and_their_joining_go_on_wherever_they_were_stopped(
    source: Path, tokenizer_file: Path, tmp_path: Path, is_given: bool
) -> None:
    chosen = chosen_settings(source, tokenizer_file if is_given else None)
    prepare(chosen, tmp_path / "whole")
    directory = tmp_path / "out"

    def run_stopped(run: Callable[..., object], *stages: str) -> None:
        """Run to the end, after a stop at the first event of each stage."""
        for stage in stages:

            def stop(event: PrepareProgress, stage: str = stage) -> None:
                if event.stage == stage:
                    raise Stopped

            with pytest.raises(Stopped):
                run(progress=stop)
        run()

    tokenise = ("tokenise",)
    for number in (1, 2, 3):
        run_stopped(
            lambda part=Part(number, 3), **options: prepare_part(chosen, directory, part, **options),
            *("hash", "read"),
            *(tokenise if is_given else ()),
        )
    run_stopped(lambda **options: finish(chosen, directory, **options), *(() if is_given else tokenise), "shards")
    assert contents(directory) == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["only.txt", "only.jsonl"])
def test_one_document_in_parts_is_divided_as_in_one_preparation(
    tmp_path: Path, tokenizer_file: Path, name: str
) -> None:
    text = "".join(f"line {number}\n" for number in range(60))
    row = json.dumps({"prompt": "a", "completion": text})
    (tmp_path / name).write_text(text if name == "only.txt" else row)
    (tmp_path / f"copy-{name}").write_text(text.upper() if name == "only.txt" else row)
    for file in (tokenizer_file, None):
        chosen = settings(*sorted(tmp_path.glob("*only*")), tokenizer=TokenizerSettings(vocab_size=300, file=file))
        whole, out = tmp_path / f"whole-{file is None}", tmp_path / f"out-{file is None}"
        prepare(chosen, whole)
        prepare_parts(chosen, out, 2)
        finish(chosen, out)
        assert contents(out) == contents(whole)


def test_documents_that_a_foreign_tokenizer_empties_count_for_duplicates_and_the_split(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    backend.normalizer = tokenizers.normalizers.Replace("gone", "")  # pyright: ignore
    Tokenizer(backend).save(tmp_path / "tokenizer.json")
    for number, text in enumerate(["gone", "stays", "GONE", "gonegone", "here too", "stays "]):
        (tmp_path / f"{number}.txt").write_text(text)
    chosen = settings(*sorted(tmp_path.glob("?.txt")), tokenizer=TokenizerSettings(file=tmp_path / "tokenizer.json"))
    manifest = prepare(chosen, tmp_path / "whole")
    assert sum(split.documents for split in manifest.splits.values()) == 2
    assert manifest.duplicates == 2
    for num_parts in (2, 3, 6):
        prepare_parts(chosen, tmp_path / f"{num_parts}", num_parts)
        finish(chosen, tmp_path / f"{num_parts}")
        assert contents(tmp_path / f"{num_parts}") == contents(tmp_path / "whole")


def test_stdin_and_too_many_bad_rows_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"stdin\) cannot be prepared in parts"):
        prepare_part(settings("-"), tmp_path / "out", Part(1, 2))
    assert not (tmp_path / "out").exists()
    strict = chosen_settings(source, None).model_copy(update={"max_bad_ratio": 0.01})
    prepare_parts(strict, tmp_path / "out", 2)
    with pytest.raises(ArtefactError, match=r"6 of 9\d rows are bad"):
        finish(strict, tmp_path / "out")
    with pytest.raises(ArtefactError, match="there are no parts; prepare each with --part I/N before --finish"):
        finish(strict, tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_the_command_prepares_parts_and_joins_them(source: Path, tmp_path: Path) -> None:
    def inl(*arguments: str, output: str = "parts") -> dict:
        options = ["--output", str(tmp_path / output), "--vocab-size", "300", "--max-bad-ratio", "0.5", "--json"]
        result = CliRunner().invoke(app, ["prepare-data", str(source), *options, *arguments])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    first, second = (inl("--part", f"{number}/2") for number in (1, 2))
    assert (first["part"], second["part"]) == ("1/2", "2/2")
    assert first["num_sources"] + second["num_sources"] == len(list(source.iterdir()))
    assert not first["is_tokenised"]
    joined, whole = inl("--finish"), inl(output="whole")
    assert joined | {"directory": ""} == whole | {"directory": ""}
    assert inl("--part", "2/2") == {"directory": str(tmp_path / "parts"), "part": "2/2", "is_complete": True}


@pytest.mark.parametrize("text", ["0/4", "5/4", "4", "1/2/3", "-1/4", "a/b", "1/0", "1/100000", ""])
def test_what_is_no_part_is_refused(source: Path, tmp_path: Path, text: str) -> None:
    result = CliRunner().invoke(app, ["prepare-data", str(source), "--output", str(tmp_path / "out"), "--part", text])
    assert result.exit_code == 2
    assert f"--part: '{text}' is no part; write I/N, from 1/N to N/N" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_part_cannot_be_the_joining_too(source: Path) -> None:
    result = CliRunner().invoke(app, ["prepare-data", str(source), "--part", "1/2", "--finish"])
    assert (result.exit_code, "give one of them" in result.stderr) == (2, True)
