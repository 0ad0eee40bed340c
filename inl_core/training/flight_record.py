"""What a step leaves behind whose loss or gradient is NaN or infinite: enough to take the very same step again.

    reports/nonfinite-step-500-rank-0.json      of each rank: what was found, its part of the batch, RNG, recipe
    reports/nonfinite-step-500.safetensors      the weights that the step met

- A step's loss and gradient are a function of the weights, the batch and the recipe. The optimizer's state has no part
  in them, so the weights alone make a replay exact, and nothing older has to be kept or trained again.
- Numbers that may be NaN or infinite are written as texts ("nan"), because JSON has no word for them.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from inl_core.corpus.loader import Batch
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError
from inl_core.files import read_record, write_whole, written_aside
from inl_core.training.checkpoint import Byte
from inl_core.training.examination import Examination

_LARGEST_RECORD = 1 << 30
_ARRAYS = {"tokens": np.int64, "targets": np.int64, "document_ids": np.int32, "positions": np.int64}
Natural = Annotated[int, Field(ge=0, lt=2**63)]


class FlightRecord(BaseModel):
    """One rank's record of a step."""

    model_config = ConfigDict(frozen=True, strict=True)

    format: Annotated[int, Field(ge=1, le=1)] = 1
    step: Annotated[int, Field(gt=0, lt=2**63)]
    """The step, counted from 1 as in metrics.jsonl."""
    losses: dict[str, str]
    """Of the global batch."""
    gradient_norm: str
    """Before clipping."""
    first_bad: dict[str, Any] | None
    """The first place with NaN or infinity on this rank (`Place`); None where its own numbers were finite."""
    layers: list[dict[str, str | None]]
    """As in `Examination`."""
    not_finite: dict[str, dict[str, int]]
    """As in `Examination`."""
    rank: Natural
    world_size: Annotated[int, Field(gt=0, lt=2**31)]
    count: Annotated[float, Field(ge=0)]
    """Target tokens of the global batch."""
    data_fingerprint: str
    """The data set's."""
    device: str
    threads: Annotated[int, Field(gt=0, lt=2**20)]
    bf16: bool
    """Whether the passes ran under bfloat16 autocast."""
    operations: dict[str, str]
    """How each part of the model was computed, as in environment.json."""
    weights: str | None
    """The file beside this one that holds the weights; None where it could not be written."""
    recipe: dict[str, Any]
    """With the size of the vocabulary filled in."""
    rng: dict[str, list[Byte]]
    """torch's generators before the step."""
    batch: list[dict[str, Any]]
    """This rank's rows: `window` is its number in the data set, then `tokens`, `targets`, `text`, and where rows hold
    several documents `document_ids` and `positions`."""

    @property
    def arrays(self) -> Batch:
        """The rows as the loader gave them."""
        found = {name: [row[name] for row in self.batch] for name in _ARRAYS if name in self.batch[0]}
        return Batch(**{name: np.array(rows, dtype=_ARRAYS[name]) for name, rows in found.items()})


def record_paths(reports: Path, step: int, rank: int) -> tuple[Path, Path]:
    """(a rank's record, the weights of all) of a step, counted from 1."""
    name = f"nonfinite-step-{step}"
    return reports / f"{name}-rank-{rank}.json", reports / f"{name}.safetensors"


def read_flight_record(path: Path) -> FlightRecord:
    """The record at `path`; ArtefactError when it is not a whole one."""
    if path.is_file() and path.suffix != ".json":
        raise ArtefactError(f"{path}: not a flight record; they are RUN/reports/nonfinite-step-N-rank-R.json")
    record = read_record(path, FlightRecord, limit=_LARGEST_RECORD)
    try:
        batch = record.arrays
        shapes = {array.shape for array in vars(batch).values() if array is not None}
        is_sound = len(shapes) == 1 and batch.tokens.ndim == 2 and batch.tokens.min() >= 0
    except (IndexError, KeyError, TypeError, ValueError, OverflowError):
        is_sound = False
    if not is_sound:
        raise ArtefactError(f"{path}: damaged: batch: is not rows of tokens and targets, all of one length")
    return record


def describe_rows(batch: Batch, windows: np.ndarray, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The rows of a batch as `FlightRecord.batch` has them."""
    arrays = {name: getattr(batch, name) for name in _ARRAYS if getattr(batch, name) is not None}
    return [
        {
            "window": window,
            **{name: array[row].tolist() for name, array in arrays.items()},
            "text": tokenizer.decode(batch.tokens[row].tolist()),
        }
        for row, window in enumerate(windows.tolist())
    ]


def describe_examination(found: Examination) -> dict[str, Any]:
    """What was found, as a record has it."""
    return {
        "losses": {name: repr(value) for name, value in found.losses.items()},
        "gradient_norm": repr(found.gradient_norm),
        "first_bad": asdict(found.first_bad) if found.first_bad else None,
        "layers": [
            {key: value if key == "layer" else _text(value) for key, value in row.items()} for row in found.layers
        ],
        "not_finite": found.not_finite,
    }


def _text(value: float | None) -> str | None:
    return None if value is None else repr(value)


def write_flight_record(path: Path, record: FlightRecord) -> None:
    """Write one rank's record; OSError when it could not be written, and then no part of it is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record.model_dump(), indent=1))


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights on rank 0, whole and on the CPU, and nothing on the others; all ranks must call this together."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))  # type: ignore[return-value]


def write_weights(path: Path, weights: dict[str, Tensor]) -> None:
    """Write the weights, bad numbers and all; OSError when they could not be written, and then no part is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        try:
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, aside)
        except SafetensorError as error:
            raise OSError(f"the weights could not be written: {error}") from None
