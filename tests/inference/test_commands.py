"""`inl generate` and `inl eval` as a user meets them: streams, JSON, exit codes, damaged checkpoints."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from inl_cli.app import app
from inl_core.corpus.tokenizer import train_tokenizer
from tests.inference.tiny import TEXT, config, reseal, tokenizer, write_checkpoint


@pytest.fixture
def inl(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs a command where the runs are."""
    monkeypatch.chdir(workplace)

    def run(*arguments: str, **options: Any) -> Result:
        return CliRunner().invoke(app, list(arguments), **options)

    return run


@pytest.fixture
def checkpoint(workplace: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return Path(
        shutil.copytree(workplace / "runs" / "v4" / "checkpoints" / "step-00000007", tmp_path / "step-00000007")
    )


SHORT = ("--max-new-tokens", "5", "--temperature", "0")


def test_the_newest_run_is_taken_and_named_on_stderr(inl: Callable[..., Result]) -> None:
    result = inl("generate", "--prompt", "def ", *SHORT)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("def ")
    assert result.stderr.startswith("using runs/v4/checkpoints/step-00000007\n")
    quiet = inl("generate", "--prompt", "def ", "--quiet", *SHORT)
    assert (quiet.stdout, quiet.stderr) == (result.stdout, "")


@pytest.mark.parametrize("path", ["runs/v4", "runs/v4/checkpoints", "runs/v4/checkpoints/step-00000007"])
def test_a_run_or_a_checkpoint_can_be_named(inl: Callable[..., Result], path: str) -> None:
    assert inl("generate", path, "--prompt", "a", *SHORT).exit_code == 0


def test_json_is_one_object_and_nothing_else(inl: Callable[..., Result]) -> None:
    result = inl("generate", "--prompt", "a", "--prompt", "b", "--num-samples", "2", "--max-new-tokens", "4", "--json")
    (line,) = result.stdout.splitlines()
    data = json.loads(line)
    assert (data["checkpoint"], data["step"]) == ("runs/v4/checkpoints/step-00000007", 7)
    assert [(c["prompt"], c["sample_index"]) for c in data["completions"]] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert all(len(c["token_ids"]) == len(c["iterations"]) for c in data["completions"])


def test_a_model_without_iterations_reports_none(inl: Callable[..., Result]) -> None:
    made = json.loads(inl("generate", "runs/v5", "--prompt", "a", "--json", *SHORT).stdout)
    assert (made["max_iterations"], [c["iterations"] for c in made["completions"]]) == (None, [None])
    scores = json.loads(inl("eval", "runs/v5", "--json").stdout)
    assert (scores["max_iterations"], scores["iterations"]) == (None, None)


def test_several_completions_stand_under_headings(inl: Callable[..., Result]) -> None:
    result = inl("generate", "--prompt", "a", "--prompt", "b", *SHORT)
    assert result.stdout.startswith("=== prompt 1 of 2\na")
    assert "\n=== prompt 2 of 2\nb" in result.stdout


def test_prompts_come_from_files_and_stdin(inl: Callable[..., Result], tmp_path: Path) -> None:
    def prompts(path: str, **options: Any) -> list[str]:
        result = inl("generate", "--prompt-file", path, "--json", *SHORT, **options)
        assert result.exit_code == 0, result.output
        return [completion["prompt"] for completion in json.loads(result.stdout)["completions"]]

    (tmp_path / "p.txt").write_text("one\n\ntwo \r\n", encoding="utf-8")
    (tmp_path / "p.jsonl").write_text('"a\\nb"\n{"prompt": "c", "other": 1}\n')
    assert prompts(str(tmp_path / "p.txt")) == ["one", "two "]
    assert prompts(str(tmp_path / "p.jsonl")) == ["a\nb", "c"]
    assert prompts("-", input="x\ny\n") == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "p.txt", "holds no prompt"),
        (b"\xff", "p.txt", "not UTF-8"),
        (b"{", "p.jsonl", "p.jsonl:1: not JSON"),
        (b'{"text": "a"}', "p.jsonl", "p.jsonl:1: neither a string nor an object"),
    ],
)
def test_bad_prompt_files_are_named(
    inl: Callable[..., Result], tmp_path: Path, content: bytes, name: str, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert_refused(inl("generate", "--prompt-file", str(tmp_path / name)), 2, message)


def assert_refused(result: Result, code: int, message: str) -> None:
    """One clear line on stderr (after what was chosen), the exit code, and nothing on stdout."""
    assert result.exit_code == code, result.output
    lines = [line for line in result.stderr.splitlines() if not line.startswith("using ")]
    assert len(lines) == 1, result.stderr
    assert message in lines[0]
    assert result.stdout == ""


def test_usage_errors_exit_with_2(inl: Callable[..., Result]) -> None:
    assert_refused(inl("generate", "--prompt", "x" * 300), 2, "the model's context holds 64; shorten it by")
    assert_refused(inl("generate", "--temperature", "-1"), 2, "temperature -1")
    assert_refused(inl("generate", "--prompt-file", "none.txt"), 2, "none.txt: no such file")
    assert_refused(inl("generate", "--iterations", "0"), 2, "iterations 0")
    assert_refused(inl("eval", "--iterations", "0"), 2, "iterations 0")
    assert_refused(inl("eval", "--data", "a", "--text", "b"), 2, "give one of them")
    assert_refused(inl("eval", "--window", "100"), 2, "window 100")


def test_what_has_no_effect_is_said(inl: Callable[..., Result]) -> None:
    assert "warning: top-k has no effect" in inl("generate", "--top-k", "3", *SHORT).stderr
    for preset, inside in (("transformer", ""), ("v5", " inside its blocks (its depth is the integrator's time)")):
        stderr = inl("generate", f"runs/{preset}", "--iterations", "3", "--show-iterations", *SHORT).stderr
        assert f"warning: this model has no integrator{inside}: --iterations has no effect" in stderr
        assert f"warning: this model has no integrator{inside}: there are no iterations to show" in stderr


def test_iterations_are_shown_as_a_table_where_there_is_no_colour(inl: Callable[..., Result]) -> None:
    result = inl("generate", "--prompt", "a", "--show-iterations", "--iterations", "4", *SHORT)
    lines = result.stdout.splitlines()
    assert "\x1b" not in result.stdout
    title = next(index for index, line in enumerate(lines) if "at most 4" in line)
    assert [line.split()[-1] for line in lines[title + 3 :] if line.strip()] == ["4.00"] * 5


def test_iterations_are_colours_with_a_legend_on_a_terminal(
    inl: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("inl_cli.console._is_terminal", lambda stream: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    arguments = ("generate", "runs/v3", "--prompt", "[bold]a", "--show-iterations", "--quiet", *SHORT)
    coloured = inl(*arguments).stdout
    assert "1.00" in coloured.splitlines()[0]
    assert "5.50" in coloured.splitlines()[0]  # T = 5, divided into 5 and 5 and a part
    assert "\x1b[30;48;5;" in coloured
    assert "[bold]a" in coloured  # text is never markup
    monkeypatch.setenv("NO_COLOR", "1")
    plain = inl(*arguments).stdout
    assert "48;5;" not in plain
    assert "iterations" in plain


# Checkpoints that are missing or damaged --------------------------------------------------------------------------


def flip_byte(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def remove_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def damage_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("{")


def remove_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()


def smaller_vocabulary(checkpoint: Path) -> None:
    train_tokenizer(iter([TEXT]), vocab_size=280).save(checkpoint / "tokenizer.json")
    reseal(checkpoint)


def other_vocabulary_of_the_same_size(checkpoint: Path) -> None:
    train_tokenizer(iter(["zyx wvu tsr " * 3 + TEXT[::-1]] * 4), vocab_size=300).save(checkpoint / "tokenizer.json")
    reseal(checkpoint)


def unknown_model(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace('"d_model"', '"width"'))
    reseal(checkpoint)


DAMAGE: dict[Callable[[Path], None], str] = {
    flip_byte: "model.safetensors: its checksum is wrong",
    truncate: "truncated or changed",
    remove_manifest: "has no manifest.json, so the save never finished",
    damage_manifest: "manifest.json: damaged",
    remove_tokenizer: "tokenizer.json: missing",
    smaller_vocabulary: "tokenizer.json: has 280 tokens where the model has 300",
    other_vocabulary_of_the_same_size: "tokenizer.json: is not the tokenizer that config.json names",
    unknown_model: "config.json: not a model configuration this version knows",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("command", ["generate", "eval", "inspect-params"])
def test_a_damaged_checkpoint_is_one_line_and_exit_code_4(
    inl: Callable[..., Result], checkpoint: Path, damage: Callable[[Path], None], command: str
) -> None:
    damage(checkpoint)
    assert_refused(inl(command, str(checkpoint)), 4, DAMAGE[damage])


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(inl: Callable[..., Result], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "run", "v4", step=3)
    flip_byte(write_checkpoint(tmp_path / "run", "v4", step=8))
    result = inl("generate", str(tmp_path / "run"), *SHORT)
    assert result.exit_code == 0
    first, second, *_ = result.stderr.splitlines()
    assert first.startswith("warning: skipped: ")
    assert second.endswith("step-00000003")


def test_a_bare_name_is_a_run_below_runs_unless_something_here_is_called_so(inl: Callable[..., Result]) -> None:
    assert inl("generate", "v3", *SHORT).stderr.startswith("using runs/v3/checkpoints/step-")
    # A script asks about the directory that it gave `inl train --run-dir`, whatever runs/ holds.
    found = json.loads(inl("run-status", "v3", "--json").stdout)
    assert (found["run"], found["state"]) == ("v3", "empty")
    Path("v3").mkdir()
    try:
        assert_refused(
            inl("generate", "v3"), 4, "v3: holds no intact checkpoint; `inl train RECIPE` makes one; did you"
        )
    finally:
        Path("v3").rmdir()


def test_missing_checkpoints_exit_with_4(inl: Callable[..., Result], tmp_path: Path) -> None:
    assert_refused(inl("generate", "runs/none"), 4, "runs/none: no such run or checkpoint")
    assert_refused(inl("generate", "V33"), 4, "V33: no such run or checkpoint; did you mean runs/v3?")
    assert_refused(inl("generate", "v33"), 4, "v33: no such run or checkpoint; did you mean runs/v3?")
    assert_refused(inl("generate", "./v3"), 4, "v3: no such run or checkpoint; did you mean runs/v3?")
    assert_refused(inl("resume", "other"), 4, "starts one; runs/ holds ")
    (tmp_path / "empty").mkdir()
    assert_refused(inl("eval", str(tmp_path / "empty")), 4, "holds no intact checkpoint")


def test_no_run_at_all_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert_refused(CliRunner().invoke(app, ["generate"]), 4, "inl train RECIPE")


# inl eval ---------------------------------------------------------------------------------------------------------


def test_eval_prints_a_table_that_states_window_and_stride(inl: Callable[..., Result]) -> None:
    result = inl("eval", "--stride", "8")
    assert result.exit_code == 0, result.output
    assert "data/tiny, validation split" in result.stdout
    assert "windows of 32 tokens, stride 8" in result.stdout
    for name in ("loss", "perplexity", "bits per byte", "accuracy", "iterations"):
        assert f"\n{name} " in result.stdout


def test_eval_of_a_text_file_and_of_stdin_agree(inl: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    file = json.loads(inl("eval", "--text", str(tmp_path / "a.txt"), "--json").stdout)
    stdin = json.loads(inl("eval", "--text", "-", "--json", input=TEXT).stdout)
    assert {**file, "text": "stdin", "seconds": 0} == {**stdin, "seconds": 0}
    assert (file["bytes"], file["tokens"]) == (len(TEXT.encode()), len(tokenizer().encode(TEXT)) + 1)
    assert (file["window"], file["stride"], file["max_iterations"]) == (32, 32, config("v4").num_iterations)


def test_eval_refuses_data_it_cannot_score(inl: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xe9")
    assert_refused(inl("eval", "--text", str(tmp_path / "latin.txt")), 4, "not UTF-8")
    assert_refused(inl("eval", "--data", str(tmp_path / "none")), 4, "no data set here")
    path = write_checkpoint(tmp_path / "run", "v4")
    assert_refused(inl("eval", str(path)), 4, "data/none: the data the model was trained on is not here")


def test_a_text_is_scored_from_the_columns_that_are_named(inl: Callable[..., Result], tmp_path: Path) -> None:
    usual = {"a": {"prompt": "what?", "completion": "that"}, "b": {"text": "some words"}}
    other = {"a": {"q": "what?", "text": "no", "answer": "that"}, "b": {"body": "some words", "text": "no"}}
    options = {"a": ["--prompt-column", "q", "--completion-column", "answer"], "b": ["--text-column", "body"]}
    for name, columns in options.items():
        (tmp_path / "usual.jsonl").write_text(json.dumps(usual[name]))
        (tmp_path / "other.jsonl").write_text(json.dumps(other[name]))
        wanted = json.loads(inl("eval", "--text", str(tmp_path / "usual.jsonl"), "--json").stdout)
        found = json.loads(inl("eval", "--text", str(tmp_path / "other.jsonl"), *columns, "--json").stdout)
        assert (found["loss"], found["tokens"], found["bytes"]) == (wanted["loss"], wanted["tokens"], wanted["bytes"])
    (tmp_path / "other.jsonl").write_text('{"body": "some words"}')
    refused = inl("eval", "--text", str(tmp_path / "other.jsonl"))
    assert_refused(refused, 4, "has body; name the columns: --text-column, --prompt-column")
    assert_refused(inl("eval", "--text-column", "body"), 2, "are about --text: give it, too")


def test_eval_refuses_data_of_another_vocabulary(inl: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT * 3, encoding="utf-8")
    arguments = ("--output", str(tmp_path / "data"), "--vocab-size", "280")
    assert inl("prepare-data", str(tmp_path / "text.txt"), *arguments).exit_code == 0
    assert_refused(inl("eval", "--data", str(tmp_path / "data")), 4, "encoded by another tokenizer than the model's")
