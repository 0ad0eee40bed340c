"""A data set that is damaged, forged or out of date is refused in one line; a whole one is read only once."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from inl_core.corpus import shard_check
from inl_core.corpus.dataset import TokenDataset
from inl_core.corpus.manifest import Shard, data_fingerprint, load_manifest, sha256_of, verify
from inl_core.corpus.preparation import prepare
from inl_core.corpus.preparation.chunks import token_lists
from inl_core.corpus.shard_check import VERIFIED
from inl_core.errors import ArtefactError
from inl_core.recipe import DataSettings
from tests import damage
from tests.corpus.texts import settings

SHARD = "validation-00000-of-00001.arrow"


@pytest.fixture
def copy(text_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(text_data, tmp_path / "copy"))


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards are remembered as whole even if they were written a moment ago."""
    monkeypatch.setattr(shard_check, "_SETTLED_NS", -1)


@pytest.fixture
def unwritable(copy: Path, settled: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data set in a directory where nothing can be remembered."""
    (copy / VERIFIED).unlink(missing_ok=True)

    def refuse(path: Path, data: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shard_check, "write_whole", refuse)
    return copy


def overwrite_ids(path: Path, id: int = 70) -> None:
    """Put `id` in the place of every token in the file; its size and time stay the same."""
    before = path.stat()
    with pa.memory_map(str(path)) as source:
        values = pa.ipc.open_file(source).get_batch(0)["tokens"].values.to_numpy()
        place, size = path.read_bytes().find(values.tobytes()), values.nbytes
    assert place > 0
    with path.open("r+b") as file:
        file.seek(place)
        file.write(np.full(size // 2, id, dtype=np.uint16).tobytes())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.usefixtures("settled")
def test_a_shard_overwritten_in_place_is_noticed_also_once_it_was_found_whole(copy: Path) -> None:
    TokenDataset.open(copy, "validation")
    assert verify(copy).splits["validation"].tokens
    overwrite_ids(copy / SHARD)
    for read in (lambda: TokenDataset.open(copy, "validation"), lambda: verify(copy)):
        with pytest.raises(ArtefactError, match=rf"{SHARD}: damaged \(its sha256 is not the manifest's\); prepare it"):
            read()
    assert TokenDataset.open(copy, "train").num_tokens


@pytest.mark.usefixtures("settled")
def test_a_whole_data_set_is_read_once(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TokenDataset.open(copy, "validation")
    verify(copy)
    remembered = (copy / VERIFIED).read_bytes()

    def never(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(shard_check, "_look", never)
    verify(copy)
    TokenDataset.open(copy, "train")
    assert (copy / VERIFIED).read_bytes() == remembered
    with pytest.raises(AssertionError):
        verify(copy, deep=True)


@pytest.mark.usefixtures("settled")
def test_what_a_killed_process_left_of_the_memory_is_removed(copy: Path) -> None:
    (copy / VERIFIED).unlink(missing_ok=True)
    (copy / f".{VERIFIED}.abc.tmp").write_text("{")
    verify(copy)
    assert [path.name for path in copy.glob(".*")] == [VERIFIED]


def test_what_was_just_written_is_not_remembered(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (copy / VERIFIED).unlink(missing_ok=True)
    monkeypatch.setattr(shard_check, "_SETTLED_NS", 10**18)
    verify(copy)
    assert not (copy / VERIFIED).exists()


def test_a_directory_that_cannot_be_written_is_read_all_the_same(unwritable: Path) -> None:
    assert TokenDataset.open(unwritable, "validation").num_tokens
    overwrite_ids(unwritable / SHARD)
    with pytest.raises(ArtefactError, match="damaged"):
        TokenDataset.open(unwritable, "validation")


def test_where_nothing_can_be_remembered_ranks_believe_rank_0_of_the_same_files(
    unwritable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(shard_check, "_MUCH", 1)
    verify(unwritable, note=heard.append)
    assert "bytes of shards to check them" in heard[0]
    assert f"{VERIFIED}: cannot be written (Permission denied), so every start reads" in heard[1]
    found = shard_check.found_whole(unwritable)
    monkeypatch.setattr(shard_check, "_found", {})  # as in another process
    shard_check.believe(unwritable, found)
    looked: list[str] = []
    look = shard_check._look
    monkeypatch.setattr(shard_check, "_look", lambda path, *rest: (looked.append(path.name), look(path, *rest)))
    verify(unwritable, note=heard.append)
    assert (looked, len(heard)) == ([], 2)
    overwrite_ids(unwritable / SHARD)
    with pytest.raises(ArtefactError, match="damaged"):
        verify(unwritable)
    assert looked == [SHARD]


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "content",
    ["", "[]", "null", '{"shards": 3}', '{"manifest": 1, "shards": []}', "[" * 100_000, "\x00\xff", "a FIFO", "forged"],
)
def test_what_is_remembered_is_not_trusted(copy: Path, content: str) -> None:
    verify(copy)
    key = json.loads((copy / VERIFIED).read_text())["manifest"]
    (copy / VERIFIED).unlink()
    overwrite_ids(copy / SHARD)
    if content == "a FIFO":
        os.mkfifo(copy / VERIFIED)
    else:
        forged = json.dumps({"manifest": key, "shards": {SHARD: ["?", None, {}]}})
        (copy / VERIFIED).write_text(forged if content == "forged" else content, encoding="latin-1")
    with pytest.raises(ArtefactError, match="damaged"):
        TokenDataset.open(copy, "validation")


Rows = dict[str, Any]


def reseal(directory: Path, change: Callable[[Rows], None], name: str = SHARD) -> None:
    """Change the rows of a shard, and the manifest with them, as if both had been written so."""
    with pa.memory_map(str(directory / name)) as source:
        batch = pa.ipc.open_file(source).get_batch(0)
        rows: Rows = {
            "tokens": batch["tokens"].values.to_numpy().copy(),
            "lengths": np.diff(batch["tokens"].offsets.to_numpy()),
            "prompt_length": batch["prompt_length"].to_numpy().copy(),
            "num_bytes": batch["num_bytes"].to_numpy().copy(),
        }
        schema = batch.schema
    change(rows)
    columns = [token_lists(rows["tokens"], rows["lengths"]), rows["prompt_length"], rows["num_bytes"]]
    with pa.ipc.new_file(directory / name, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    manifest = json.loads((directory / "manifest.json").read_text())
    entry = next(s for split in manifest["splits"].values() for s in split["shards"] if s["file"] == name)
    entry |= {"size": (directory / name).stat().st_size, "sha256": sha256_of(directory / name)}
    shards = [Shard(**s) for split in manifest["splits"].values() for s in split["shards"]]
    manifest["fingerprint"] = data_fingerprint(manifest["tokenizer_fingerprint"], shards)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def set_at(name: str, place: int, value: int) -> Callable[[Rows], None]:
    return lambda rows: rows[name].__setitem__(place, value)


def move_boundary(rows: Rows) -> None:
    rows["lengths"][0] += 1
    rows["lengths"][1] -= 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_at("tokens", 3, 60_000), "token id 60,000, the vocabulary has 300"),
        (set_at("tokens", 0, 70), "a document does not begin and end as it must"),
        (move_boundary, "a document does not begin and end as it must"),
        (set_at("prompt_length", 0, 1 << 20), "a document's prompt or size is impossible"),
        (set_at("num_bytes", 0, -1), "a document's prompt or size is impossible"),
        (set_at("num_bytes", 0, 1), "its totals are not the manifest's"),
    ],
)
def test_rows_that_are_no_documents_are_refused_though_every_checksum_fits(
    copy: Path, change: Callable[[Rows], None], message: str
) -> None:
    reseal(copy, change)
    with pytest.raises(ArtefactError, match=message):
        TokenDataset.open(copy, "validation")
    with pytest.raises(ArtefactError, match=message):
        verify(copy)


def edit(directory: Path, path: str, value: object) -> None:
    """Set the value at a dotted path of the manifest; `...` for a value removes the key."""
    manifest = json.loads((directory / "manifest.json").read_text())
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = manifest
    for part in parents:
        place = place[part]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    (directory / "manifest.json").write_text(json.dumps(manifest))


FIRST = "splits.train.shards.0"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("splits", {}, "splits"),
        ("splits.validation", ..., "splits"),
        ("splits.train.shards", [], "documents is not the sum"),
        ("splits.train.tokens", -1, "greater than or equal to 0"),
        ("splits.train.tokens", 10**30, "less than or equal"),
        ("splits.train.tokens", "12", "valid integer"),
        ("splits.train.tokens", None, "valid integer"),
        (f"{FIRST}.documents", True, "valid integer"),
        (f"{FIRST}.bytes", 1.5, "integer"),
        (f"{FIRST}.sha256", "0" * 64, "fingerprint"),
        ("vocab_size", 4_000_000_000, "less than or equal"),
        ("vocab_size", 0, "greater than or equal"),
        ("vocab_size", 301, "vocab_size is 301, the tokenizer's is 300"),
        ("bos_id", 300, "below vocab_size"),
        ("eos_id", -1, "greater than or equal"),
        ("bos_id", 5, "bos_id is 5, the tokenizer's is 0"),
        ("settings", {}, "settings.sources"),
        ("settings.sources", 3, "settings.sources"),
        ("fingerprint", "x", "fingerprint"),
        ("format", 2, "format"),
        ("document_policy", "tokens alone", "document_policy"),
        ("document_policy", ..., "document_policy"),
    ],
)
def test_an_impossible_manifest_is_refused(copy: Path, path: str, value: object, message: str) -> None:
    edit(copy, path, value)
    with pytest.raises(ArtefactError, match=message) as error:
        verify(copy)
    assert "\n" not in str(error.value)
    assert str(copy / "manifest.json") in str(error.value)


def rename_shard(directory: Path, name: str) -> None:
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["splits"]["validation"]["shards"][0]["file"] = name
    shards = [Shard(**s) for split in manifest["splits"].values() for s in split["shards"]]
    manifest["fingerprint"] = data_fingerprint(manifest["tokenizer_fingerprint"], shards)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def test_a_split_that_names_anothers_shards_is_refused(copy: Path) -> None:
    splits = json.loads((copy / "manifest.json").read_text())["splits"]
    # In this order the list of shards stays the same, and so does the fingerprint.
    edit(copy, "splits", {"validation": splits["train"], "train": splits["validation"]})
    message = r"manifest\.json: damaged: splits\.validation names 'train-00000-of-00003\.arrow' where validation-"
    for read in (verify, TokenDataset.open, load_manifest):
        with pytest.raises(ArtefactError, match=message):
            read(copy)


def test_prompts_that_the_manifest_denies_are_refused(prompt_data: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(prompt_data, tmp_path / "copy"))
    TokenDataset.open(directory)
    edit(directory, "has_prompts", False)
    for read in (verify, TokenDataset.open):  # the shards were found whole before, but with another manifest
        with pytest.raises(ArtefactError, match="a document has a prompt, the manifest says that none has"):
            read(directory)


@pytest.mark.parametrize("name", ["train-00000-of-00003.arrow", "train-00000-of-00001.arrow", "validation.arrow"])
def test_a_shard_of_another_name_is_refused(copy: Path, name: str) -> None:
    rename_shard(copy, name)
    with pytest.raises(ArtefactError, match=f"splits.validation names '{name}' where {SHARD} belongs; prepare"):
        TokenDataset.open(copy, "validation")


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "..", "", "a\x00b", "C:\\x"])
def test_an_entry_outside_the_directory_is_refused(copy: Path, name: str) -> None:
    rename_shard(copy, name)
    with pytest.raises(ArtefactError, match="not inside the directory"):
        TokenDataset.open(copy, "validation")


def test_the_manifest_that_was_written_is_read_as_it_was(copy: Path) -> None:
    edit(copy, "rows", load_manifest(copy).rows)
    assert verify(copy, deep=True) == load_manifest(copy)


TRAIN = "train-00001-of-00003.arrow"
DAMAGE = [
    (TRAIN, damage.remove, "missing"),
    (TRAIN, lambda path: os.truncate(path, 100), "100 bytes, the manifest says"),
    (TRAIN, damage.flip_a_bit, "damaged"),
    (SHARD, damage.fifo, "a FIFO, not a file"),
    (SHARD, damage.linked_to("/dev/zero"), "a device, not a file"),
    (SHARD, damage.directory, "a directory, not a file"),
    ("tokenizer.json", damage.remove, "missing"),
    ("tokenizer.json", damage.replaced_by(b"{}"), "not a tokenizer.json"),
    ("tokenizer.json", damage.linked_to("/dev/zero"), "a device, not a file"),
    ("manifest.json", damage.remove, "no data set here"),
    ("manifest.json", lambda path: os.truncate(path, 300), "not valid JSON"),
    ("manifest.json", damage.replaced_by(b"{}"), "damaged"),
    ("manifest.json", damage.fifo, "a FIFO, not a file"),
]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize(("name", "damaged", "message"), DAMAGE)
def test_damage_is_named_with_the_fix(copy: Path, name: str, damaged: damage.Damage, deep: bool, message: str) -> None:
    verify(copy, deep=deep)
    damaged(copy / name)
    with pytest.raises(ArtefactError, match=message) as error:
        verify(copy, deep=deep)
    assert str(copy) in str(error.value)


def test_another_tokenizer_in_the_data_set_is_noticed(copy: Path, prompt_data: Path) -> None:
    shutil.copy(prompt_data / "tokenizer.json", copy)
    with pytest.raises(ArtefactError, match="not the tokenizer that encoded this data set"):
        verify(copy)


def test_changed_sources_make_a_data_set_stale(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for number in range(30):
        (source / f"{number}.txt").write_text(f"text {number}")
    chosen = settings(source)
    manifest = prepare(chosen, tmp_path / "out")
    os.utime(source / "3.txt", (1, 1))
    assert verify(tmp_path / "out", settings=chosen) == manifest  # it has another time, but the same content
    (source / "3.txt").write_text("text X")
    with pytest.raises(ArtefactError, match=r"stale: .*3\.txt changed since it was prepared"):
        verify(tmp_path / "out")
    with pytest.raises(ArtefactError, match="stale"):
        prepare(chosen, tmp_path / "out")
    alone = DataSettings(directory=tmp_path / "out")
    assert verify(tmp_path / "out", settings=alone) == prepare(alone, tmp_path / "out") == manifest
    (source / "3.txt").write_text("text 3")
    (source / "new.txt").write_text("text")
    with pytest.raises(ArtefactError, match=r"new\.txt is new"):
        verify(tmp_path / "out")
    (source / "new.txt").unlink()
    (source / "4.txt").unlink()
    with pytest.raises(ArtefactError, match=r"4\.txt was removed"):
        verify(tmp_path / "out")
    shutil.rmtree(source)
    assert verify(tmp_path / "out") == manifest  # without its sources a data set stands alone
