"""A prepared data set holds every document once, in one split, and replaces nothing unless it is told to."""

import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pytest

from inl_core.corpus.manifest import SPLITS, default_directory, settings_key, verify
from inl_core.corpus.preparation import Part, PrepareProgress, finish, prepare, prepare_part, stages
from inl_core.corpus.reading import pieces
from inl_core.corpus.tokenizer import Tokenizer, train_tokenizer
from inl_core.errors import ArtefactError, RecipeError
from inl_core.recipe.data import DataSettings, TokenizerSettings
from tests.corpus.texts import contents, settings, texts_of, write_rows


def test_every_document_is_in_exactly_one_split(text_directory: Path, text_data: Path) -> None:
    train, validation = texts_of(text_data, "train"), texts_of(text_data, "validation")
    assert sorted(train + validation) == sorted(path.read_text() for path in text_directory.iterdir())
    assert 3 <= len(validation) <= 25
    manifest = verify(text_data, deep=True)
    for split, texts in (("train", train), ("validation", validation)):
        info = manifest.splits[split]
        assert info.documents == len(texts)
        assert info.bytes == sum(len(text.encode()) for text in texts)
    names = [f"train-{i:05d}-of-00003.arrow" for i in range(3)]
    assert [shard.file for shard in manifest.splits["train"].shards] == names
    assert set(contents(text_data)) == {
        *("manifest.json", "tokenizer.json", "quarantine.jsonl", "validation-00000-of-00001.arrow"),
        *names,
    }


def test_prompts_and_chats_are_laid_out_and_measured(tmp_path: Path) -> None:
    chat = [("system", "be brief"), ("user", "hi"), ("assistant", "yes?"), ("user", "bye"), ("assistant", "goodbye")]
    rows = [
        {"prompt": "question ", "completion": "answer"},
        {"messages": [{"role": role, "content": content} for role, content in chat]},
    ]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps(row))
    (tmp_path / "plain.txt").write_text("plain " * 50)
    manifest = prepare(settings(tmp_path, validation_fraction=0.9), tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out" / "tokenizer.json")
    files = [shard.file for split in manifest.splits.values() for shard in split.shards]
    found = [row for file in files for row in pa.ipc.open_file(tmp_path / "out" / file).read_all().to_pylist()]
    by_size = {row["num_bytes"]: row for row in found}
    encode, role = tokenizer.encode, tokenizer.role_id
    prompt = [tokenizer.bos_id, *encode("question ")]
    assert by_size[15]["tokens"] == [*prompt, *encode("answer"), tokenizer.eos_id]
    assert by_size[15]["prompt_length"] == len(prompt)
    turns = [[role(name), *encode(content), role("end")] for name, content in chat]
    whole = [tokenizer.bos_id, *[token for turn in turns for token in turn], tokenizer.eos_id]
    row = by_size[sum(len(content) for _, content in chat)]
    assert row["tokens"] == whole
    assert row["prompt_length"] == len(whole) - 1 - len(turns[-1]) + 1
    assert by_size[300]["prompt_length"] == 0
    assert manifest.has_prompts
    assert sorted(source.format for source in manifest.sources) == [
        "JSON Lines, messages",
        "JSON Lines, prompt+completion",
        "text",
    ]


def test_copies_are_dropped_and_never_straddle_the_split(tmp_path: Path) -> None:
    rows = [f"document {i} with words" for i in range(100)]
    spellings = [rows, [row.upper() for row in rows], [row.replace(" ", "\n ") for row in rows]]
    lines = [json.dumps({"text": text}) for spelling in spellings for text in spelling]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    manifest = prepare(settings(tmp_path / "rows.jsonl", validation_fraction=0.3), tmp_path / "out")
    assert (manifest.rows, manifest.duplicates) == (300, 200)
    train, validation = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "validation")
    assert sorted(train + validation) == sorted(rows)
    assert not set(train) & set(validation)


def test_bad_rows_are_counted_and_quarantined_and_too_many_fail(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"row {i}"}) for i in range(96)] + ["{", "[]", '{"text": 1}', '{"text": " "}']
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(ArtefactError, match=r"3 of 100 rows are bad \(3.00%\)") as error:
        prepare(settings(tmp_path / "rows.jsonl"), tmp_path / "out")
    assert "rows.jsonl:97: not JSON" in str(error.value)
    assert "--max-bad-ratio" in str(error.value)
    manifest = prepare(settings(tmp_path / "rows.jsonl", max_bad_ratio=0.03), tmp_path / "out")
    assert (manifest.rows, manifest.quarantined, manifest.empty) == (100, 3, 1)
    quarantined = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert [row["origin"].rpartition(":")[2] for row in quarantined] == ["97", "98", "99"]
    assert all(row["reason"] for row in quarantined)


def test_shards_are_fewer_when_there_is_little_text(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text(f"text number {number} " * 20)
    notes = []
    manifest = prepare(settings(tmp_path), tmp_path / "out", progress=lambda event: notes.append(event.message))
    assert 1 <= len(manifest.splits["train"].shards) <= 2
    assert all(shard.documents for shard in manifest.splits["train"].shards)
    assert manifest.splits["validation"].documents == 1
    assert any("one of them is held out" in note for note in notes if note)
    assert any("held out" in note for note in manifest.notes)


def test_one_document_alone_is_cut_in_two(tmp_path: Path) -> None:
    text = "".join(f"line {i} of the only document\n" for i in range(200))
    (tmp_path / "only.txt").write_text(text)
    manifest = prepare(settings(tmp_path / "only.txt", validation_fraction=0.1), tmp_path / "out")
    (head,), (tail,) = texts_of(tmp_path / "out", "train"), texts_of(tmp_path / "out", "validation")
    assert head + tail == text
    assert head.endswith("\n")
    assert len(tail) == pytest.approx(0.1 * len(text), rel=0.1)
    assert "its last 10% is held out" in manifest.notes[0]


def test_a_given_tokenizer_is_used_and_belongs_to_the_settings(
    text_directory: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    tokenizer.save(tmp_path / "mine.json")
    chosen = settings(text_directory, tokenizer=TokenizerSettings(file=tmp_path / "mine.json"))
    manifest = prepare(chosen, tmp_path / "out")
    assert manifest.tokenizer_fingerprint == tokenizer.fingerprint
    (tmp_path / "mine.json").unlink()
    verify(tmp_path / "out", settings=chosen)  # the data set keeps its own copy


def test_the_tokenizer_trains_on_training_documents_only(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(
            ("common words here " if number else "zyzzyva ") * (100 - 95 * (1 - number))
        )
    prepare(settings(tmp_path), tmp_path / "out")
    assert texts_of(tmp_path / "out", "validation") == ["zyzzyva " * 5]
    tokens = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]
    assert any("common" in token for token in tokens)
    assert not any("zy" in token for token in tokens)


def test_the_tokenizer_sample_is_bounded_and_even(
    text_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def train(texts: Iterator[str], *, vocab_size: int) -> Tokenizer:
        seen.extend(texts)
        return train_tokenizer(iter(seen), vocab_size=vocab_size)

    monkeypatch.setattr(stages, "train_tokenizer", train)
    chosen = settings(text_directory, tokenizer=TokenizerSettings(vocab_size=300, sample_bytes=5000))
    prepare(chosen, tmp_path / "out")
    sizes = [len(text.encode()) for text in texts_of(tmp_path / "out", "train")]
    assert 1000 < sum(len(text.encode()) for text in seen) <= 5000 < sum(sizes) / 2
    numbers = [int(text.split()[0]) for text in seen]  # each document begins with its number in the order of reading
    assert min(numbers) < 30 < max(numbers)


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    def pipe(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))

    return pipe  # pyright: ignore


def test_stdin_is_read_as_what_it_looks_like(tmp_path: Path, piped) -> None:
    rows = b"".join(b'{"text": "row %d"}\n' % i for i in range(30))
    notes = []
    piped(rows)
    manifest = prepare(settings("-"), tmp_path / "rows", progress=lambda event: notes.append(event.message))
    assert manifest.rows == 30
    assert "stdin: read as JSON Lines" in notes
    piped(rows)
    assert prepare(settings("-"), tmp_path / "rows") == manifest
    piped(b"other text")
    with pytest.raises(ArtefactError, match="other text on stdin"):
        prepare(settings("-"), tmp_path / "rows")
    piped(b"plain\ntext\n")
    assert prepare(settings("-"), tmp_path / "plain").sources[0].format == "text"
    piped(b"")
    with pytest.raises(ArtefactError, match="no document"):
        prepare(settings("-"), tmp_path / "empty")


def test_nothing_is_done_twice_and_nothing_replaced_unasked(text_directory: Path, tmp_path: Path) -> None:
    chosen = settings(text_directory)
    manifest = prepare(chosen, tmp_path / "out")
    before = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in contents(tmp_path / "out")}
    assert prepare(chosen, tmp_path / "out") == manifest
    assert {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in contents(tmp_path / "out")} == before
    with pytest.raises(ArtefactError, match="vocab_size was 300, is now 310"):
        prepare(settings(text_directory, vocab_size=310), tmp_path / "out")
    replaced = prepare(settings(text_directory, num_shards=2), tmp_path / "out", overwrite=True)
    assert len(replaced.splits["train"].shards) == 2
    assert verify(tmp_path / "out", deep=True) == replaced
    assert not list((tmp_path / "out").glob("*-of-00008*"))


def test_a_failed_replacement_leaves_the_old_data_set(text_directory: Path, tmp_path: Path) -> None:
    manifest = prepare(settings(text_directory), tmp_path / "out")
    with pytest.raises(RecipeError, match="no such file"):
        prepare(settings(tmp_path / "gone"), tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out", deep=True) == manifest


def test_unusable_input_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    for source, error, message in (
        (tmp_path / "gone.txt", RecipeError, "no such file"),
        (tmp_path / "empty.txt", ArtefactError, "no document"),
    ):
        with pytest.raises(error, match=message):
            prepare(settings(source), tmp_path / "out")
    prepared = tmp_path / "out" / ".prepare"
    assert not prepared.exists() or (prepared / "plan.json").exists()
    with pytest.raises(RecipeError, match="a file; the output is a directory"):
        prepare(settings(tmp_path / "empty.txt"), tmp_path / "empty.txt")


def test_default_directories_are_readable_and_distinct(tmp_path: Path) -> None:
    assert str(default_directory(DataSettings())) == "data/builtin-python-2048"
    several = [
        DataSettings(),
        settings("builtin:python"),
        settings(tmp_path / "a.txt"),
        settings(tmp_path / "sub" / "a.txt"),
        settings(tmp_path / "a.txt", "builtin:python"),
        settings("builtin:python", validation_fraction=0.1),
        settings("builtin:python", tokenizer=TokenizerSettings(file=tmp_path / "llama.json")),
    ]
    names = [default_directory(chosen).name for chosen in several]
    assert len(set(names)) == len(names)
    assert names[4].startswith("a-and-1-more-300-")
    assert "llama" in names[6]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("some text\n" * 30)

    def grow(event) -> None:
        if event.stage == "read" and not event.message:
            path.write_text("other text\n" * 40)

    with pytest.raises(ArtefactError, match=r"a\.txt: changed while it was being read"):
        prepare(settings(path), tmp_path / "out", progress=grow)


def test_one_big_file_is_counted_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("inl_core.corpus.preparation.text_chunks.CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(pieces, "MAX_DOCUMENT", 1 << 14)
    (tmp_path / "a.txt").write_text("".join(f"line {number}\n" for number in range(60_000)))
    events = []
    prepare(settings(tmp_path / "a.txt"), tmp_path / "out", progress=events.append)
    done = [event.done for event in events if event.stage == "read" and event.total]
    assert len(done) > 8
    assert done == sorted(done)
    assert done[-1] == (tmp_path / "a.txt").stat().st_size
    assert any("training a tokenizer of 300 tokens" in (event.message or "") for event in events)


def test_two_preparations_of_one_directory_do_not_meet(text_directory: Path, tmp_path: Path) -> None:
    refused = []

    def second(event: PrepareProgress) -> None:
        if event.stage == "tokenizer" and not refused:
            with pytest.raises(ArtefactError, match="another process"):
                prepare(settings(text_directory), tmp_path / "out")
            refused.append(True)

    prepare(settings(text_directory), tmp_path / "out", progress=second)
    assert refused


def test_named_columns_are_part_of_what_a_data_set_was_made_of(tmp_path: Path) -> None:
    rows = [{"body": f"the body of row {i}", "text": f"the text of row {i}"} for i in range(40)]
    write_rows(tmp_path / "rows.jsonl", rows)
    plain, named = (settings(tmp_path / "rows.jsonl", columns=names) for names in ({}, {"text": "body"}))
    assert default_directory(plain) != default_directory(named)
    manifest = prepare(named, tmp_path / "out")
    assert sorted(text for split in SPLITS for text in texts_of(tmp_path / "out", split)) == sorted(
        row["body"] for row in rows
    )
    assert prepare(named, tmp_path / "out") == manifest
    with pytest.raises(ArtefactError, match="prepared with other settings: columns was"):
        prepare(plain, tmp_path / "out")
    assert "columns" not in settings_key(plain)  # as in data sets of earlier versions


def test_sources_are_taken_as_often_as_their_weights_say(tmp_path: Path) -> None:
    sources = []
    for name in ("often", "once", "seldom"):
        sources.append(tmp_path / f"{name}.jsonl")
        write_rows(sources[-1], [{"text": f"{name} {i}"} for i in range(400)])
    write_rows(tmp_path / "copies.jsonl", [{"text": f"often {i}"} for i in range(400)])
    chosen = settings(*sources, tmp_path / "copies.jsonl", weights=(2.5, 1.0, 0.25, 7.0))
    prepare(chosen, tmp_path / "out")
    counts = Counter(text for split in SPLITS for text in texts_of(tmp_path / "out", split))
    by_source = {
        name: Counter(n for text, n in counts.items() if text.startswith(name)) for name in ("often", "once", "seldom")
    }
    assert set(by_source["often"]) == {2, 3}  # and no copy of them seven times more
    assert by_source["often"][3] == pytest.approx(200, abs=40)
    assert by_source["once"] == {1: 400}
    assert by_source["seldom"][1] == pytest.approx(100, abs=35)
    sides = [set(texts_of(tmp_path / "out", split)) for split in SPLITS]
    assert not sides[0] & sides[1]
    train = texts_of(tmp_path / "out", "train")
    assert all(first != second for first, second in pairwise(train))
    again = prepare(chosen, tmp_path / "again")
    assert again.fingerprint == verify(tmp_path / "out", settings=chosen).fingerprint
    assert default_directory(chosen) != default_directory(chosen.model_copy(update={"weights": ()}))


def test_a_document_that_its_weight_leaves_out_is_taken_from_another_source(tmp_path: Path) -> None:
    for name in ("first", "second"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": f"row {i}"} for i in range(50)])
    chosen = settings(tmp_path / "first.jsonl", tmp_path / "second.jsonl", weights=(0.5, 1.0))
    manifest = prepare(chosen, tmp_path / "out")
    found = [text for split in SPLITS for text in texts_of(tmp_path / "out", split)]
    assert sorted(found) == sorted(f"row {i}" for i in range(50))
    assert 0 < manifest.duplicates < 50  # of those that the first source gave


@pytest.mark.parametrize("is_tokenised", [False, True])
def test_parts_of_sources_with_weights_hold_the_documents_of_the_whole(tmp_path: Path, is_tokenised: bool) -> None:
    write_rows(tmp_path / "a.jsonl", [{"text": f"row {i}"} for i in range(300)])
    write_rows(tmp_path / "b.jsonl", [{"text": f"row {i}"} for i in range(200, 500)])
    chosen = settings(tmp_path / "a.jsonl", tmp_path / "b.jsonl", weights=(0.5, 2.5))
    whole = prepare(chosen, tmp_path / "whole")
    if is_tokenised:
        file = {"file": tmp_path / "whole/tokenizer.json"}
        chosen = settings(tmp_path / "a.jsonl", tmp_path / "b.jsonl", weights=(0.5, 2.5), tokenizer=file)
    for number in (1, 2):
        prepare_part(chosen, tmp_path / "joined", Part(number, 2))
    joined = finish(chosen, tmp_path / "joined")
    for split in SPLITS:
        found, wanted = texts_of(tmp_path / "joined", split), texts_of(tmp_path / "whole", split)
        assert Counter(found) == Counter(wanted)
        assert max(Counter(found).values()) == 3
    assert joined.duplicates == whole.duplicates > 0


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="weights has 2 numbers for 1 sources; give one for each"):
        settings(tmp_path / "a.txt", weights=(1.0, 2.0))
    with pytest.raises(ArtefactError, match=r"data\.weights: no document is left"):
        prepare(settings(tmp_path / "a.txt", weights=(1e-9,)), tmp_path / "out")
