"""`inl replay`: the very step of a flight record once more, on this machine's CPU.

- One process runs the micro-batches of all ranks one after another, by the operations, with the number of threads, in
  the precision and with the random numbers that the record names. What one process computed on a CPU of this type is
  then computed to the last bit; sums over ranks and a GPU's sums are rounded differently.
- Nothing is compiled, so that every module inside a block can be named.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from inl_core.errors import ArtefactError
from inl_core.inference.tensor_sets import check_tensors, read_tensors
from inl_core.kernels.apply import Choice, can_run, put
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import Recipe
from inl_core.training.checkpoint import restore_rng
from inl_core.training.cycles import regime
from inl_core.training.distributed import ALONE
from inl_core.training.examination import Examination, examine
from inl_core.training.execution import prepare_model, recompute
from inl_core.training.flight_record import FlightRecord, describe_examination, read_flight_record, record_paths
from inl_core.training.gradients import Gradients
from inl_core.training.loss_module import LossModule, MicroBatch, micro_batches
from inl_core.training.parallel import Parallel

Note = Callable[[str], None]


@dataclass(frozen=True)
class Replay:
    """A step that was taken again."""

    record: FlightRecord
    found: Examination
    differing: dict[str, tuple[str, str]]
    """What is not bit for bit as recorded, by name: (recorded, now), of the losses and the gradient's norm."""

    @property
    def is_finite(self) -> bool:
        """Whether the step does not go wrong here."""
        return self.found.first_bad is None


def replay(path: Path, *, note: Note = lambda text: None, warn: Note = lambda text: None) -> Replay:
    """Take the step of the flight record at `path` again, and update nothing.

    The global random numbers and the number of threads of this process are set as the record has them.

    Raises:
        ArtefactError: the record or the weights beside it are missing or damaged, or belong to another version.
    """
    record = read_flight_record(path)
    ranks = _all_ranks(path, record, warn)
    recipe = _read_recipe(path, record)
    torch.set_num_threads(record.threads)
    model = _load_model(path, record, recipe)
    _choose_operations(model, record, recipe, note)
    settings = recipe.training
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=record.bf16)
    restore_rng(record.rng)
    step = record.step - 1
    now = regime(settings.losses, settings.cycle, step, settings.num_steps)
    note(f"taking step {record.step:,} again with {sum(len(one.batch) for one in ranks):,} sequences")
    found = examine(
        Gradients(Parallel(LossModule(model.train(), autocast), ALONE), settings),
        _parts(path, ranks, recipe),
        now,
        step=step,
        count=max(1.0, record.count),
    )
    return Replay(record, found, _differing(record, describe_examination(found)))


def _all_ranks(path: Path, record: FlightRecord, warn: Note) -> list[FlightRecord]:
    """The records of all ranks, which lie beside this one; without one that is missing the step is not the same."""
    found = []
    for rank in range(record.world_size):
        file = record_paths(path.parent, record.step, rank)[0]
        if rank == record.rank:
            found.append(record)
        elif file.is_file():
            found.append(read_flight_record(file))
        else:
            warn(f"{file}: missing, so the step is taken without the sequences of rank {rank}")
    return found


def _read_recipe(path: Path, record: FlightRecord) -> Recipe:
    try:
        return Recipe.model_validate(record.recipe)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        key = ".".join(("recipe", *map(str, first["loc"])))
        raise ArtefactError(f"{path}: {key}: {first['msg']}; replay it with the version of inl that wrote it") from None


def _load_model(path: Path, record: FlightRecord, recipe: Recipe) -> IntegratorLanguageModel:
    if record.weights is None:
        raise ArtefactError(
            f"{path}: holds no weights, because the disk did not take them; the step cannot be replayed"
        )
    file = path.parent / Path(record.weights).name
    with torch.device("meta"):
        model = IntegratorLanguageModel(recipe.model)
    check_tensors(file, model.state_dict(), str(path))
    model.to_empty(device="cpu")
    model.reset_buffers()
    read_tensors(file, model.state_dict())
    return model


def _choose_operations(model: IntegratorLanguageModel, record: FlightRecord, recipe: Recipe, note: Note) -> None:
    """Put the recorded operations into the model, or those for this machine where it lacks one of them."""
    settings = recipe.training.model_copy(update={"compile": False})
    choices = {part: Choice(way, "as recorded") for part, way in record.operations.items()}
    if can_run(choices):
        put(model, choices)
        recompute(model, settings.recomputation)
    else:
        note("this machine lacks an operation that the step was computed by, so the numbers are rounded differently")
        prepare_model(model, settings, bf16=record.bf16)


def _parts(path: Path, ranks: list[FlightRecord], recipe: Recipe) -> list[MicroBatch]:
    size, most, parts = recipe.training.micro_batch(ranks[0].world_size), recipe.model.vocab_size or 0, []
    for one in ranks:
        batch = one.arrays
        if max(batch.tokens.max(), batch.targets.max()) >= most:
            raise ArtefactError(f"{path}: batch: holds a token that the model of {most:,} tokens does not know")
        parts += micro_batches(batch, size, torch.device("cpu"))
    return parts


def _differing(record: FlightRecord, now: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    then = {**record.losses, "gradient norm": record.gradient_norm}
    here = {**now["losses"], "gradient norm": now["gradient_norm"]}
    return {
        name: (then.get(name, "-"), here.get(name, "-")) for name in then | here if then.get(name) != here.get(name)
    }
