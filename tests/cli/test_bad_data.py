"""Bad input to `inl prepare-data`: one clear line, the right exit code, and nothing left that looks like a data set."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest


def prepare(directory: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "inl_cli", "prepare-data", *map(str, arguments)]
    command += ["--output", "out", "--vocab-size", "300", "--quiet"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=120, env=dict(os.environ))


def empty(path: Path) -> str:
    (path / "empty.txt").write_text("")
    return "empty.txt"


def not_utf8(path: Path) -> str:
    (path / "latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 50)
    return "latin.txt"


def corrupt_parquet(path: Path) -> str:
    pq.write_table(pa.table({"text": ["some text"] * 1000}), path / "rows.parquet")
    data = bytearray((path / "rows.parquet").read_bytes())
    data[-200:-100] = b"\0" * 100
    (path / "rows.parquet").write_bytes(bytes(data))
    return "rows.parquet"


def corrupt_gzip(path: Path) -> str:
    whole = gzip.compress(b"some text\n" * 1000)
    (path / "text.txt.gz").write_bytes(whole[: len(whole) // 2])
    return "text.txt.gz"


def bad_lines(path: Path) -> str:
    good = json.dumps({"text": "a good row of text"})
    (path / "rows.jsonl").write_text("\n".join([good, "{broken", good, '{"text": 3}', good]))
    return "rows.jsonl"


def missing(path: Path) -> str:
    return "nowhere.txt"


@pytest.mark.parametrize(
    ("make", "code", "says"),
    [
        (empty, 4, "text"),
        (lambda path: "~no-such-user/x", 2, "SOURCE: ~no-such-user/x: no home directory"),
        (not_utf8, 4, "latin.txt"),
        (corrupt_parquet, 4, "rows.parquet"),
        (corrupt_gzip, 4, "text.txt.gz"),
        (bad_lines, 4, "rows.jsonl:2"),
        (missing, 2, "nowhere.txt"),
    ],
)
def test_bad_input_is_named_with_its_exit_code(tmp_path, make, code, says):
    done = prepare(tmp_path, make(tmp_path))
    assert done.returncode == code, done.stderr
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_few_bad_lines_are_quarantined_and_told(tmp_path):
    rows = [json.dumps({"text": f"row {number} of good text"}) for number in range(50)]
    rows.insert(7, "{broken")
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    done = prepare(tmp_path, "rows.jsonl", "--max-bad-ratio", "0.1", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["quarantined"] == 1
    kept = [json.loads(line) for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()]
    assert len(kept) == 1
    assert "rows.jsonl:8" in json.dumps(kept[0])
