"""Runs of tiny models whose metrics are made up, for the tests of reports; and a browser to look at them."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from inl_core.training.records import write_record
from inl_core.training.run import RunFiles
from tests.inference.tiny import recipe, tokenizer

SPEED = 1000.0
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


def write_run(
    path: Path, preset: str = "v5", *, scores: dict[int, float], scored_on: str = "a text", **changes: Any
) -> Path:
    """A run without checkpoints: 64 tokens a step, a row of metrics every step, `scores` bits per byte by step."""
    RunFiles(path, recipe(preset, **changes), tokenizer(), Path("data/none")).create()
    rows: list[dict[str, Any]] = []
    for step in range(1, max(scores) + 1):
        reached = {"step": step, "tokens": 64 * step}
        rows.append({**reached, "loss": 5 - step / 10, "bits_per_byte": 4 - step / 10, "tokens_per_second": SPEED})
        if step in scores:
            score = {"validation_loss": 2 * scores[step], "validation_bits_per_byte": scores[step]}
            rows.append({**reached, "scored_on": scored_on, **score})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_history(run: Path, values: dict[int, list[float]], quantity: str = "mu", **figures: float) -> None:
    """Records whose mean is `values` by step and layer, and whose other figures are the same everywhere."""
    for step, means in values.items():
        rows = [
            {"layer": n, "quantity": quantity, "mean": mean, "p5": 0.0, "p50": mean, "p95": 1.0, **figures}
            for n, mean in enumerate(means)
        ]
        write_record(run, step, rows)


def browse(path: Path, profile: Path) -> tuple[str, str]:
    """The document that a headless Chromium makes of a page, and what it logs."""
    assert CHROMIUM
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    options += [f"--user-data-dir={profile}", "--virtual-time-budget=60000", "--enable-logging=stderr", "--dump-dom"]
    found = subprocess.run([CHROMIUM, *options, path.as_uri()], capture_output=True, encoding="utf-8", timeout=120)
    return found.stdout, found.stderr


def inside(page: str, identity: str) -> Any:
    """The JSON inside a page."""
    found = re.search(rf'<script type="application/json" id="{identity}">(.*?)</script>', page, re.DOTALL)
    assert found
    return json.loads(found[1])
