"""A mistyped path is refused before torch is imported, by every command and option that takes one."""

import json
import os
import subprocess
import sys
from pathlib import Path

CASES = (
    ("train nope.yaml", 2, "nope.yaml: no such file; `inl recipe list` names the shipped ones"),
    ("train tiny --set data.sources=[nope.txt]", 2, "nope.txt: no such file or directory"),
    ("train tiny --set data.directory=nope --set data.sources=[]", 4, "nope: no data set here (no manifest.json); "),
    ("train tiny --branch-from nope", 4, "nope: no checkpoint to branch from"),
    ("train tiny --set model.init_from=nope", 4, "model.init_from nope: no such run or checkpoint"),
    ("resume nope", 4, "nope: not a run"),
    ("watch nope", 4, "nope: no such run"),
    ("eval nope", 4, "nope: no such run or checkpoint"),
    ("eval nope --tasks any", 4, "nope: no such run or checkpoint"),
    ("chat nope", 4, "nope: no such run or checkpoint"),
    ("eval . --text nope", 2, "nope: no such file or directory"),
    ("eval . --data nope", 4, "nope: no data set here"),
    ("generate nope", 4, "nope: no such run or checkpoint"),
    ("generate . --prompt-file nope", 2, "nope: no such file or directory"),
    ("serve nope", 4, "nope: no such run or checkpoint"),
    ("plan nope.yaml", 2, "nope.yaml: no such file"),
    ("bench train nope.yaml", 2, "nope.yaml: no such file"),
    ("inspect nope", 4, "nope: no such file or directory"),
    ("inspect nope.yaml", 2, "nope.yaml: no such file"),
    ("inspect-params nope", 4, "nope: no such run or checkpoint"),
    ("inspect-params . --against nope", 4, "nope: no such run or checkpoint"),
    ("inspect-params . --text nope", 2, "nope: no such file or directory"),
    ("convergence-report nope", 4, "nope: no such run or checkpoint"),
    ("convergence-report . --text nope", 2, "nope: no such file or directory"),
    ("report nope", 4, "nope: no such directory"),
    ("compare nope other", 4, "nope: no such directory"),
    ("replay nope", 4, "nope: missing"),
    ("export nope --output new", 4, "nope: no such run or checkpoint"),
    ("import-reference nope --output new --iterations 2", 4, "nope: no such file"),
    ("check resume nope.yaml", 2, "nope.yaml: no such file"),
    ("check equivalence nope", 4, "nope: no such run or checkpoint"),
    ("check checkpoint nope", 4, "nope: no such run or checkpoint"),
    ("slurm nope.yaml --time 1:00:00", 2, "nope.yaml: no such file"),
    ("recipe show nope.yaml", 2, "nope.yaml: no such file"),
    ("report . --output pipe", 2, "pipe: is a FIFO; --output names a file"),
    ("report . --csv pipe", 2, "pipe: is a file; --csv names a directory"),
    ("compare . . --output pipe", 2, "pipe: is a FIFO"),
    ("inspect-params . --output pipe", 2, "pipe: is a FIFO"),
    ("slurm tiny --time 1:00:00 --output pipe", 2, "pipe: is a FIFO"),
    ("sweep tiny --seeds 1 --output pipe", 2, "pipe: is a FIFO"),
    ("sweep tiny --seeds 1 --runs-dir pipe", 2, "pipe: is a file; --runs-dir names a directory"),
    ("prepare-data nope", 2, "nope: no such file or directory"),
    ("prepare-data . --tokenizer nope", 4, "nope: missing"),
)
WITHOUT_TORCH = """
import contextlib, io, json, sys
sys.modules["torch"] = None  # importing it fails
from inl_cli.app import app
answers = []
for command in json.loads(sys.argv[1]):
    text, code = io.StringIO(), 0
    with contextlib.redirect_stderr(text):
        try:
            app(command.split())
        except SystemExit as leaving:
            code = leaving.code
    answers.append((code, text.getvalue()))
print(json.dumps(answers))
"""


def test_every_command_refuses_a_mistyped_path_before_torch_is_imported(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")  # writing an output would put a file in its place
    commands = json.dumps([command for command, _, _ in CASES])
    run = [sys.executable, "-c", WITHOUT_TORCH, commands]
    done = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for (command, code, message), (found, text) in zip(CASES, json.loads(done.stdout), strict=True):
        lines = [line for line in text.splitlines() if not line.startswith("tiny: the shipped recipe")]
        assert (found, len(lines)) == (code, 1), f"{command}: {text}"
        assert lines[0].startswith(message), command
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()
