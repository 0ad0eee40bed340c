"""Every file of a checkpoint damaged in every way we know: one line that names what is wrong, and nothing else.

`sealed` damage is put into the manifest as if it had been saved so: what is refused then is the content.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from inl_core.analysis.inspection import inspect_path
from inl_core.errors import ArtefactError
from inl_core.inference import loading
from inl_core.inference.checkpoint_files import verify_checkpoint
from inl_core.inference.loading import find_checkpoint, load_model, open_checkpoint
from inl_core.recipe import OptimizerSettings
from inl_core.training.checkpoint import load_checkpoint, restore_rng
from inl_core.training.optimizers import build_optimizers
from tests.damage import NOT_A_RECORD, WHOLE_FILE, drop, edit_header, flip_a_bit, put, write_header
from tests.inference.tiny import reseal, tiny_model, write_checkpoint

STEP = "step-00000007"
WEIGHTS, OPTIMIZER = "model.safetensors", "training_state/optimizer.safetensors"
PROGRESS, MANIFEST, CONFIG = "training_state/progress.json", "manifest.json", "config.json"
FILES = (CONFIG, "tokenizer.json", "recipe.yaml", WEIGHTS, OPTIMIZER, PROGRESS)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that nothing is wrong with."""
    return write_checkpoint(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "run" / "checkpoints" / STEP))


def evaluate(path: Path) -> None:
    """What `inl eval` and `inl generate` do first."""
    load_model(find_checkpoint(path))


def resume(path: Path) -> None:
    """What `inl resume` does first."""
    verify_checkpoint(path, purpose="resume")
    model = tiny_model("v4")
    restore_rng(load_checkpoint(path, model, build_optimizers(model, OptimizerSettings(), torch.device("cpu"))).rng)


def inspect(path: Path) -> None:
    """`inl inspect`, which shows what it can and then fails with the problem."""
    overview = inspect_path(path)
    if overview.problem:
        raise ArtefactError(overview.problem)


READERS = (evaluate, resume, inspect)


def refused(path: Path, *readers: Callable[[Path], None]) -> list[str]:
    """What each reader says: always one line, and short enough to read."""
    said = []
    for reader in readers or READERS:
        with pytest.raises(ArtefactError) as caught:
            reader(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1_000
        said.append(str(caught.value))
    return said


def test_nothing_is_wrong_with_a_whole_checkpoint_under_any_name(checkpoint: Path, tmp_path: Path) -> None:
    for reader in READERS:
        reader(checkpoint)
    copy = checkpoint.rename(tmp_path / "my-model")
    for reader in READERS:
        reader(copy)
    assert load_model(copy).step == 7
    assert inspect_path(copy).sections["checkpoint"]["step"] == 7  # type: ignore[call-overload]


@pytest.mark.parametrize("file", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", WHOLE_FILE.values(), ids=WHOLE_FILE.keys())
def test_a_damaged_file_is_named(checkpoint: Path, file: str, damage: Callable[[Path], None]) -> None:
    damage(checkpoint / file)
    unread_by_evaluation = file.startswith("training_state") and damage is WHOLE_FILE["a bit flipped"]
    if damage is WHOLE_FILE["a bit flipped"] and file == MANIFEST:
        return  # may be white space
    said = refused(checkpoint, resume, inspect) if unread_by_evaluation else refused(checkpoint)
    assert all(file in line for line in said)


@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_processes_that_share_the_reading_read_every_file_once(checkpoint: Path, processes: int) -> None:
    shares = [(process, processes) for process in range(processes)]
    finders = {}
    for file in set(FILES) - {CONFIG}:  # which every process parses
        before = (checkpoint / file).read_bytes()
        flip_a_bit(checkpoint / file)
        finders[file] = []
        for share in shares:
            try:
                verify_checkpoint(checkpoint, purpose="resume", share=share)
            except ArtefactError:
                finders[file].append(share)
        (checkpoint / file).write_bytes(before)
        assert len(finders[file]) == 1, file
    for share in shares:
        verify_checkpoint(checkpoint, purpose="resume", share=share)
    assert len({finders[WEIGHTS][0], finders[OPTIMIZER][0]}) == min(processes, 2)  # the two large files


@pytest.mark.parametrize("file", [MANIFEST, CONFIG, "tokenizer.json", PROGRESS, WEIGHTS, OPTIMIZER])
@pytest.mark.parametrize("damage", NOT_A_RECORD.values(), ids=NOT_A_RECORD.keys())
def test_a_file_saved_with_other_content_is_refused(
    checkpoint: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(checkpoint / file)
    if file != MANIFEST:
        reseal(checkpoint)
    if file == "tokenizer.json":
        refused(checkpoint, evaluate)
    else:
        refused(checkpoint, resume) if file.startswith("training_state") else refused(checkpoint)


VALUES: list[tuple[str, str, Any]] = [
    *((MANIFEST, "files", value) for value in ({}, [], None, "all")),
    *((MANIFEST, "format", value) for value in (2, "1", None, True)),
    *((MANIFEST, "step", value) for value in (-1, 8, 7.0, "7", None, 10**30)),
    *((MANIFEST, "files.config.json.bytes", value) for value in (-1, 10**9, 1.5, "9", True, None, 10**30)),
    *((MANIFEST, "files.model.safetensors.sha256", value) for value in ("", "0" * 64, "F" * 64, "a" * 63, 5, None)),
    *(
        (MANIFEST, f"files.{name}", {"bytes": 1, "sha256": "0" * 64})
        for name in ("/etc/passwd", "../../x", "a/../../x", "", ".", "./config.json", "a//b", "C:/x", "a\0b", "x" * 300)
    ),
    *((CONFIG, "format", value) for value in (2, None)),
    *((CONFIG, "model", value) for value in ([], None, "v4", {})),
    *((CONFIG, "model.d_model", value) for value in (10**9, -1, "wide", 10**30, None)),
    *((CONFIG, "model.vocab_size", value) for value in (4 * 10**9, None, 0, 299)),
    *((CONFIG, "model.num_layers", value) for value in (10**9, 3, 1, [1])),
    *((CONFIG, "model.max_seq_len", value) for value in (10**9, 0)),
    (CONFIG, "model.integrator.controller.experts", 10**9),
    (CONFIG, "model.integrator.num_iterations", 10**9),
    (CONFIG, "model.preset", ["v4"]),
    *((CONFIG, "bos_id", value) for value in (4 * 10**9, -1, "0", None)),
    *((CONFIG, "special_tokens", value) for value in ([], {"a": "b"}, {"a": -1})),
    *((CONFIG, "sequence_length", value) for value in (0, "long", 10**12)),
    *((CONFIG, "tokenizer", value) for value in (5, "", [])),
    *((CONFIG, "data_directory", value) for value in (5, "a\0b", "")),
    *((CONFIG, "provenance", value) for value in ({}, None, ["x"], [{"data": {}}], [[[[]]]])),
    *((PROGRESS, "step", value) for value in (-1, 8, 7.0, "7", None)),
    *((PROGRESS, "samples", value) for value in (-1, 10**30)),
    *((PROGRESS, "world_size", value) for value in (0, -1, None)),
    *((PROGRESS, "seconds", value) for value in (float("nan"), float("inf"), -1, "long")),
    (PROGRESS, "data_fingerprint", None),
    (PROGRESS, "unknown", 1),
    *((PROGRESS, "rng", value) for value in (None, [], {"cpu": [1, 2]}, {"cpu": [300] * 5056}, {"cpu": "abc"})),
    (PROGRESS, "rng", {"cpu": [0] * 5056}),
]


@pytest.mark.parametrize(("file", "key", "value"), VALUES, ids=lambda value: repr(value)[:40])
def test_a_record_with_a_wrong_value_is_refused(checkpoint: Path, file: str, key: str, value: Any) -> None:
    put(checkpoint / file, key, value)
    if file != MANIFEST:
        reseal(checkpoint)
    if (key == "tokenizer" and value == "") or (key == "bos_id" and value in (4 * 10**9, None)):
        refused(checkpoint, evaluate)  # only who reads text compares the two files
    elif file == PROGRESS:
        refused(checkpoint, resume)
    elif file == CONFIG and not key.startswith("model"):
        refused(checkpoint)
    else:
        refused(checkpoint, evaluate, inspect)


@pytest.mark.parametrize("file", FILES)
def test_a_manifest_must_name_every_file_that_is_read(checkpoint: Path, file: str) -> None:
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    del manifest["files"][file]
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    assert all(file in line for line in refused(checkpoint))


@pytest.mark.parametrize("file", ["model-2.safetensors", "training_state/more.safetensors"])
def test_tensors_that_the_manifest_does_not_name_are_refused(checkpoint: Path, file: str) -> None:
    shutil.copyfile(checkpoint / WEIGHTS, checkpoint / file)
    assert all(file in line for line in refused(checkpoint))


def test_a_key_that_stands_twice_is_refused(checkpoint: Path) -> None:
    text = (checkpoint / MANIFEST).read_text()
    (checkpoint / MANIFEST).write_text(text.replace('"step": 7', '"step": 8, "step": 7'))
    assert all("'step' stands twice" in line for line in refused(checkpoint))


@pytest.mark.parametrize("key", ["format", "model", "tokenizer"])
def test_a_configuration_without_a_key_is_refused(checkpoint: Path, key: str) -> None:
    drop(checkpoint / CONFIG, key)
    reseal(checkpoint)
    assert all(key in line for line in refused(checkpoint))


@pytest.mark.parametrize("key", ["step", "samples", "rng", "world_size", "data_fingerprint"])
def test_progress_without_a_key_is_refused(checkpoint: Path, key: str) -> None:
    drop(checkpoint / PROGRESS, key)
    reseal(checkpoint)
    assert key in refused(checkpoint, resume)[0]


@pytest.mark.parametrize("name", ["step-00000900", "step-8", "step-99999999999999999999"])
def test_a_renamed_checkpoint_is_refused(checkpoint: Path, name: str) -> None:
    assert all("was renamed" in line for line in refused(checkpoint.rename(checkpoint.with_name(name))))


def first(header: dict[str, Any]) -> dict[str, Any]:
    """The first tensor of a header with more than one number."""
    return next(entry for name, entry in header.items() if name != "__metadata__" and entry["shape"])


def grown(header: dict[str, Any]) -> None:
    header["extra"] = {"dtype": "F32", "shape": [0, 10**15], "data_offsets": [0, 0]}


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "integers": lambda header: first(header).update(dtype="I32"),
    "unsigned": lambda header: first(header).update(dtype="U32"),
    "unknown type": lambda header: first(header).update(dtype="X9"),
    "flattened": lambda header: first(header).update(shape=[-1]),
    "more rows": lambda header: first(header).update(shape=[10**9, 10**9]),
    "overflow": lambda header: first(header).update(shape=[2**62, 2**62]),
    "turned": lambda header: first(header).update(shape=[1, *first(header)["shape"]]),
    "outside": lambda header: first(header).update(data_offsets=[0, 10**12]),
    "backwards": lambda header: first(header).update(data_offsets=[8, 0]),
    "overlap": lambda header: first(header).update(data_offsets=list(header.values())[-1]["data_offsets"]),
    "no offsets": lambda header: first(header).pop("data_offsets"),
    "an empty one more": grown,
    "renamed": lambda header: header.update(other=header.pop(next(name for name in header if name != "__metadata__"))),
    "nothing": lambda header: header.clear(),
    "bad metadata": lambda header: header.update(__metadata__=[1]),
}
BYTES: dict[str, Callable[[Path], object]] = {
    "length 2**63": lambda path: write_header(path, b"{}", length=2**63),
    "length 2**40": lambda path: write_header(path, b"{}", length=2**40),
    "array": lambda path: write_header(path, b"[]"),
    "brackets": lambda path: write_header(path, b"[" * 100_000),
    "deep": lambda path: write_header(path, b'{"a":' * 100_000),
    "not UTF-8": lambda path: write_header(path, b'{"\xff": 1}'),
    "twice": lambda path: write_header(
        path, b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}', bytes(4)
    ),
    "zeros": lambda path: path.write_bytes(bytes(8)),
}


@pytest.mark.parametrize("file", [WEIGHTS, OPTIMIZER])
@pytest.mark.parametrize("name", [*HEADERS, *BYTES])
def test_a_header_that_does_not_fit_is_refused(checkpoint: Path, file: str, name: str) -> None:
    path = checkpoint / file
    edit_header(path, HEADERS[name]) if name in HEADERS else BYTES[name](path)
    reseal(checkpoint)
    said = refused(checkpoint) if file == WEIGHTS else refused(checkpoint, resume)
    assert all(file in line for line in said)


@pytest.mark.parametrize(
    ("ending", "value", "problem"),
    [
        (".exp_avg_sq", -1e-9, "is a mean of squares and holds negative numbers"),
        (".step", -1.0, "counts -1 updates where the checkpoint is of step 7"),
        (".step", 8.0, "counts 8 updates where the checkpoint is of step 7"),
        (".step", 1.5, "counts 1.5 updates where the checkpoint is of step 7"),
    ],
)
def test_moments_that_no_optimizer_can_have_come_to_are_refused(
    checkpoint: Path, ending: str, value: float, problem: str
) -> None:
    path = checkpoint / OPTIMIZER
    tensors = load_file(path)
    name = sorted(name for name in tensors if name.endswith(ending))[-1]
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    reseal(checkpoint)
    assert all(f"{OPTIMIZER}: {name} {problem}" in line for line in refused(checkpoint, resume))
    load_model(find_checkpoint(checkpoint))  # the weights are whole


@pytest.mark.parametrize("count", [0.0, 1.0, 6.0, 7.0])
def test_an_optimizer_may_have_skipped_updates(checkpoint: Path, count: float) -> None:
    tensors = load_file(checkpoint / OPTIMIZER)
    counted = {name: torch.full_like(value, count) for name, value in tensors.items() if name.endswith(".step")}
    save_file(tensors | counted, checkpoint / OPTIMIZER)
    reseal(checkpoint)
    resume(checkpoint)


def test_the_newest_run_that_is_intact_is_found_among_anything_else(whole: Path, tmp_path: Path) -> None:
    runs, said = tmp_path / "runs", list[str]()
    for age, name in enumerate(("good", "older", "newer", "unfinished")):
        path = Path(shutil.copytree(whole, runs / name / "checkpoints" / STEP))
        os.utime(path / MANIFEST, (age * 100, age * 100))
    os.utime(runs / "older" / "checkpoints" / STEP / MANIFEST, (10, 10))
    put(runs / "newer" / "checkpoints" / STEP / MANIFEST, "files", {})
    os.utime(runs / "newer" / "checkpoints" / STEP / MANIFEST, (900, 900))
    (runs / "unfinished" / "checkpoints" / STEP / MANIFEST).unlink()
    (runs / "good" / "checkpoints" / "step-\N{SUPERSCRIPT TWO}").mkdir()
    os.utime(runs / "good" / "checkpoints" / STEP / MANIFEST, (500, 500))
    os.mkfifo(runs / "pipe")
    (runs / "note.txt").write_text("mine")
    (runs / "loop").symlink_to("loop")
    (runs / "empty").mkdir()
    (runs / "odd" / "checkpoints").mkdir(parents=True)
    os.mkfifo(runs / "odd" / "checkpoints" / "step-00000009")
    for number in range(300):
        (runs / f"begun-{number}").mkdir()
    assert find_checkpoint(None, runs, said.append) == runs / "good" / "checkpoints" / STEP
    assert [line.split(":")[0] for line in said] == [
        "skipped",
        "skipped",
        f"using {runs / 'good' / 'checkpoints' / STEP}",
    ]


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: path.write_text(""), lambda path: None])
def test_runs_that_is_no_directory_holds_no_run(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    make(tmp_path / "runs")
    with pytest.raises(ArtefactError, match="no run with a checkpoint here"):
        find_checkpoint(None, tmp_path / "runs")


@pytest.mark.parametrize("name", ["x" * 300, "none", "pipe", "file"])
def test_a_path_that_is_no_run_is_one_line(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("")
    refused(tmp_path / name, lambda path: find_checkpoint(path) and None)


def test_a_checkpoint_that_a_live_run_removes_gives_way_to_another(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    newer = Path(shutil.copytree(checkpoint, checkpoint.with_name("step-00000009")))
    put(newer / MANIFEST, "step", 9)
    verify, said = loading.verify_checkpoint, list[str]()

    def verify_and_remove(path: Path, **options: Any) -> None:
        verify(path, **options)
        if path == newer:
            shutil.rmtree(newer)

    monkeypatch.setattr(loading, "verify_checkpoint", verify_and_remove)
    assert open_checkpoint(checkpoint.parent.parent, note=said.append).path == checkpoint
    assert [line.split()[0] for line in said] == ["using", "skipped:", "using"]
    assert "was removed while it was read" in said[1]
