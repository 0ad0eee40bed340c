"""`inl watch`: what it says of runs in every state, and that it follows one while it is written."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from inl_cli.app import app
from inl_cli.plotting import beside, plot
from inl_core.analysis.watching import RunWatcher
from inl_core.files import append_line
from inl_core.training.claim import claim
from inl_core.training.metrics import cut_metrics
from inl_core.training.records import write_record

RECIPE = """
name: watched
model: {preset: v5, d_model: 32, num_layers: 2, num_heads: 2, vocab_size: 300}
data: {tokenizer: {vocab_size: 300}}
training: {steps: 100, sequence_length: 32, batch_tokens: 64}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    path.mkdir()
    (path / "recipe.yaml").write_text(RECIPE)
    return path


def add(run: Path, step: int, loss: float | None = 2.0, **more: Any) -> None:
    row = {
        "step": step,
        "tokens": 60 * step,
        "loss": loss,
        "bits_per_byte": loss and loss / 2,
        "tokens_per_second": 30.0,
    }
    append_line(run / "metrics.jsonl", json.dumps(row | more))


def evaluate(run: Path, step: int, loss: float) -> None:
    scores = {"validation_loss": loss, "validation_bits_per_byte": loss / 2}
    append_line(run / "metrics.jsonl", json.dumps({"step": step, "scored_on": "text", **scores}))


def inl(*arguments: str | Path) -> Any:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    return result


def test_a_run_is_followed_and_read_anew_after_it_was_cut(run: Path) -> None:
    watcher = RunWatcher(run)
    assert watcher.look().row == {}
    for step in range(1, 41):
        add(run, step, loss=3.0 - step / 100)
    evaluate(run, 40, 2.5)
    look = watcher.look()
    assert (look.row["step"], look.training[0], look.training[-1]) == (40, (1, 2.99, 1.495), (40, 2.6, 1.3))
    assert look.validation == [(40, 2.5, 1.25)]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "tokens": 2460, "lo')  # just being written
    assert watcher.look().training == look.training
    with (run / "metrics.jsonl").open("a") as file:
        file.write('ss": 2.5}\n')
    assert watcher.look().training[-1] == (41, 2.5, None)
    cut_metrics(run, 20)  # as a session that resumes at step 20
    add(run, 21, loss=9.0)
    look = watcher.look()
    assert [point[0] for point in look.training] == list(range(1, 22))
    assert look.validation == []
    assert [text.split(",")[0] for text in look.warnings] == ["step 21: the loss jumped to 9.0000"]


def test_the_summary_and_its_json_say_the_same(run: Path) -> None:
    for step in range(10, 60, 10):
        add(run, step, mfu=0.25, learning_rate=1e-3, gradient_norm=0.5, phase="constant", A=0.03)
    add(run, 60, loss=None, skipped="reports/nonfinite-step-60")
    evaluate(run, 50, 2.25)
    rows = [
        {"layer": layer, "sub_layer": "attention", "quantity": "alpha", "mean": layer / 4, "std": 0.0}
        for layer in (0, 1)
    ]
    write_record(run, 50, rows)
    (run / "failed.json").write_text(json.dumps({"error": "the disk is full", "kind": "OSError", "time": 0}))
    data = json.loads(inl("watch", run, "--json").stdout)
    assert (data["state"], data["reason"]) == ("failed", "the disk is full")
    assert (data["step"], data["num_steps"], data["tokens_per_second"], data["mfu"]) == (60, 100, 30.0, None)
    assert data["evaluation"] == {"step": 50, "validation_loss": 2.25, "validation_bits_per_byte": 1.125}
    assert data["dynamics"] == {"step": 50, "quantities": {"alpha": {"mean": 0.125, "min": 0.0, "max": 0.25}}}
    assert data["eta_seconds"] is None  # nothing is running
    assert data["curve"][0] == {"step": 10, "loss": 2.0, "bits_per_byte": 1.0}
    assert data["warnings"] == ["step 60: skipped, as it was not finite; reports/nonfinite-step-60 tells more"]
    text = inl("watch", run).stdout
    for shown in (
        f"{run}: failed: the disk is full",
        "step 60/100",
        "validation 1.1250 bits/byte at step 50",
        "alpha           0.1250  (0.0000 to 0.2500)",
        "warning: step 60: skipped",
        "loss (* training, o validation)",
    ):
        assert shown in text
    assert max(map(len, text.splitlines())) <= 160


def test_a_running_run_says_when_it_will_be_done(run: Path) -> None:
    add(run, 25)
    with claim(run, print):
        data = json.loads(inl("watch", run, "--json").stdout)
        text = inl("watch", run).stdout
    assert data["state"] == "running"
    assert data["eta_seconds"] == pytest.approx(75 * 60 / 30)  # steps left, tokens of each, tokens a second
    assert "eta 2:30" in text
    assert "last row" in text


def test_on_a_terminal_it_goes_on_until_control_c(run: Path) -> None:
    add(run, 10)
    main, other = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    command = [sys.executable, "-m", "inl_cli", "watch", str(run), "--every", "0.1"]

    def hear() -> None:  # what a shell starts in the background ignores Ctrl-C, and what that starts in turn
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, stdin=other, stdout=other, stderr=other, env=environment, preexec_fn=hear
    ) as watching:
        os.close(other)
        shown = b""
        while b"step 10/100" not in shown:
            shown += os.read(main, 65536)
        add(run, 20)
        while b"step 20/100" not in shown:
            shown += os.read(main, 65536)
        watching.send_signal(signal.SIGINT)
        try:
            while os.read(main, 65536):  # until it has closed the terminal
                pass
        except OSError:
            pass
        assert watching.wait() == 0
    os.close(main)


@pytest.mark.parametrize("content", [b"\xff" * 100, b"\x00\n\xff" * 50, b"x" * (3 << 20)])
def test_a_file_without_rows_is_named(run: Path, content: bytes) -> None:
    shutil.copytree(run, run.with_name("other"))
    (run / "metrics.jsonl").write_bytes(content)
    said = f"warning: {run}/metrics.jsonl: left out what is no row of metrics: "
    assert said in inl("watch", run).stdout
    assert said in inl("compare", run, run.with_name("other")).stderr


def test_what_is_no_run_is_refused_in_one_line(run: Path, tmp_path: Path) -> None:
    for path, code in ((tmp_path / "none", 4), (run / "recipe.yaml", 2)):
        result = CliRunner().invoke(app, ["watch", str(path)])
        assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1)
    (run / "metrics.jsonl").write_bytes(
        b'\xff\n{"step": 3, "loss": "x"}\n{"step": 4, "A": [], "phase": 1, "mfu": "q"}\n'
    )
    (run / "dynamics").mkdir()
    (run / "dynamics" / "step-00000004.parquet").write_bytes(b"PAR1")
    assert json.loads(inl("watch", run, "--json").stdout)["step"] == 4
    assert "step 4/100" in inl("watch", run).stdout


def test_no_torch_is_imported(run: Path) -> None:
    add(run, 10)
    code = (
        f"import sys\nfrom inl_cli.app import app\ntry: app(['watch', {str(run)!r}])\n"
        "except SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_plot_puts_each_value_where_it_belongs() -> None:
    lines = plot("loss", {"*": [(0, 50.0), (10, 3.0), (20, 2.0), (30, 1.0)], "o": [(30, 1.5)]}, width=42, height=5)
    assert lines == [
        "loss",
        "       3 |*         *",
        "         |",
        "         |                    *",
        "         |                              o",
        "       1 |                              *",
        "         +-------------------------------",
        "          0                            30",
    ]
    assert plot("none", {"*": [(1, None), (2, float("nan"))]}, width=42, height=5) == []
    assert len(plot("flat", {"*": [(1, 2.0)]}, width=42, height=5)) == 8
    assert beside([["a", "b"], ["c"]], width=3) == ["a  c", "b"]
