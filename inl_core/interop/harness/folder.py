"""Folders of task files that someone brings (`--task-path`): what is checked before lm-eval reads them, and how they
are kept from running code.

- To lm-eval a task file is a program: `!function` names Python code, a template reaches all of Python through the
  objects it is given, and a metric that lm-eval does not have is a script that the library `evaluate` runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from inl_core.errors import RecipeError
from inl_core.files import is_directory, open_regular

TRUST = "--trust-task-code"


def check_folder(folder: Path) -> None:
    """Check that everything in a folder of task files can be read.

    Raises:
        RecipeError: there is no such directory.
        ArtefactError: something in it is a FIFO or a device, which would never end, or a file that cannot be read.
    """
    if not is_directory(folder):
        raise RecipeError(f"--task-path {folder}: no such directory")
    for path in sorted(folder.rglob("*")):
        if path.exists() and not is_directory(path):  # lm-eval passes over links that lead nowhere
            open_regular(path).close()


@contextmanager
def no_code_from_tasks() -> Iterator[None]:
    """Within it, lm-eval runs no Python code but its own, whatever a task file says.

    What a file asks for beyond that raises RecipeError. Templates run in jinja's sandbox.
    """
    import lm_eval.api.task as task_module
    import lm_eval.utils as utils
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval.api.registry import metric_registry
    from lm_eval.tasks import _yaml_loader

    own = Path(_yaml_loader.__file__).resolve().parent
    import_function, get_metric = _yaml_loader._import_func_in_yml, task_module.get_metric

    def import_own(name: str, directory: Path) -> Callable[..., Any]:
        if not directory.resolve().is_relative_to(own):
            raise RecipeError(
                f"{directory}: a task file there runs Python code (!function {name}); if you trust it: {TRUST}"
            )
        return import_function(name, directory)

    def own_metric(name: str, hf_evaluate_metric: bool = False) -> Callable[..., Any] | None:
        if hf_evaluate_metric or name not in metric_registry:
            raise RecipeError(
                f"--task-path: the metric {name!r} is not lm-eval's but a script of Hugging Face's evaluate; if you "
                f"trust it: {TRUST}"
            )
        return get_metric(name)

    class Sandbox(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise RecipeError(
                f"--task-path: a template in a task file reaches for {attribute!r} of a {type(obj).__name__}, "
                f"which the sandbox does not allow; if you trust it: {TRUST}"
            )

    sandbox = Sandbox(loader=utils.env.loader, undefined=utils.env.undefined, keep_trailing_newline=True)
    sandbox.filters.update(utils.env.filters)
    with (
        patch.object(utils, "env", sandbox),
        patch.object(_yaml_loader, "_import_func_in_yml", import_own),
        patch.object(task_module, "get_metric", own_metric),
    ):
        yield
