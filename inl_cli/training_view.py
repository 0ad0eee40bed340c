"""What a person sees of a run: the plan before it, a live view on a terminal, plain lines elsewhere."""

import os
import shutil
import time
from typing import Any

from inl_cli.console import Console
from inl_cli.progress import amount
from inl_cli.run_figures import clock, measured_figures, panel, row_figures
from inl_core.analysis.planning import plan_recipe
from inl_core.inference.evaluate import Evaluation
from inl_core.kernels import describe
from inl_core.training.observer import Observer
from inl_core.training.run_data import RunData
from inl_core.training.trainer import Trainer

_SECONDS_BETWEEN_LINES = 10.0


def show_plan(console: Console, trainer: Trainer, data: RunData) -> None:
    """Parameters by part and the run's figures, on stderr, before the first step; a warning when the disk is small.

    The ETA comes from a timed pass over the first batch.
    """
    recipe, directory = trainer.run.recipe, trainer.run.path
    plan = plan_recipe(
        recipe,
        vocab_size=data.tokenizer.vocab_size,
        num_windows=trainer.loader.num_windows,
        world_size=trainer.world.size,
    )
    total = plan.total_parameters
    rows = [(part, count, f"{count / total:.1%}") for part, count in plan.parameters.items()]
    console.table("parameters", ("part", "number", "share"), [*rows, ("total", total, "100%")], is_data=False)
    schedule = {
        "steps": f"{plan.num_steps:,} steps, {plan.train_tokens:,} tokens, {plan.epochs:.2f} epochs",
        "compute": f"{plan.flops_per_token / 1e6:,.1f} MFLOP per token, {plan.total_flops:.2e} FLOP in all",
        "memory": f"{amount(plan.state_bytes, 'B')} weights, gradients, moments; "
        f"about {amount(plan.activation_bytes, 'B')} activations",
        "disk": f"{amount(plan.checkpoint_bytes, 'B')} a checkpoint, at most {amount(plan.disk_bytes, 'B')} kept",
    }
    for entry in trainer.optimizers.assignments:
        schedule[f"{entry.optimizer}, {entry.group}"] = f"{entry.num_parameters:,} in {entry.num_tensors} tensors"
    rows = [*schedule.items(), *_run_facts(trainer, data).items()]
    console.table("plan", ("", ""), rows, is_data=False)
    if plan.warning:
        console.warn(plan.warning)
    free = shutil.disk_usage(directory).free
    if free < plan.disk_bytes:
        console.warn(
            f"{directory}: the plan keeps up to {amount(plan.disk_bytes, 'B')} of checkpoints, {amount(free, 'B')} are "
            "free; lower training.checkpoint.keep_last or keep_every, or make room"
        )


def _run_facts(trainer: Trainer, data: RunData) -> dict[str, str]:
    """What the plan says of this session: data, processes, directory, time, and what computes."""
    recipe, device, step = trainer.run.recipe, trainer.world.device, trainer.state.step
    left = recipe.training.num_steps - step
    seconds = trainer.stepper.time_gradient() if left else 0.0
    threads = f", OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}" if "OMP_NUM_THREADS" in os.environ else ""
    facts = {
        "data": f"{data.directory}: {data.train.num_tokens:,} tokens, vocabulary {data.tokenizer.vocab_size:,}",
        "processes": f"{trainer.world.size} on {device.type}{threads}",
        "run": f"{trainer.run.path}, from step {step:,}" if step else str(trainer.run.path),
        "eta": f"{left * seconds / 60:.1f} minutes at {seconds:.3f} s a step, evaluations not counted",
    }
    return facts | {"operations": describe(trainer.run.operations)}


class TrainingView(Observer):
    """Hears a run and shows it; enter it around the training loop."""

    def __init__(self, console: Console, *, num_steps: int) -> None:
        self.console, self.num_steps, self.first_step = console, num_steps, 0
        self.start = self.last_line = time.monotonic()
        self.row: dict[str, Any] = {}
        self.evaluation, self.measured = "", {}
        self.live: Any = None

    def __enter__(self) -> "TrainingView":
        self.start = time.monotonic()
        if self.console.is_live:
            from rich.live import Live

            self.live = Live(self._panel(), console=self.console.rich_stderr, refresh_per_second=4)
            self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.live is not None:
            self.live.update(self._panel())
            self.live.stop()

    def on_metrics(self, row: dict[str, Any]) -> None:
        """Show a row: in the live view at once, as a line when the interval is over."""
        self.row = row
        self.measured |= measured_figures(row)
        if self.live is not None:
            self.live.update(self._panel())
            return
        now = time.monotonic()
        if now - self.last_line >= _SECONDS_BETWEEN_LINES or row["step"] in (1, self.num_steps):
            self.last_line = now
            self.console.info("  ".join(f"{name} {value}" for name, value in self._figures().items()))
            self.measured = {}  # not said again until it is measured again

    def on_evaluation(self, step: int, evaluation: Evaluation) -> None:
        """One line, and the score in the live view from then on."""
        self.evaluation = f"{evaluation.bits_per_byte_text} bits per byte at step {step}"
        super().on_evaluation(step, evaluation)

    def on_message(self, text: str) -> None:
        """One line, above the live view where there is one."""
        if self.live is not None:
            self.live.console.print(text, markup=False, highlight=False)
        else:
            self.console.info(text)

    def on_warning(self, text: str) -> None:
        """One line that begins with `warning:`."""
        self.console.warn(text)

    def _figures(self) -> dict[str, str]:
        """The current row as short texts."""
        if not self.row:
            return {"step": f"{self.first_step}/{self.num_steps}"}
        return row_figures(self.row, self.num_steps, self._eta(self.row["step"])) | self.measured

    def _eta(self, step: int) -> str:
        done = step - self.first_step
        return clock((time.monotonic() - self.start) / max(1, done) * (self.num_steps - step))

    def _panel(self) -> Any:
        figures = self._figures() | ({"validation": self.evaluation} if self.evaluation else {})
        return panel(self.row.get("step", self.first_step), self.num_steps, figures)
