"""Saving a run: what is looked at before a checkpoint is sealed, what a full disk costs, and which checkpoints stay.

- Rank 0 writes; every rank calls, because every rank must learn how it went.
- A checkpoint with NaN or infinity in it is never sealed: it could only be resumed into the same failure.
- The scores of earlier evaluations are read once; afterwards each evaluation adds its own, so a save costs the same
  however long the run is.
"""

import math
import time
from functools import cached_property
from typing import Any

from inl_core.errors import ArtefactError, NonFiniteError
from inl_core.files import describe_os_error
from inl_core.inference.tensor_files import first_nonfinite
from inl_core.model import IntegratorLanguageModel
from inl_core.training.checkpoint import TrainState, capture_rng, save_checkpoint
from inl_core.training.distributed import World
from inl_core.training.metrics import read_scores, score_of_row
from inl_core.training.observer import Observer
from inl_core.training.optimizers import Optimizers
from inl_core.training.retention import best_checkpoint, complete_checkpoints, retain
from inl_core.training.run import RunFiles


class Saver:
    """Saves the state of one run.

    scored_on: names what the periodic evaluations score; only scores on the same set are compared.
    """

    def __init__(
        self,
        run: RunFiles,
        model: IntegratorLanguageModel,
        optimizers: Optimizers,
        world: World,
        observer: Observer,
        scored_on: str,
    ) -> None:
        self.run, self.model, self.optimizers, self.world, self.observer = run, model, optimizers, world, observer
        self.settings, self.scored_on = run.recipe.training.checkpoint, scored_on

    def save(self, state: TrainState) -> bool:
        """Save a checkpoint; False when the disk would not take it, which costs nothing that was saved before.

        Raises:
            NonFiniteError: a weight or a moment is NaN or infinite; nothing was saved, and every rank learns it.
        """
        self._refuse_nonfinite(state.step)
        state.rng = capture_rng()
        return self.world.broadcast(self._write(state) if self.world.is_main else False)

    def note_evaluation(self, row: dict[str, Any]) -> None:
        """Rank 0 hands in each evaluation's row of metrics, whether or not the disk took it."""
        score = score_of_row(row, self.scored_on)
        if self.settings.keep_best and score is not None:
            self._scores[row["step"]] = score

    def save_best(self, state: TrainState) -> None:
        """After an evaluation: save the state when its score beats that of every saved checkpoint.

        Where no checkpoint is due before the end (`every` is 0), none is saved for its score either.
        """
        if self.world.broadcast(self.world.is_main and self._is_best(state.step)):
            self.save(state)
        elif self.world.is_main:
            self._retain(state.step)  # the checkpoint of this step may be the best one now

    def advice(self, step: int) -> str:
        """What a user can do after NaN or infinity at `step`."""
        saved = list(complete_checkpoints(self.run.checkpoints, step).values())
        again = f"`inl resume {self.run.path}` goes on from {saved[-1]}" if saved else "no checkpoint was saved before"
        return f"try a lower training.optimizer.learning_rate; {again}"

    def _refuse_nonfinite(self, step: int) -> None:
        """The host waits for the device once, which saving makes it do anyway."""
        name = first_nonfinite(self.model.state_dict() | self.optimizers.moments())
        if self.world.sum_numbers(float(name is not None))[0] > 0:
            raise NonFiniteError(
                f"step {step}: the update left NaN or infinity in {name or 'the weights of another process'}; "
                f"nothing was saved; {self.advice(step)}"
            )

    def _write(self, state: TrainState) -> bool:
        start = time.perf_counter()
        try:
            documents = self.run.documents(state)
            path = save_checkpoint(self.run.checkpoints, state, self.model, self.optimizers, documents)
        except OSError as error:
            self.observer.on_message(
                f"{self.run.checkpoints}: checkpoint of step {state.step} not saved ({describe_os_error(error)}); "
                "earlier checkpoints are untouched and the run goes on; make room on this disk",
                warning=True,
            )
            return False
        self.observer.on_checkpoint(path, time.perf_counter() - start)
        self._retain(state.step)
        return True

    @cached_property
    def _scores(self) -> dict[int, float]:
        """Scores by step: of the evaluations in metrics.jsonl at first, then also of those that were handed in."""
        try:
            return read_scores(self.run.path, self.scored_on) if self.settings.keep_best else {}
        except (ArtefactError, OSError) as error:
            self.observer.on_message(
                f"{error}; until now no evaluation is known, so keep_best compares those from here on", warning=True
            )
            return {}

    def _is_best(self, step: int) -> bool:
        """Whether `step` is not saved, and no saved checkpoint has as good a score."""
        scores, saved = self._scores, complete_checkpoints(self.run.checkpoints, step)
        if not self.settings.every or step in saved or step not in scores:
            return False
        best = best_checkpoint(saved, scores)
        return scores[step] < (math.inf if best is None else scores[best])

    def _retain(self, step: int) -> None:
        keep = self.settings
        retain(
            self.run.checkpoints,
            step=step,
            every=keep.every,
            keep_last=keep.keep_last,
            keep_every=keep.keep_every,
            scores=self._scores,
        )
