"""metrics.jsonl with anything in it: rows are read, the rest is left out and counted, and nothing is unbounded."""

import json
from pathlib import Path

import pytest

from inl_core.errors import ArtefactError
from inl_core.training import metrics
from inl_core.training.metrics import cut_metrics, read_metrics
from tests.damage import fifo, linked_to, sparse_terabyte

ROW = {"step": 1, "tokens": 64, "loss": 2.5}
EVALUATION = {"step": 2, "tokens": 128, "validation_loss": 3.0, "validation_accuracy": None}
NO_ROWS = [
    b"[]",
    b"null",
    b"5",
    b"\xff\xfe{}",
    b"{}",
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b'{"step": "1"}',
    b'{"step": true}',
    b'{"step": 1.5}',
    b'{"step": -1}',
    b'{"step": null}',
    b'{"step": ' + b"9" * 5_000 + b"}",
    b'{"step": 1, "loss": "low"}',
    b'{"step": 1, "loss": ' + b"9" * 400 + b"}",
    b'{"step": 1, "validation_loss": []}',
    b'{"step": 1, "tokens": {}}',
    b'{"step": 1, "tokens": 1e400}',
    b'{"step": 1, "tokens": NaN}',
    b'{"step": 1, "loss": 2.',
    b'{"step": 1, "deep": ' + b"[" * 900 + b"]" * 900 + b"}",
]


def test_what_is_no_row_is_left_out_and_counted_once(tmp_path: Path) -> None:
    whole = [json.dumps(ROW).encode(), json.dumps(EVALUATION).encode()]
    lines = [whole[0], *NO_ROWS, b"", b"   ", whole[1]]
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    said: list[str] = []
    assert read_metrics(tmp_path, said.append) == [ROW, EVALUATION]
    assert said == [f"{tmp_path / 'metrics.jsonl'}: left out what is no row of metrics: {len(NO_ROWS)} line(s)"]
    cut_metrics(tmp_path, 2)
    assert read_metrics(tmp_path, pytest.fail) == [ROW, EVALUATION]


def test_a_long_line_is_read_in_parts_and_the_next_row_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "_LONGEST_LINE", 1_000)
    (tmp_path / "metrics.jsonl").write_text("x" * 5_500 + "\n" + json.dumps(ROW) + "\n")
    assert read_metrics(tmp_path) == [ROW]


def test_a_file_that_hardly_holds_a_row_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_MOST_SKIPPED", 100)
    (tmp_path / "metrics.jsonl").write_text("[]\n" * 101)
    with pytest.raises(ArtefactError, match=r"metrics\.jsonl: damaged: more than 100 lines are no rows"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("damage", [fifo, linked_to("/dev/zero"), sparse_terabyte, linked_to("metrics.jsonl")])
def test_what_is_no_file_of_metrics_is_refused(tmp_path: Path, damage) -> None:
    damage(tmp_path / "metrics.jsonl")
    with pytest.raises(ArtefactError, match=r"metrics\.jsonl: "):
        read_metrics(tmp_path)


def test_no_file_holds_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
