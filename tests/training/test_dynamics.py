"""What a record of the dynamics says, against float64 computed here."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from inl_core.training.dynamics import measure, record_layers
from inl_core.training.records import cut_records, list_records, read_records, write_record
from inl_core.training.spread import variance_parts
from tests.inference.tiny import tiny_model

IDS = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))


def test_the_variance_of_a_coefficient_is_divided_without_rest():
    x = torch.randn((3, 4, 5, 6), generator=torch.Generator().manual_seed(1))
    found = {name: part.item() for name, part in variance_parts(x).items()}
    array = x.double().numpy().reshape(3, 20, 6)
    tokens = [np.var([array[:, n, d].mean() for n in range(20)]) for d in range(6)]
    iterations = [np.var(array[:, n, d]) for n in range(20) for d in range(6)]
    assert found["variance_dimensions"] == pytest.approx(np.var(array.mean((0, 1))), rel=1e-5)
    assert found["variance_tokens"] == pytest.approx(np.mean(tokens), rel=1e-5)
    assert found["variance_iterations"] == pytest.approx(np.mean(iterations), rel=1e-5)
    assert sum(found.values()) == pytest.approx(array.var(), rel=1e-5)
    same_for_all = variance_parts(torch.arange(6.0).expand(3, 4, 5, 6))
    assert [same_for_all[f"variance_{name}"].item() for name in ("tokens", "iterations")] == [0, 0]


@pytest.mark.parametrize(("preset", "moved"), [("v3", 6), ("v4", 6), ("v5", 29)])
def test_every_learned_vector_is_told_with_its_way_from_its_start(preset: str, moved: int):
    """mu, gamma and phi of 2 layers; the 7 vectors of each of v5's 4 steps, and the transport at its embedding."""
    model = tiny_model(preset)
    fresh = tiny_model(preset)
    fresh.initialise(0)
    rows, start = record_layers(model, IDS), measure(fresh, IDS)
    drifts = [row["drift"] for row in record_layers(fresh, IDS) if "drift" in row]
    assert drifts == pytest.approx([0.0] * len(drifts), abs=1e-6)
    learned = [row for row in rows if "drift" in row]
    named = {(one.place["layer"], one.place.get("sub_layer"), one.name): one.values for one in measure(model, IDS)}
    before = {(one.place["layer"], one.place.get("sub_layer"), one.name): one.values for one in start}
    for row in learned:
        key = (row["layer"], row.get("sub_layer"), row["quantity"])
        way = (named[key] - before[key]).double().numpy()
        assert row["drift"] == pytest.approx(math.sqrt((way**2).mean()), rel=1e-5), key
        assert row["drift"] > 0.01
    assert len(learned) == moved


def test_records_are_read_back_without_what_a_quantity_does_not_have(tmp_path: Path):
    rows = record_layers(tiny_model("v4"), IDS)
    for step in (100, 20, 3):
        write_record(tmp_path, step, rows)
    (tmp_path / "dynamics" / "step-00000050.parquet").write_bytes(b"cut short")
    found = dict(read_records(tmp_path))
    assert list(found) == list(list_records(tmp_path)) == [3, 20, 50, 100]
    assert found[50] == []
    assert found[20] == [{"step": 20, **row} for row in rows]
    cut_records(tmp_path, 20)
    assert list(list_records(tmp_path)) == [3, 20]
    assert list(read_records(tmp_path / "nothing")) == []
