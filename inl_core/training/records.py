"""The records in a run's dynamics/ folder: a Parquet file for each recorded step, written and read without torch.

A row says of one layer, or sub-layer, and one quantity how it is distributed; docs/commands.md lists the quantities.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from inl_core.files import written_aside

VARIANCES = ("variance_dimensions", "variance_tokens", "variance_iterations")
"""The columns that divide the variance of a coefficient that depends on the token (inl_core/training/spread.py)."""
_FIGURES = ("mean", "std", "min", "max", "p5", "p50", "p95", "saturated", "drift", *VARIANCES)
_SCHEMA = pa.schema(
    [("step", pa.int64()), ("layer", pa.int32()), ("sub_layer", pa.string()), ("quantity", pa.string())]
    + [(name, pa.float64()) for name in _FIGURES]
)


def write_record(run: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """Write dynamics/step-N.parquet whole, over an older one.

    Raises:
        OSError: it could not be written; no part of it is left.
    """
    directory = run / "dynamics"
    directory.mkdir(exist_ok=True)
    table = pa.Table.from_pylist([{"step": step, **row} for row in rows], schema=_SCHEMA)
    with written_aside(directory / f"step-{step:08d}.parquet") as aside:
        pq.write_table(table, aside)


def list_records(run: Path) -> dict[int, Path]:
    """The file of each recorded step, in the order of the steps; empty where nothing was recorded."""
    found = {}
    for path in (run / "dynamics").glob("step-*.parquet"):
        digits = path.stem.removeprefix("step-")
        if digits.isdecimal():
            found[int(digits)] = path
    return dict(sorted(found.items()))


def read_record(path: Path) -> list[dict[str, Any]]:
    """The rows of one record; a figure that a quantity does not have is absent. Empty where the file is damaged."""
    try:
        rows = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowInvalid):
        return []
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def read_records(run: Path) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Each recorded step with its rows, as of `read_record`, in the order of the steps."""
    for step, path in list_records(run).items():
        yield step, read_record(path)


def cut_records(run: Path, step: int) -> None:
    """Remove the records of steps after `step`."""
    for recorded, path in list_records(run).items():
        if recorded > step:
            path.unlink()
