"""Our models in lm-eval, the harness of published benchmarks: `inl eval --tasks`.

    results = run_tasks(loaded, ["arc_easy"], settings)      # results.tasks["arc_easy"].metrics

- The requests are lm-eval's, and so are prompts, metrics and the order of the examples; model.py answers them. A text
  begins with the begin token, as in training.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from inl_core.analysis.report.tasks import results_path
from inl_core.errors import InlError, RecipeError
from inl_core.files import read_json, write_whole
from inl_core.inference.loading import LoadedModel
from inl_core.interop.harness.folder import check_folder, no_code_from_tasks
from inl_core.interop.harness.settings import Progress, TaskSettings
from inl_core.recipe.problems import did_you_mean


@dataclass(frozen=True)
class Metric:
    """One number of a task."""

    name: str
    filter: str
    """Which of the task's ways to read an answer; mostly `none`."""
    value: float
    stderr: float | None


@dataclass(frozen=True)
class TaskResult:
    """What a task, or a group of tasks, came to."""

    version: str | None
    num_fewshot: int | None
    examples: int | None
    """How many were scored; None for a group."""
    metrics: tuple[Metric, ...]


@dataclass(frozen=True)
class TaskResults:
    """What `run_tasks` found."""

    tasks: dict[str, TaskResult]
    lm_eval: str
    seconds: float


def require_harness() -> None:
    """RecipeError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise RecipeError('--tasks: lm-eval is not installed; pip install "inl[eval]"')


def run_tasks(
    loaded: LoadedModel,
    names: Sequence[str],
    settings: TaskSettings = TaskSettings(),
    *,
    progress: Progress = lambda what, done, total: None,
) -> TaskResults:
    """Run lm-eval's tasks, groups or tags of these names, or those that match a pattern with `*`.

    Raises:
        RecipeError: there is no such task, its data cannot be loaded, its file runs code that is not trusted, lm-eval
            cannot run it, or lm-eval is not installed.
        ArtefactError: something in the folder of task files cannot be read.
    """
    require_harness()
    if settings.task_path is not None:
        check_folder(settings.task_path)
    start = time.perf_counter()
    is_trusted = settings.task_path is None or settings.trust_task_code
    with _quiet(), contextlib.nullcontext() if is_trusted else no_code_from_tasks():
        import lm_eval
        from lm_eval.evaluator import simple_evaluate

        from inl_core.interop.harness.model import InlLM

        manager = _load_tasks(names, settings.task_path)
        with _one_line(names, settings.num_fewshot):
            found = simple_evaluate(
                model=InlLM(loaded, settings, progress),
                tasks=list(names),
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                task_manager=manager,
                log_samples=False,
            )
    assert found is not None
    tasks = {name: _result(name, dict(found)) for name in found.get("results", {})}
    return TaskResults(tasks, lm_eval.__version__, time.perf_counter() - start)


def save_results(loaded: LoadedModel, results: TaskResults) -> Path | None:
    """Write the results into the run that the checkpoint belongs to, beside those of other tasks.

    RUN/reports/tasks-STEP.json holds `checkpoint`, `step` and `tasks`: by name what `TaskResult` has, and lm-eval's
    version. A task that was run before is replaced.

    Returns:
        The file; None where the checkpoint lies in no run.
    """
    if loaded.path.parent.name != "checkpoints":
        return None
    path = results_path(loaded.path.parent.parent, loaded.path.name)
    path.parent.mkdir(exist_ok=True)
    before = read_json(path).get("tasks") if path.exists() else None
    tasks = before if isinstance(before, dict) else {}
    tasks |= {name: asdict(result) | {"lm_eval": results.lm_eval} for name, result in results.tasks.items()}
    record = {"checkpoint": loaded.path.name, "step": loaded.step, "tasks": tasks}
    write_whole(path, json.dumps(record, indent=1))
    return path


def _load_tasks(names: Sequence[str], task_path: Path | None) -> Any:
    """A task manager that has these tasks ready, data included."""
    from lm_eval.tasks import TaskManager

    # lm-eval's own folder has ten thousand files, which take many seconds to look through.
    manager, wanted = None, []
    for with_defaults in (False, True) if task_path else (True,):
        manager = TaskManager(
            include_path=str(task_path.resolve()) if task_path else None, include_defaults=with_defaults
        )
        wanted = [manager.match_tasks([name]) for name in names]
        if all(wanted):
            break
    assert manager is not None
    for name, matching in zip(names, wanted, strict=True):
        if not matching:
            hint = did_you_mean(name, manager.all_tasks)
            raise RecipeError(f"--tasks {name}: no such task{hint}; `lm-eval ls tasks` lists lm-eval's own")
    try:
        with contextlib.chdir(task_path) if task_path else contextlib.nullcontext():
            ready = manager.load([name for matching in wanted for name in matching])
    except (InlError, MemoryError):
        raise
    except Exception as error:  # whatever a task's file, its code and the reader of its data set may raise
        if isinstance(error, StopIteration):  # lm-eval looks at the first row
            raise RecipeError(f"--tasks {_task_of(error, names)}: the task has no rows") from None
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise RecipeError(
            f"--tasks {','.join(names)}: a task or its data cannot be loaded ({type(error).__name__}: {reason}); tasks "
            "whose data lies on this machine run without a network: --task-path DIR"
        ) from None
    manager.load = lambda task_list: ready  # type: ignore[method-assign] - or all data would be read twice
    return manager


@contextmanager
def _one_line(names: Sequence[str], num_fewshot: int | None) -> Iterator[None]:
    """What lm-eval raises while a task runs becomes a RecipeError of one line that names the task."""
    try:
        yield
    except (InlError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a task's templates, metrics and data may raise anything
        task, reason = _task_of(error, names), next(iter(str(error).splitlines()), "")
        if any(sign in reason for sign in ("Sample larger than population", "fewshot samples requested exceeds")):
            shots = "its num_fewshot" if num_fewshot is None else f"--num-fewshot {num_fewshot}"
            raise RecipeError(f"{shots}: the task {task} has fewer solved examples than that; ask for fewer") from None
        raise RecipeError(
            f"--tasks {task}: lm-eval cannot run the task ({type(error).__name__}: {reason}); mend its file or its data"
        ) from None


def _task_of(error: Exception, names: Sequence[str]) -> str:
    """The name of the task that raised an error; where no method of a task did, the names that were asked for."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        config = getattr(frame.f_locals.get("self"), "config", None)
        if isinstance(name := getattr(config, "task", None), str):
            return name
    return ",".join(names)


def _result(name: str, found: dict[str, Any]) -> TaskResult:
    values = found["results"][name]
    metrics = []
    for key, value in values.items():
        metric, comma, filter = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = values.get(f"{metric}_stderr,{filter}")
            metrics.append(Metric(metric, filter, float(value), error if isinstance(error, float) else None))
    shots, examples = found.get("n-shot", {}).get(name), found.get("n-samples", {}).get(name, {})
    version = found.get("versions", {}).get(name)
    return TaskResult(None if version is None else str(version), shots, examples.get("effective"), tuple(metrics))


@contextmanager
def _quiet() -> Iterator[None]:
    """lm-eval and datasets without the bars that they draw themselves, and without remarks."""
    import datasets
    import lm_eval.api.task as task_module
    import lm_eval.evaluator as evaluator
    import tqdm

    logger, drawn, had_bars = logging.getLogger("lm_eval"), tqdm.tqdm, not datasets.are_progress_bars_disabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    hidden = functools.partial(drawn, disable=True)
    try:
        with (
            patch.object(tqdm, "tqdm", hidden),
            patch.object(task_module, "tqdm", hidden),
            patch.object(evaluator, "get_git_commit_hash", lambda: None),  # of whatever is in the working directory
        ):
            yield
    finally:
        logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()
