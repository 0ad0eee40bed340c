"""Closed and full streams, readers that left, and locales: a line and an exit code, never a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inl_cli.streams import _opened, _Output, _Remarks

ROOT = Path(__file__).parents[2]
SHOW = "recipe show recipes/tiny.yaml"


def shell(command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`inl COMMAND` in bash, redirections included."""
    return subprocess.run(
        ["bash", "-c", f"{sys.executable} -m inl_cli {command}"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        encoding="utf-8",
    )


@pytest.mark.parametrize(
    ("command", "code", "stderr"),
    [
        (f"{SHOW} >&- <&-", 0, ""),
        (f"{SHOW} 2>&-", 0, ""),
        ("recipe show missing.yaml >&- 2>&- <&-", 2, ""),
        (f"{SHOW} --json >/dev/full", 1, "stdout: No space left on device\n"),
        ("--help >/dev/full", 1, "stdout: No space left on device\n"),
        ("recipe show missing.yaml 2>/dev/full", 2, ""),
    ],
)
def test_streams_that_are_closed_or_full(command: str, code: int, stderr: str) -> None:
    result = shell(command)
    assert (result.returncode, result.stderr) == (code, stderr)
    assert result.stdout.startswith("name: tiny\n") == (command == f"{SHOW} 2>&-")


def test_closed_streams_give_their_numbers_to_no_file() -> None:
    script = """
import os, sys
from inl_cli.streams import prepare_streams
prepare_streams()
assert os.open("/dev/null", os.O_RDONLY) > 2
print("lost", sys.stdin.read()); print("lost", file=sys.stderr)
"""
    command = f"{sys.executable} -c '{script}' <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", command], cwd=ROOT).returncode == 0


def test_an_ascii_locale_is_utf8_all_the_same() -> None:
    command = "recipe show recipes/tiny.yaml --set 'data.directory=d\u00e9j\u00e0' --json"
    result = shell(command, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["data"]["directory"] == "d\u00e9j\u00e0"


@pytest.mark.parametrize("world_size", ["", "auto"])
def test_the_version_is_shown_in_any_environment(world_size: str) -> None:
    result = shell("--version", WORLD_SIZE=world_size, RANK="1")
    assert (result.returncode, result.stdout[:4], result.stderr) == (0, "inl ", "")


def test_remarks_go_on_when_their_reader_left_and_data_does_not() -> None:
    for kind in (_Remarks, _Output):
        reader, writer = os.pipe()
        os.close(reader)
        stream = _opened(kind(writer, "wb"), None)
        stream.write("\u00e9\udcff\n")
        if kind is _Output:
            with pytest.raises(BrokenPipeError) as caught:
                stream.flush()
            assert caught.value.filename == "stdout"
        stream.flush()
        stream.write("more\n")
        stream.close()


def test_any_text_is_written_as_utf8() -> None:
    reader, writer = os.pipe()
    stream = _opened(_Output(writer, "wb"), None)
    stream.write("\u00e9\udcff\n")
    stream.close()
    assert os.read(reader, 100) == "\u00e9\\udcff\n".encode()
    os.close(reader)
