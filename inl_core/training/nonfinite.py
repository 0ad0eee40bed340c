"""The watch for a loss or a gradient that is NaN or infinite, and the flight record that such a step leaves.

- On a GPU the host would have to wait for the device at every step. There the device remembers instead: from the first
  bad step on, fused AdamW skips its updates (by `found_inf`, which torch's gradient scaler uses too), and the host
  looks at log points. The weights are then still those that the bad step met, as if the run had stopped at once.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from inl_core.corpus.loader import Batch
from inl_core.training.checkpoint import restore_rng, rng_states
from inl_core.training.cycles import Regime
from inl_core.training.examination import Examination, earliest, examine
from inl_core.training.flight_record import (
    FlightRecord,
    describe_examination,
    describe_rows,
    record_paths,
    whole_weights,
    write_flight_record,
    write_weights,
)
from inl_core.training.gradients import Gradients
from inl_core.training.optimizers import Optimizers
from inl_core.training.precision import uses_bf16
from inl_core.training.prefetch import Prefetcher
from inl_core.training.run import RunFiles


class FiniteWatch:
    """Remembers the first step whose loss or gradient norm is not finite.

    deferred: the device skips every update from that step on, until the host asks by `first_bad`.
    """

    def __init__(self, optimizers: Optimizers, device: torch.device, *, deferred: bool) -> None:
        self.deferred = deferred
        # [step, loss, norm] of the first bad step; -1 as long as there is none.
        self._record = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64, device=device)
        self._skip = torch.zeros((), device=device)
        if deferred:
            optimizers.skip_while(self._skip)

    def observe(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Look at one step before its update, without waiting for the device."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        found = torch.stack([torch.full_like(loss, step), loss, norm]).double()
        self._record.copy_(torch.where(bad & (self._record[0] < 0), found, self._record))
        self._skip.copy_((self._record[0] >= 0).float())

    @property
    def skip(self) -> Tensor | None:
        """1 on the device, (), from the first bad step on; None where the host looks at each step before its update."""
        return self._skip if self.deferred else None

    def forget(self) -> None:
        """Watch on after a bad step that was skipped."""
        self._record[0] = -1.0

    def first_bad(self) -> tuple[int, float, float] | None:
        """(step, loss, gradient norm) of the first bad step, or None; this waits for the device."""
        step, loss, norm = self._record.tolist()
        return None if step < 0 else (int(step), loss, norm)


@dataclass(frozen=True)
class Recorded:
    """The flight record of one step."""

    path: Path
    """This rank's record, whether it could be written or not."""
    report: str
    """What it says and where it is, for a message."""


class FlightRecorder:
    """Takes a bad step again, under watch, and writes down what that shows and what it takes to do so anywhere.

    All ranks must call each method together.
    """

    def __init__(self, gradients: Gradients, batches: Prefetcher, run: RunFiles) -> None:
        self.gradients, self.batches, self.run = gradients, batches, run
        self.model, self.world = gradients.parallel.model, gradients.world
        self._rng: dict[int, dict[str, Tensor]] = {}

    def note_rng(self, step: int) -> None:
        """Remember the generators before a step, until it is known to be finite."""
        self._rng[step] = rng_states()

    def forget(self) -> None:
        """All steps until now are known to be finite."""
        self._rng.clear()

    def record(self, step: int, now: Regime, count: float) -> Recorded:
        """Write the record of `step`, counted from 0, whose weights the model still has."""
        batch, parts = self.batches.get(step)
        rng = {device: state.tolist() for device, state in self._rng.get(step, {}).items()}
        restore_rng(rng)
        found = examine(self.gradients, parts, now, step=step, count=max(1.0, count))
        where, weights_file = record_paths(self.run.path / "reports", step + 1, self.world.rank)
        problem = self._write_weights(weights_file)
        try:
            write_flight_record(
                where, self._describe(step, count, batch, found, rng, None if problem else weights_file)
            )
        except OSError as error:
            problem = f"{where}, the report, could not be written ({error.strerror or error})"
        told = problem or f"{where} has the batch and the tensors, and `inl replay {where}` takes the step again"
        return Recorded(where, f"{self._first_bad(found)}; {told}")

    def _write_weights(self, path: Path) -> str:
        """Why rank 0 could not write the weights, on every rank; empty when it could."""
        weights = whole_weights(self.model)

        def write() -> str:
            try:
                write_weights(path, weights)
            except OSError as error:
                return f"{path}, the step's weights, could not be written ({error.strerror or error})"
            return ""

        return self.world.on_main(write)

    def _first_bad(self, found: Examination) -> str:
        """The first place of all ranks, in words."""
        place = earliest(self.world.gather(found.first_bad))
        if place is None:
            return "computed again, the step was finite, as after a fault of the machine"
        on_rank = f" on rank {place[0]}" if self.world.size > 1 else ""
        return f"first of all in the {place[1]}{on_rank}"

    def _describe(
        self, step: int, count: float, batch: Batch, found: Examination, rng: dict[str, list[int]], weights: Path | None
    ) -> FlightRecord:
        recipe, loader = self.run.recipe, self.batches.loader
        model = recipe.model.with_vocab_size(self.run.tokenizer.vocab_size)
        return FlightRecord(
            step=step + 1,
            **describe_examination(found),
            rank=self.world.rank,
            world_size=self.world.size,
            count=count,
            data_fingerprint=loader.dataset.fingerprint,
            device=str(self.world.device),
            threads=torch.get_num_threads(),
            bf16=uses_bf16(recipe, self.world.device),
            operations={part: choice.way for part, choice in self.run.operations.items()},
            weights=weights.name if weights else None,
            recipe=recipe.model_copy(update={"model": model}).model_dump(mode="json"),
            rng=rng,
            batch=describe_rows(batch, loader.windows_of(step), self.run.tokenizer),
        )
