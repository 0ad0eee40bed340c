"""`inl import-reference` as a user meets it: the checkpoint works with every command, and bad input is one line."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from inl_cli.app import app
from inl_core.errors import ArtefactError
from inl_core.interop.reference.importing import load_tokenizer
from inl_core.interop.reference.layout import read_layout
from tests.damage import WHOLE_FILE, write_header
from tests.inference.test_commands import assert_refused
from tests.inference.tiny import TEXT
from tests.interop.reference_files import GENERATIONS, LAYERS, Tensors, ignored_tensors, random_tensors, write_file

GENERATE = ("--prompt", "def ", "--max-new-tokens", "5", "--temperature", "0")


def inl(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A released model, with everything its file holds."""
    return write_file(tmp_path / "model.safetensors", random_tensors("released") | ignored_tensors("released"))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_checkpoint_serves_every_command(tmp_path: Path, tokenizer_file: Path, generation: str) -> None:
    file = write_file(tmp_path / "model.safetensors", random_tensors(generation) | ignored_tensors(generation))
    output, text = tmp_path / "made" / "here", tmp_path / "a.txt"
    text.write_text(TEXT, encoding="utf-8")
    arguments = ("--num-heads", 4, "--iterations", "1,3,2", "--tokenizer", tokenizer_file)
    made = inl("import-reference", file, "--output", output, *arguments)
    assert made.exit_code == 0, made.output
    assert "1, 3, 2" in made.stdout
    assert re.search(r"the shared controller, which the reference builds and never calls +3 +\w+\.", made.stdout)
    assert "warning: iterations (1, 3, 2) are as given" in made.stderr.replace("heads (4) and ", "")
    assert [path.name for path in output.parent.iterdir()] == ["here"]

    overview = json.loads(inl("inspect", output, "--json").stdout)
    assert (overview["problem"], overview["integrator"]["iterations"]) == (None, [1, 3, 2])
    assert overview["provenance"][0]["generation"] == generation
    completion = json.loads(inl("generate", output, *GENERATE, "--json").stdout)["completions"][0]
    assert completion["iterations"] == [2.0] * len(completion["token_ids"])
    scores = json.loads(inl("eval", output, "--text", text, "--json").stdout)
    assert (scores["max_iterations"], scores["iterations"]) == (2.0, 2.0)
    report = inl("inspect-params", output, "--text", text)
    assert report.exit_code == 0, report.output
    last = report.stdout.split("rms velocity")[1].split("\n\n")[0].splitlines()
    assert [line.split().count("-") for line in last if line.split()[:1] in (["0"], ["1"], ["2"])] == [2, 0, 1]


def test_json_accounts_for_every_tensor(tmp_path: Path, file: Path) -> None:
    result = inl("import-reference", file, "--output", tmp_path / "out", "--iterations", 2, "--json")
    data = json.loads(result.stdout)
    assert data["checkpoint"] == str(tmp_path / "out")
    assert set(data["used"]) == set(random_tensors("released"))
    assert set(data["skipped"]) == set(ignored_tensors("released"))
    assert all(data["skipped"].values())
    assert (data["config"]["num_heads"], data["config"]["num_kv_heads"], data["config"]["d_model"]) == (4, 2, 128)
    assert (data["config"]["integrator"]["num_iterations"], data["config"]["embedding_rank"]) == (2, 64)
    assert len(data["warnings"]) == result.stderr.count("warning: ")


@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_a_run_begins_with_imported_weights(
    tmp_path: Path, file: Path, tokenizer_file: Path, has_tokenizer: bool
) -> None:
    output = tmp_path / "imported"
    given = ("--tokenizer", tokenizer_file) if has_tokenizer else ()
    assert inl("import-reference", file, "--output", output, "--iterations", 2, *given).exit_code == 0
    config = json.loads((output / "config.json").read_text())
    rows = "".join(json.dumps({"text": f"{number} {TEXT}"}) + "\n" for number in range(40))
    (tmp_path / "rows.jsonl").write_text(rows, encoding="utf-8")
    tokenizer = output / "tokenizer.json" if has_tokenizer else tokenizer_file
    recipe = {
        "name": "onward",
        "model": config["model"] | {"init_from": str(output), "vocab_size": None},
        "data": {
            "sources": [str(tmp_path / "rows.jsonl")],
            "directory": str(tmp_path / "data"),
            "tokenizer": {"file": str(tokenizer)},
        },
        "training": {"steps": 1, "sequence_length": 32, "batch_tokens": 64, "evaluation": {"final_tokens": 64}},
    }
    (tmp_path / "onward.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    outcome = inl("train", tmp_path / "onward.yaml", "--run-dir", tmp_path / "run")
    assert outcome.exit_code == 0, outcome.stderr
    assert ("has no tokenizer, so nothing can tell" in outcome.stderr) != has_tokenizer
    made = json.loads((tmp_path / "run/checkpoints/step-00000001/config.json").read_text())
    assert [event["event"] for event in made["provenance"]] == ["import", "init", "train"]
    recipe["data"] |= {"directory": str(tmp_path / "other"), "tokenizer": {"vocab_size": 280}}
    (tmp_path / "onward.yaml").write_text(json.dumps(recipe))
    refused = inl("train", tmp_path / "onward.yaml", "--run-dir", tmp_path / "refused")
    assert refused.exit_code == 4
    assert (
        f"set data.tokenizer.file to {tokenizer if has_tokenizer else 'the tokenizer it was trained'}" in refused.stderr
    )


def test_without_a_tokenizer_the_checkpoint_can_be_inspected_and_says_what_it_lacks(tmp_path: Path, file: Path) -> None:
    output = tmp_path / "out"
    assert inl("import-reference", file, "--output", output, "--iterations", 2).exit_code == 0
    assert inl("inspect", output).exit_code == 0
    for command in (("generate",), ("eval", "--text", file), ("inspect-params",)):
        assert_refused(inl(command[0], output, *command[1:]), 4, f"{output}: was imported without a tokenizer")


# Arguments that do not fit ------------------------------------------------------------------------------------------


BAD_ARGUMENTS: list[tuple[tuple[object, ...], str]] = [
    (("--iterations", "0"), "--iterations 0: must be whole numbers from 1 up"),
    (("--iterations", "2,x"), "--iterations 2,x: give a whole number"),
    (("--iterations", "1,2"), "2 numbers for the file's 3 layers"),
    (("--num-heads", 3), "--num-heads 3: must divide the file's d_model of 128"),
    (("--num-heads", 0), "--num-heads 0: must be at least 1"),
    (("--num-heads", 8), "the rotary tables in"),
    (("--num-kv-heads", 4), "the 64 rows of keys in"),
    (("--max-seq-len", 0), "--max-seq-len 0: must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS, ids=lambda value: str(value)[:30])
def test_bad_arguments_exit_with_2_and_leave_nothing(
    tmp_path: Path, file: Path, arguments: tuple[object, ...], message: str
) -> None:
    given = {"--iterations": 2} | dict(zip(arguments[::2], arguments[1::2], strict=True))
    options = [part for pair in given.items() for part in pair]
    assert_refused(inl("import-reference", file, "--output", tmp_path / "out", *options), 2, message)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("generation", "arguments", "message"),
    [
        ("released", (), "does not hold the number of heads; give --num-heads"),
        ("released", ("--num-heads", 1), "do not divide the 64 rows of k_proj"),
        ("released", ("--num-heads", 128), "heads of 1 cannot have rotary positions"),
        ("earlier", ("--num-heads", 4, "--num-kv-heads", 2), "the 128 rows of keys"),
    ],
)
def test_heads_that_do_not_fit_a_file_without_tables_are_refused(
    tmp_path: Path, generation: str, arguments: tuple[object, ...], message: str
) -> None:
    file = write_file(tmp_path / "model.safetensors", random_tensors(generation))
    result = inl("import-reference", file, "--output", tmp_path / "out", "--iterations", 2, *arguments)
    assert_refused(result, 2, message)


def test_an_output_that_holds_something_is_left_alone(tmp_path: Path, file: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "notes.txt").write_text("mine")
    result = inl("import-reference", file, "--output", output, "--iterations", 2)
    assert_refused(result, 2, f"--output {output}: exists and is not an empty directory")
    assert [path.name for path in output.iterdir()] == ["notes.txt"]
    (output / "notes.txt").unlink()
    assert inl("import-reference", file, "--output", output, "--iterations", 2).exit_code == 0


# Files that are not what they should be -----------------------------------------------------------------------------


def without(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: change(tensors[name])}


def new(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(shape)}


def poisoned(tensor: Tensor) -> Tensor:
    tensor = tensor.clone()
    tensor[3] = torch.nan
    return tensor


INV_FREQ = "layers.0.attention.rope.inv_freq"
LAST = f"layers.{LAYERS - 1}."
BAD_TENSORS: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (without("lm_head.weight"), "lm_head.weight is missing"),
    (without("token_embedding.embed_low.weight"), "token_embedding.embed_low.weight is missing"),
    (without(LAST + "ff.w3.weight"), LAST + "ff.w3.weight is missing"),
    (new("layers.4.norm1.weight", 128), "layers.3.inl.inl.mu_global is missing"),
    (new("layers.0.attention.q_proj.bias", 128), "layers.0.attention.q_proj.bias [128] is no tensor of the reference"),
    (new("model.extra", 2), "model.extra [2] is no tensor of the reference"),
    (changed("layers.1.ff.w2.weight", lambda t: t.T), "layers.1.ff.w2.weight has the shape [85, 128]"),
    (changed("layers.0.ff.w1.weight", lambda t: t[0]), "layers.0.ff.w1.weight has the shape [128]"),
    (changed("token_embedding.project_up.weight", lambda t: t[:0]), "project_up.weight has the shape [0, 64]"),
    (changed(LAST + "inl.inl.mu_local_offsets", lambda t: t[:1]), "mu_local_offsets has the shape [1]"),
    (changed(LAST + "inl.inl.controller.2.bias", poisoned), "controller.2.bias holds values that are not finite"),
    (changed("lm_head.weight", lambda t: t.to(torch.int8)), "lm_head.weight is int8, quantised"),
    (changed(INV_FREQ, lambda t: t * 0.5), f"{INV_FREQ} is not a table of base"),
    (changed(INV_FREQ, lambda t: t[:5]), f"{INV_FREQ} is for heads of 10"),
    (lambda tensors: {"weight": torch.zeros(2)}, "it is not a language model of a reference generation"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_TENSORS, ids=[message[:40] for _, message in BAD_TENSORS])
def test_a_file_that_does_not_fit_is_one_line_and_exit_code_4(
    tmp_path: Path, damage: Callable[[Tensors], Tensors], message: str
) -> None:
    tensors = damage(random_tensors("released") | ignored_tensors("released"))
    file = write_file(tmp_path / "model.safetensors", tensors)
    result = inl("import-reference", file, "--output", tmp_path / "out", "--iterations", 2)
    assert_refused(result, 4, message)
    assert str(file) in result.stderr
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_no_safetensors_file_exits_with_4(tmp_path: Path, file: Path) -> None:
    def refused(path: Path, message: str, **options: Any) -> None:
        assert_refused(inl("import-reference", path, "--output", tmp_path / "out", "--iterations", 2), 4, message)

    refused(tmp_path / "none.safetensors", "no such file")
    refused(tmp_path, "is a directory; name the .safetensors file in it")
    whole = file.read_bytes()
    for damaged in (b"", b"PK\x03\x04" + bytes(100), whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        refused(file, "not a whole safetensors file")


def test_a_tokenizer_that_does_not_fit_exits_with_4(tmp_path: Path, file: Path, tokenizer_file: Path) -> None:
    small = write_file(tmp_path / "small.safetensors", random_tensors("released", vocab=280))
    arguments = ("--output", tmp_path / "out", "--iterations", 2, "--num-heads", 4, "--tokenizer")
    assert_refused(
        inl("import-reference", small, *arguments, tokenizer_file),
        4,
        "has 300 tokens where the model's embedding has 280",
    )
    assert_refused(inl("import-reference", file, *arguments, tmp_path / "none.json"), 4, "none.json: missing")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows", [1003, 3000])
def test_a_tokenizer_whose_ids_have_gaps_is_not_extended(tmp_path: Path, tokenizer_file: Path, rows: int) -> None:
    content = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    content["model"]["vocab"]["far"] = 1000
    path = tmp_path / "gaps.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"gaps\.json: its ids have gaps"):
        load_tokenizer(path, rows)


def test_a_disk_that_fails_leaves_nothing(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("inl_core.training.checkpoint_writing._seal", full)
    result = inl("import-reference", file, "--output", tmp_path / "out", "--iterations", 2)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "No space left on device"
    assert list(tmp_path.iterdir()) == [file]


COSINES = "layers.0.attention.rope.cos_cached"
ODD_FILES: list[tuple[Callable[[Tensors], Tensors], str]] = [
    (new("layers.9999999999.norm1.weight", 128), "layers.3.inl.inl.mu_global is missing"),
    (lambda tensors: {**tensors, COSINES: torch.zeros(1, 1, 10**9, 0)}, "max_seq_len: expected a number of at most"),
    (changed("lm_head.weight", lambda t: t.to(torch.float8_e4m3fn)), "lm_head.weight is float8_e4m3fn, quantised"),
    (changed("lm_head.weight", lambda t: t.double() * 1e300), "lm_head.weight holds values that are not finite"),
    (changed("layers.1.attention.rope.inv_freq", lambda t: t.sum()), "rope.inv_freq is not a table of base"),
    (changed("layers.1.attention.rope.inv_freq", lambda t: t.to(torch.int64)), "rope.inv_freq is not a table of base"),
    (lambda tensors: {}, "it is not a language model of a reference generation"),
]


@pytest.mark.parametrize(("damage", "message"), ODD_FILES, ids=[message[:40] for _, message in ODD_FILES])
def test_a_file_that_asks_for_too_much_or_holds_odd_types_is_one_line(
    tmp_path: Path, damage: Callable[[Tensors], Tensors], message: str
) -> None:
    file = write_file(tmp_path / "a.safetensors", damage(random_tensors("released") | ignored_tensors("released")))
    assert_refused(inl("import-reference", file, "--output", tmp_path / "out", "--iterations", 2), 4, message)
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("damage", [*WHOLE_FILE.values(), lambda path: write_header(path, b"{}", length=2**63)])
def test_a_file_of_any_kind_is_one_line(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    file = tmp_path / "a.safetensors"
    write_header(file, b'{"lm_head.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', bytes(4))
    damage(file)
    assert_refused(inl("import-reference", file, "--output", tmp_path / "out", "--iterations", 2), 4, str(file))


def test_many_layers_that_are_not_there_cost_no_time(tmp_path: Path) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in random_tensors("released").items()}
    shapes |= {f"layers.{number}.x": () for number in range(3, 20_000)}
    with pytest.raises(ArtefactError, match=r"layers\.3\.inl\.inl\.mu_global is missing"):
        read_layout(tmp_path / "a", shapes)
