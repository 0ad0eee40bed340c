"""Tasks of lm-eval, the harness of published benchmarks, run on our models in this process."""

from inl_core.interop.harness.folder import check_folder
from inl_core.interop.harness.running import (
    Metric,
    TaskResult,
    TaskResults,
    require_harness,
    run_tasks,
    save_results,
)
from inl_core.interop.harness.settings import TaskSettings

__all__ = [
    "Metric",
    "TaskResult",
    "TaskResults",
    "TaskSettings",
    "check_folder",
    "require_harness",
    "run_tasks",
    "save_results",
]
