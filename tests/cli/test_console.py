"""Where output goes, what it looks like off a terminal, and which error gives which exit code."""

import io
import json
import math
import os
import pty
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import typer
from typer.testing import CliRunner

from inl_cli.app import app as inl
from inl_cli.console import Console, errors_to_exit_codes, format_value, to_plain
from inl_cli.progress import LineProgress, Progress, amount
from inl_core.errors import (
    ArtefactError,
    ExecutionWarning,
    InlError,
    Interrupted,
    NonFiniteError,
    RecipeError,
    RecipeWarning,
)
from inl_core.training.distributed import World

Captured = pytest.CaptureFixture[str]


def run_raising(error: BaseException) -> "Result":
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @errors_to_exit_codes
    def command() -> None:
        raise error

    result = CliRunner().invoke(app, [])
    return Result(result.exit_code, result.stdout, result.stderr, result.exception)


def be_second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


@dataclass
class Result:
    code: int
    stdout: str
    stderr: str
    exception: BaseException | None


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InlError("went wrong"), 1),
        (RecipeError("a.yaml:1 b: bad\na.yaml:2 c: worse"), 2),
        (NonFiniteError("loss is nan at step 3"), 3),
        (ArtefactError("runs/x: no checkpoint"), 4),
        (Interrupted("saved at step 3"), 75),
    ],
)
def test_a_users_error_is_its_own_lines_on_stderr_and_its_exit_code(error: InlError, code: int) -> None:
    result = run_raising(error)
    assert (result.code, result.stdout, result.stderr) == (code, "", f"{error}\n")


def test_a_full_disk_is_one_line_and_exit_1() -> None:
    result = run_raising(OSError(28, "No space left on device", "runs/x/model.safetensors"))
    assert (result.code, result.stderr) == (1, "runs/x/model.safetensors: No space left on device\n")


def test_a_bug_keeps_its_traceback() -> None:
    result = run_raising(KeyError("oops"))
    assert isinstance(result.exception, KeyError)
    assert result.stderr == ""


def test_a_warning_of_our_own_is_a_line_and_anothers_is_left_to_python(capsys: Captured) -> None:
    @errors_to_exit_codes
    def command() -> None:
        for text, kind in {"unused": RecipeWarning, "slow": ExecutionWarning, "foreign": RuntimeWarning}.items():
            warnings.warn(text, kind, stacklevel=1)

    with pytest.warns(RuntimeWarning) as others:
        command()
    assert capsys.readouterr().err == "warning: unused\nwarning: slow\n"
    assert [str(warning.message) for warning in others] == ["foreign"]


def test_other_ranks_keep_a_users_error_to_themselves_but_exit_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    be_second_of_two(monkeypatch)
    assert (run_raising(RecipeError("bad")).code, run_raising(RecipeError("bad")).stderr) == (2, "")
    assert run_raising(OSError(28, "No space left on device")).stderr == "No space left on device\n"


def test_what_another_rank_alone_has_met_is_shown_and_what_rank_0_passed_on_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    be_second_of_two(monkeypatch)
    assert run_raising(ArtefactError("recipe.yaml: no such file")).stderr == "rank 1: recipe.yaml: no such file\n"
    monkeypatch.setattr(dist, "broadcast_object_list", lambda box, **where: box.__setitem__(0, ArtefactError("gone")))
    passed_on = World(1, 2, torch.device("cpu")).broadcast(None)
    assert (run_raising(passed_on).code, run_raising(passed_on).stderr) == (4, "")


def everything(console: Console) -> None:
    console.info("information")
    console.warn("careful")
    console.write("data\n")
    console.table("title", ("name", "count"), [("a", 1234), ("[b]", None)])
    console.table("aside", ("name",), [("c",)], is_data=False)
    console.result({"a": math.nan, "b": Path("x")}, lambda: console.write("rendered\n"))


def test_data_goes_to_stdout_and_the_rest_to_stderr(capsys: Captured) -> None:
    everything(Console())
    captured = capsys.readouterr()
    for text in ("data", "title", "1,234", "[b]", "rendered"):
        assert text in captured.out
        assert text not in captured.err
    for text in ("information", "warning: careful", "aside"):
        assert text in captured.err
        assert text not in captured.out
    assert "\x1b" not in captured.out + captured.err


def test_json_is_one_object_on_stdout_and_nothing_else_there(capsys: Captured) -> None:
    everything(Console(json=True))
    captured = capsys.readouterr()
    assert captured.out.count("\n") == 1
    assert json.loads(captured.out) == {"a": None, "b": "x"}
    assert "information" in captured.err


def test_quiet_drops_information_but_no_warning_and_no_result(capsys: Captured) -> None:
    everything(Console(quiet=True))
    captured = capsys.readouterr()
    assert captured.err == "warning: careful\n"
    assert "rendered" in captured.out


def test_other_ranks_print_nothing(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    be_second_of_two(monkeypatch)
    for console in (Console(), Console(json=True)):
        everything(console)
        with console.progress() as progress:
            assert type(progress) is Progress, "which shows nothing"
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_a_stray_rank_mutes_nothing(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    Console().write("data")
    assert capsys.readouterr().out == "data"


def test_errors_are_shortened_and_their_control_characters_shown() -> None:
    lines = run_raising(RecipeError("\n".join(f"{number} \x1b[31m\r" + "x" * 10**4 for number in range(10**3)))).stderr
    assert len(lines) < 50_000
    assert lines.startswith("0 \\x1b[31m\\x0dxxx")
    assert lines.endswith("... and 961 more lines\n")


def test_a_file_name_with_line_ends_does_not_divide_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(inl, ["import-reference", "s6 \ne.safetensors", "--output", "new", "--iterations", "2"])
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1), result.stderr
    assert result.stderr.startswith("s6 \\x0ae.safetensors: no such file")
    result = CliRunner().invoke(inl, ["compare", "a\nb", "c", "--csv", "tables"])
    assert (result.exit_code, result.stderr.count("\n")) == (4, 1), result.stderr


def test_a_home_directory_is_expanded_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = []
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @errors_to_exit_codes
    def command(output: Path, data: Path | None = None) -> None:
        given.extend([output, data])

    assert CliRunner().invoke(app, ["a~b", "--data=~/x"]).exit_code == 0
    assert given == [Path("a~b"), tmp_path / "x"]
    nobody = CliRunner().invoke(app, ["~no-such-user/x"])
    assert (nobody.exit_code, nobody.stderr.count("\n")) == (2, 1)
    assert nobody.stderr.startswith("~no-such-user/x: no home directory is known for it")


def test_json_is_valid_whatever_the_stream_can_show(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, text in (("utf-8", '"\u00e9"'), ("ascii", '"\\u00e9"')):
        raw = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding=encoding, errors="backslashreplace"))
        Console(json=True).result("\u00e9", lambda: None)
        assert raw.getvalue().decode().strip() == text
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace"))
    Console(json=True).result("name \udcff", lambda: None)
    assert json.loads(raw.getvalue()) == "name \udcff"


def test_numbers_stand_to_the_right_in_tables_and_long_rows_are_not_cut(capsys: Captured) -> None:
    Console().table("", ("name", "value"), [("x" * 100, 1), ("b", 0.123456), ("c", True)])
    out = capsys.readouterr().out
    assert "x" * 100 in out
    assert out.splitlines()[3].rstrip().endswith("0.1235")
    Console().table("", ("n",), [(5,), (123456,)])
    assert capsys.readouterr().out.splitlines()[2:] == ["      5", "123,456"]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "-"), (True, "yes"), (12345, "12,345"), (0.00012345, "0.0001234"), ("a", "a")]
)
def test_cells(value: object, text: str) -> None:
    assert format_value(value) == text


def test_results_become_plain_json() -> None:
    @dataclass
    class Part:
        path: Path
        loss: float

    value = {"parts": (Part(Path("a"), math.inf),), 3: np.float32(0.5), "array": np.arange(2), "set": {1}}
    assert to_plain(value) == {"parts": [{"path": "a", "loss": None}], "3": 0.5, "array": [0, 1], "set": [1]}
    assert to_plain({"last": {"\udcff": np.bool_(True)}, "nan": torch.tensor(math.nan)}) == {
        "last": {"\udcff": True},
        "nan": None,
    }
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        to_plain(object())


def test_off_a_terminal_progress_is_a_plain_line_an_interval() -> None:
    lines: list[str] = []
    now = 0.0
    progress = LineProgress(lines.append, clock=lambda: now)
    progress.start("reading", "B")
    for now in (0.9, 1.0, 3.0, 10.9, 12.0, 21.9):
        progress.update(now * 1e6, 40e6)
    for now in (21.95, 22.0, 25.0, 32.0):  # noqa: B007  the clock reads it
        progress.tick()  # as where nothing is told for long
    progress.start("counting")
    now = 43.0
    progress.update(1234)
    assert lines == [
        "reading: 1.0 MB of 40.0 MB (2%), 1 s",
        "reading: 12.0 MB of 40.0 MB (30%), 12 s",
        "reading: 21.9 MB of 40.0 MB (55%), 22 s",
        "reading: 21.9 MB of 40.0 MB (55%), 32 s",
        "counting: 1,234, 11 s",
    ]


def test_lines_go_on_while_nothing_is_told() -> None:
    written, now = threading.Event(), 0.0
    progress = LineProgress(lambda line: written.set(), clock=lambda: now)
    with progress.ticking():
        progress.start("merging")
        now = 1.0
        assert written.wait(60)


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [(999, "B", "999 B"), (1000, "B", "1.0 kB"), (2.5e13, "B", "25.0 TB"), (1e16, "B", "10000.0 TB"), (7, "x", "7 x")],
)
def test_amounts(number: float, unit: str, text: str) -> None:
    assert amount(number, unit) == text


SCRIPT = """
from inl_cli.console import Console
console = Console()
console.warn("careful")
with console.progress() as progress:
    progress.start("reading", "B")
    progress.update(1, 2)
    print(type(progress).__name__)
"""


def on_a_terminal(**environment: str) -> str:
    """What a terminal receives from SCRIPT."""
    parent, child = pty.openpty()
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "RANK")}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdin=child,
        stdout=child,
        stderr=child,
        env={**clean, "TERM": "xterm-256color", **environment},
        cwd=Path(__file__).parents[2],
    )
    os.close(child)
    received = b""
    try:
        while block := os.read(parent, 4096):
            received += block
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(parent)
    assert process.wait() == 0
    return received.decode()


def test_colour_and_bars_on_a_terminal_only_and_not_against_the_users_wish() -> None:
    coloured = on_a_terminal()
    assert "\x1b[33mwarning: careful" in coloured
    assert "BarProgress" in coloured
    plain = on_a_terminal(NO_COLOR="1")
    assert "\x1b[33m" not in plain
    assert "warning: careful" in plain
    assert "LineProgress" in on_a_terminal(TERM="dumb")
