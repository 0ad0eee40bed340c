"""`inl eval --tasks`: run lm-eval's tasks, show what they came to, and keep it in the run."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from inl_cli.console import Console

if TYPE_CHECKING:
    from inl_core.inference.loading import LoadedModel
    from inl_core.interop.harness import TaskSettings


def run_tasks(console: Console, loaded: "LoadedModel", names: Sequence[str], settings: "TaskSettings") -> None:
    """Run the tasks, print the result, and keep it in the run unless only a part of the examples was scored."""
    from inl_core.interop.harness import run_tasks as run
    from inl_core.interop.harness import save_results

    with console.progress() as progress:
        started = ""

        def told(what: str, done: int, total: int) -> None:
            nonlocal started
            if what != started:
                progress.start("running tasks", what)
                started = what
            progress.update(done, total)

        results = run(loaded, names, settings, progress=told)
    file = save_results(loaded, results) if settings.limit is None else None
    data = {
        "checkpoint": loaded.path,
        "step": loaded.step,
        "lm_eval": results.lm_eval,
        "tasks": results.tasks,
        "limit": settings.limit,
        "seconds": results.seconds,
        "file": file,
    }
    console.result(data, lambda: _show(console, data))
    if file is not None:
        console.info(f"kept in {file}")


def _show(console: Console, data: dict[str, Any]) -> None:
    rows = [
        (
            name if number == 0 else "",
            metric.name if metric.filter == "none" else f"{metric.name}, {metric.filter}",
            metric.value,
            metric.stderr,
            result.examples if number == 0 else "",
            result.num_fewshot if number == 0 else "",
        )
        for name, result in data["tasks"].items()
        for number, metric in enumerate(result.metrics)
    ]
    limited = f", the first {data['limit']:,} examples" if data["limit"] else ""
    title = f"{data['checkpoint']} on tasks of lm-eval {data['lm_eval']}{limited}"
    console.table(title, ("task", "metric", "score", "stderr", "examples", "few-shot"), rows)
