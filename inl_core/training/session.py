"""One session of a run, from a recipe to a trainer that is ready to fit: `inl train`, `inl resume` and Python alike.

    recipe = load_recipe("tiny")
    with open_session(recipe, "runs/mine") as session:
        data = session.open_data()
        trainer = session.build_trainer(data)
        trainer.fit()

- Every process of a distributed run executes the same lines. Rank 0 reads and writes files, and the others learn what
  it found, an error included.
- A session that is refused changes nothing in the run's directory but the word that the session before left there
  (run_status.py), in whose place it leaves its own.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from inl_core.corpus.chat_template import CHAT_TEMPLATE, read_chat_template
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError, InlError, Interrupted, RecipeError
from inl_core.files import expand_home
from inl_core.inference.checkpoint_files import TOKENIZER_CONFIG, checkpoint_step, list_checkpoints, read_config
from inl_core.kernels.cpu.library import is_to_be_compiled
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import Recipe
from inl_core.training.branching import branch_provenance, check_tokenizer, choose_origin
from inl_core.training.checkpoint import load_weights
from inl_core.training.claim import claim, claim_new, join
from inl_core.training.distributed import World, start_world
from inl_core.training.interruption import StopSignal
from inl_core.training.metrics import cut_metrics
from inl_core.training.mirrors import check_mirrors
from inl_core.training.observer import LogObserver, Observer
from inl_core.training.precision import uses_bf16
from inl_core.training.records import cut_records
from inl_core.training.resuming import check_given_recipe, check_origin, choose_checkpoint
from inl_core.training.run import RunFiles
from inl_core.training.run_data import Prepare, RunData, open_data, prepare_or_wait
from inl_core.training.run_status import (
    START_ANEW,
    Ending,
    check_is_run_directory,
    holds_run,
    is_taken,
    read_ending,
    remove_words,
    write_failed,
    write_preempted,
)
from inl_core.training.starting_weights import StartingWeights, find_weights
from inl_core.training.trainer import Trainer


@dataclass(frozen=True)
class Resumption:
    """How a run is to be resumed."""

    allowed: tuple[str, ...] = ()
    """Keys of the recipe whose change is accepted although it makes another experiment."""
    must_advance: bool = False
    """Whether a run that has reached its last step already is refused."""
    or_start: bool = False
    """Whether a run is started where there is none. The recipe is then the one that was given, not the run's own, and
    both are compared."""


@contextmanager
def open_session(
    recipe: Recipe,
    run_dir: str | Path | None = None,
    *,
    resumption: Resumption | None = None,
    branch_from: str | Path | None = None,
    observer: Observer | None = None,
    stop: StopSignal | None = None,
) -> Iterator["Session"]:
    """Join the other processes, if there are any, and own the run's directory until the end of the context.

    Args:
        run_dir: where the run is or goes; None takes runs/NAME, or NAME-2, NAME-3, ... if that is taken.
        resumption: continues the run in `run_dir` instead of starting a new one.
        branch_from: the checkpoint, or the run, that a new run begins with (branching.py), and a
            resumed one must have begun with.
        observer: hears what happens, on rank 0; by default Python's `logging` does, under the name "inl".
        stop: who listens for signals outside of the training loop, if anybody does.

    Raises:
        RecipeError: the recipe does not fit the number of processes, the machine or the run, or the run did not begin
            with `branch_from`.
        ArtefactError: the run is damaged or not empty, or another process is at work on it.
    """
    with start_world(recipe.training.device) as world, ExitStack() as held:
        _check_batch(recipe, world)
        check_mirrors(recipe)
        observer = (observer or LogObserver()) if world.is_main else Observer()
        directory = world.on_main(lambda: _claim_directory(recipe, run_dir, resumption, held, observer))
        held.enter_context(_leaves_word(directory, stop or StopSignal()) if world.is_main else join(directory))
        session = Session(recipe, world, directory, resumption, observer)
        if resumption is not None and resumption.or_start:
            session.compare_recipes(resumption)
        # Before the data is prepared, which may take hours: a run that cannot be resumed is refused at once.
        session.checkpoint = session.choose_checkpoint()
        if session.checkpoint is None:
            session.choose_beginning(branch_from)
        elif branch_from is not None:
            begun, warn = session.checkpoint, observer.on_warning
            world.on_main(lambda: check_origin(directory, begun, branch_from, warn=warn))
        yield session


@dataclass
class Session:
    """While it is open, the run's directory is ours. It opens the data and makes the trainer."""

    recipe: Recipe
    world: World
    directory: Path
    resumption: Resumption | None
    observer: Observer
    checkpoint: Path | None = None
    """The checkpoint of this run that it goes on from; None starts at step 0, or with `origin`."""
    origin: Path | None = None
    """The checkpoint of another run that this one begins with."""
    weights: StartingWeights | None = None
    """What `model.init_from` names, where a run starts at step 0."""

    def ending(self) -> Ending | None:
        """What the run has reached, where `or_start` finds nothing left to do: its last step is saved and evaluated."""
        wanted, end = self.resumption, self.recipe.training.num_steps
        if wanted is None or not wanted.or_start or self.checkpoint is None or checkpoint_step(self.checkpoint) != end:
            return None
        return self.world.on_main(lambda: read_ending(self.directory, end))

    def compare_recipes(self, wanted: Resumption) -> None:
        """Where there is a run, compare its recipe with this session's; where there is none, a new one is started.

        Raises:
            RecipeError: it would become another experiment.
        """
        tell, warn = self.observer.on_message, self.observer.on_warning

        def compare() -> bool:
            return check_given_recipe(
                self.directory,
                self.recipe,
                wanted.allowed,
                show=lambda change: tell(f"{change.kind}: {change}"),
                warn=warn,
            )

        if not self.world.on_main(compare):
            self.resumption = None

    def open_data(self, prepare: Prepare = prepare_or_wait) -> RunData:
        """The run's data, which rank 0 prepares by `prepare` if it is not there.

        Raises:
            ArtefactError: the data is damaged, or is not what the recipe describes.
        """
        resumed = self.directory if self.resumption else None
        return open_data(self.recipe, self.world, prepare, run=resumed, note=self.observer.on_message)

    def build_trainer(self, data: RunData) -> Trainer:
        """A trainer at the checkpoint's step; a checkpoint that was damaged since it was chosen is passed over.

        Raises:
            ArtefactError: no checkpoint can be read, or `data` is not the data that the run was trained on.
        """
        can_use_cpp = self.world.device.type == "cpu" and not uses_bf16(self.recipe, self.world.device)
        wants_cpp = can_use_cpp and self.recipe.training.operations == "auto"
        if self.world.is_main and wants_cpp and is_to_be_compiled():
            self.observer.on_message("compiling the operations in C++ for this machine: some seconds, once")
        trainer = None
        while trainer is None and self.checkpoint is not None:
            trainer = self._try_to_resume(data, self.checkpoint)
        if trainer is None:
            trainer = self._first_trainer(data) if self.origin is None else self._branched_trainer(data, self.origin)
        self.world.on_main(lambda: self._accept(trainer))
        return trainer

    def choose_checkpoint(self) -> Path | None:
        """The newest checkpoint that the run can go on from, verified; None for step 0."""
        wanted = self.resumption
        if wanted is None:
            return None
        warn, must_advance = self.observer.on_warning, wanted.must_advance
        return choose_checkpoint(
            self.directory, self.recipe, wanted.allowed, must_advance=must_advance, warn=warn, readers=self.world
        )

    def choose_beginning(self, branch_from: str | Path | None) -> None:
        """Find and verify the checkpoint of another run, or the weights, that a run at step 0 begins with, if any."""
        tell, warn = self.observer.on_message, self.observer.on_warning
        if branch_from is not None:
            self.origin = self.world.on_main(lambda: choose_origin(branch_from, self.recipe, tell=tell, warn=warn))
        else:
            self.weights = self.world.on_main(lambda: find_weights(self.recipe.model, tell=tell))

    def _first_trainer(self, data: RunData) -> Trainer:
        """A trainer at step 0, whose weights are drawn, or those that `model.init_from` names."""
        weights = self.weights
        if weights is None:
            return self._new_trainer(data)
        self.world.on_main(lambda: weights.check_tokenizer(data))
        trainer = self._new_trainer(data, weights.provenance, weights.path)
        load_weights(weights.path, trainer.model, weights.prefix, may_be_half=True)
        return trainer

    def _branched_trainer(self, data: RunData, origin: Path) -> Trainer:
        """A trainer at another run's checkpoint, which is saved as the first one of this run.

        Until then the directory holds no recipe. So a session that is killed here leaves nothing that could be resumed
        without the weights it should have begun with.
        """
        self.world.on_main(lambda: check_tokenizer(origin, data))
        trainer = self._new_trainer(data, self.world.on_main(lambda: branch_provenance(origin)), origin)
        self._tell_of_other_operations(trainer.run)
        trainer.resume(origin)
        trainer.state.data_fingerprint = data.train.fingerprint
        if not trainer.saver.save(trainer.state):
            raise InlError(f"{self.directory}: its first checkpoint could not be saved; make room, and start it again")
        return trainer

    def _try_to_resume(self, data: RunData, checkpoint: Path) -> Trainer | None:
        """A trainer at `checkpoint`; None when that cannot be read any more, and another one is chosen."""
        trainer, problem = None, ""
        try:
            trainer = self._resumed_trainer(data, checkpoint)
        except (OSError, ValueError) as error:
            problem = str(error)
        if not self.world.sum_numbers(float(trainer is None))[0]:
            return trainer
        self.checkpoint = self.choose_checkpoint()
        if self.checkpoint in (checkpoint, None):
            self.world.on_main(partial(_refuse, problem))  # one message, where all ranks met the same
            raise ArtefactError(problem or f"{checkpoint}: could not be read by another process")
        self.observer.on_warning(f"skipped: {checkpoint} changed while it was opened: {problem}")
        return None

    def _resumed_trainer(self, data: RunData, checkpoint: Path) -> Trainer:
        provenance = self.world.on_main(lambda: tuple(read_config(checkpoint).provenance))
        trainer = self._new_trainer(data, provenance, checkpoint)
        self._tell_of_other_operations(trainer.run)
        trainer.resume(checkpoint)
        if self.world.is_main:
            self._tell_of_other_code(trainer)
        before, now = trainer.state.data_fingerprint, data.train.fingerprint
        if before != now:
            raise ArtefactError(
                f"{checkpoint}: was trained on data with fingerprint {before[:12]}, this is {now[:12]}; put back the "
                "data set, or start a new run"
            )
        return trainer

    def _new_trainer(
        self, data: RunData, provenance: tuple[dict[str, Any], ...] = (), origin: Path | None = None
    ) -> Trainer:
        """A trainer of weights that were drawn, or that come from `origin` as `provenance` tells."""
        model = empty_model(self.recipe, data.tokenizer)
        before = self.world.on_main(lambda: read_chat_template(origin / TOKENIZER_CONFIG)) if origin else None
        template = before or (CHAT_TEMPLATE if data.train.has_conversations else None)
        run = RunFiles(self.directory, self.recipe, data.tokenizer, data.directory, provenance, template)
        return Trainer(model, data, run, self.world, self.observer)

    def _tell_of_other_operations(self, run: RunFiles) -> None:
        """Say so where the model computes by other operations than before: the numbers then differ by rounding."""
        before, now = run.computed_before, {part: choice.way for part, choice in run.operations.items()}
        if before and before != now:
            was, is_now = (", ".join(f"{part} by {way}" for part, way in ways.items()) for ways in (before, now))
            self.observer.on_warning(
                f"computed by other operations than before ({was}; now {is_now}): the run goes on, but not bit for bit "
                "as it would have"
            )

    def _tell_of_other_code(self, trainer: Trainer) -> None:
        """Say so where versions, threads or processes are not those that the run had before: rounding may differ."""
        changes, before = trainer.run.environment_changes(), trainer.state.world_size
        if before != self.world.size:
            changes.append(f"processes {before} -> {self.world.size}")
        if changes:
            self.observer.on_warning(
                f"not as before: {', '.join(changes)}; the run goes on, but perhaps not bit for bit as it would have"
            )

    def _accept(self, trainer: Trainer) -> None:
        """Write what a new session changes in the run; not earlier, since a refused session changes nothing."""
        is_finished = trainer.state.step == trainer.settings.num_steps
        # First, because this refuses a metrics.jsonl that is not a regular file.
        cut_metrics(self.directory, trainer.state.step, keep_evaluation=not is_finished, note=self.observer.on_warning)
        trainer.run.create()
        cut_records(self.directory, trainer.state.step)


def empty_model(recipe: Recipe, tokenizer: Tokenizer) -> IntegratorLanguageModel:
    """The recipe's model on the meta device, as `Trainer` takes it: it has no memory yet."""
    with torch.device("meta"):
        return IntegratorLanguageModel(recipe.model.with_vocab_size(tokenizer.vocab_size))


def _check_batch(recipe: Recipe, world: World) -> None:
    try:
        recipe.training.micro_batch(world.size)
    except ValueError as error:
        raise RecipeError(f"training.batch_tokens: {error}") from error


def _claim_directory(
    recipe: Recipe, run_dir: str | Path | None, resumption: Resumption | None, held: ExitStack, observer: Observer
) -> Path:
    """The run's directory, which is ours for as long as `held` lasts."""
    if run_dir is None:
        first = Path("runs") / recipe.name
        path = held.enter_context(claim_new(first, lambda path: not is_taken(path), observer.on_warning))
    else:
        path = expand_home(run_dir)
        check_is_run_directory(path)  # before the lock, which is a file in it
        held.enter_context(claim(path, observer.on_warning))
    # Before anything is refused: a scheduler that finds such a word would start the run again and again.
    remove_words(path)
    is_run = holds_run(path)
    if is_taken(path) and (resumption is None or (resumption.or_start and not is_run)):
        go_on = f"`inl resume {path}` or --resume-or-start continues it, another --run-dir starts anew"
        raise ArtefactError(f"{path}: not empty; {go_on if is_run else START_ANEW}")
    return path


@contextmanager
def _leaves_word(directory: Path, stop: StopSignal) -> Iterator[None]:
    """Leave word of what ends this session: an error, or, outside of the training loop, a signal that `stop` heard.

    In the loop the trainer does the latter, once it has saved. Where another process is gone, this one leaves no word:
    the other has left its own, or was killed.
    """

    def leave_word() -> None:
        newest = list_checkpoints(directory / "checkpoints")[-1:]
        with suppress(OSError):
            write_preempted(directory, max(map(checkpoint_step, newest), default=0), stop.name)

    stop.leave_word = leave_word
    try:
        yield
    except KeyboardInterrupt:
        if stop.requested:
            leave_word()
        raise
    except (InlError, OSError) as error:
        is_told = isinstance(error, Interrupted | ConnectionError)
        if not is_told and holds_run(directory):  # of a refused start nothing is left
            with suppress(OSError):
                write_failed(directory, error)
        raise
    finally:
        stop.leave_word = None


def _refuse(problem: str) -> None:
    if problem:
        raise ArtefactError(problem)
