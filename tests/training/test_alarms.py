"""Alarms of collapsed dynamics: models made to collapse in one way each, and runs that learn."""

from pathlib import Path
from typing import Any

import pytest
import torch

from inl_core.training.alarms import AlarmWatch, find_alarms, newest_record
from inl_core.training.dynamics import record_layers
from inl_core.training.records import write_record
from tests.inference.tiny import tiny_model

IDS = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def record(preset: str, factors: dict[str, float] | None = None, **changes: Any) -> list[dict[str, Any]]:
    """A record of the tiny model, after the parameters whose names end so were multiplied."""
    model = tiny_model(preset, **changes)
    for name, parameter in model.named_parameters():
        for ending, factor in (factors or {}).items():
            if name.endswith(ending):
                parameter.mul_(factor)
    return record_layers(model, IDS)


def kinds(rows: list[dict[str, Any]], *, progress: float = 0.9, **given: Any) -> list[str]:
    return [alarm.kind for alarm in find_alarms(rows, progress=progress, **given)]


QUIET = {"stream": {"excitation": None}}
SLOW = {"integrator": {"dt": 1e-4}}
STATIC = {"integrator": {"dynamic_alpha": False}}
COLLAPSED = [
    ("v4", {}, SLOW, "state ignored"),
    (
        "v5",
        {"output.weight": 0, "down.weight": 0, "alpha": 0, "anchor": 0, "beta": 0, "transport": 0},
        QUIET,
        "state ignored",
    ),
    ("v4", {"controller.output.weight": 0}, STATIC, "controller constant"),
    ("v4", {"controller.output.weight": 0}, {}, "controller constant"),
    ("v5", {"blocks.1.feed_forward.down.weight": 1e5}, {}, "velocity grows over depth"),
    ("v5", {"alpha": 1e-3}, {}, "momentum unused"),
    ("v5", {"transport": 1e-3}, {}, "transport unused"),
    ("transformer", {"transport": 1e-3}, {"transport": True}, "transport unused"),
]


@pytest.mark.parametrize(("preset", "factors", "changes", "kind"), COLLAPSED)
def test_a_collapsed_model_is_told_from_a_healthy_one(preset: str, factors: dict, changes: dict, kind: str) -> None:
    assert kinds(record(preset)) == []
    rows = record(preset, factors, **changes)
    assert kind in kinds(rows)
    assert kinds(rows, progress=0.1) == []
    assert (kind in kinds(rows, progress=0.4)) == ("unused" not in kind)


def test_only_the_places_that_collapsed_are_named_and_their_figures(tmp_path: Path) -> None:
    rows = record("v4")
    for row in rows:
        if (row["layer"], row["quantity"]) == (1, "displacement"):
            row["p50"] = 0.0042
    (alarm,) = find_alarms(rows, progress=0.5)
    assert "layer 1 (0.42%)" in alarm.text
    assert "layer 0" not in alarm.text


def test_growth_in_training_is_judged_against_the_record_a_tenth_into_the_run(tmp_path: Path) -> None:
    heard: list[str] = []
    calm = record("v5")
    fast = [row | {"p50": 11 * row["p50"]} if row["quantity"] == "velocity" else row for row in calm]
    still = [row | {"p50": row["p50"] / 100} if row["quantity"] == "velocity" else row for row in calm]
    watch = AlarmWatch(tmp_path, 100, heard.append)
    for step, rows in ((1, still), (10, calm), (50, calm)):
        write_record(tmp_path, step, rows)
        watch.hear(step, rows)
    assert heard == []
    resumed = AlarmWatch(tmp_path, 100, heard.append)  # it has not seen the record of step 10 itself
    for step in (60, 70):
        write_record(tmp_path, step, fast)
        resumed.hear(step, fast)
    (warning,) = heard  # once
    assert warning.startswith("step 60: the velocity grows in training: ")
    assert " 11 times the " in warning
    newest = newest_record(tmp_path, 100)
    assert newest is not None
    assert (newest[0], [alarm.kind for alarm in newest[2]]) == (70, ["velocity grows in training"])
    (tmp_path / "dynamics" / "step-00000099.parquet").write_bytes(b"")
    assert newest_record(tmp_path, 100) == newest
    assert newest_record(tmp_path / "other", 100) is None


def test_records_of_before_there_were_these_figures_raise_no_alarm() -> None:
    names = ("layer", "sub_layer", "quantity", "mean", "std", "p50")
    old = [{key: value for key, value in row.items() if key in names} for row in record("v4")]
    assert kinds([row for row in old if row["quantity"] != "displacement"]) == []


def test_a_run_warns_of_each_collapse_once(make_recipe, make_trainer) -> None:
    settings = {"optimizer": {"stream_rate_factor": 1e-9}, "logging": {"every": 1, "dynamics_every": 1}}
    trainer, heard_by = make_trainer(make_recipe(training=settings))
    trainer.fit()
    found = [text for text in heard_by.messages if "unused" in text]
    assert [text.split(":")[0] for text in found] == ["step 6", "step 6"]
    assert {text.split(": ")[1].split()[0] for text in found} == {"momentum", "transport"}
    assert all(str(trainer.run.path) in text for text in found)
