"""Two services that show the rows of metrics.jsonl too: TensorBoard and Weights & Biases.

- Both come with `pip install "inl[logging]"`. `check_mirrors` finds what is missing before anything is prepared.
- A session that resumes a run gives a mirror all rows of metrics.jsonl that it may lack, since a killed session's last
  rows may not have left the process, and takes back those after the checkpoint: each step is there once.
"""

import netrc
import os
import secrets
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from inl_core.errors import RecipeError
from inl_core.files import write_whole
from inl_core.recipe import Recipe

_OFFLINE = ("offline", "disabled", "dryrun")
_HOST = "https://api.wandb.ai"


def check_mirrors(recipe: Recipe) -> None:
    """Check, at next to no cost, that the recipe's mirrors have what they need.

    Raises:
        RecipeError: a package is not installed, or Weights & Biases has no key and is not offline.
    """
    logging = recipe.training.logging
    if logging.tensorboard:
        _import("tensorboard", "tensorboard")
    if logging.wandb and not _wandb_can_log():
        raise RecipeError(
            "training.logging.wandb: no API key; run `wandb login` or set WANDB_API_KEY, or set WANDB_MODE=offline to "
            "keep the figures on this machine"
        )


class Mirror(Protocol):
    """A service that is given the rows of a run."""

    def write(self, step: int, figures: dict[str, float], seconds: float | None) -> None:
        """Show the figures of a step by name; `seconds` is when they were written, by the system's clock."""
        ...

    def close(self) -> None:
        """Bring what was written to where it is kept."""
        ...


def open_mirrors(run: Path, recipe: Recipe) -> dict[str, Mirror]:
    """The recipe's mirrors by name, for the run in the directory `run`.

    Raises:
        RecipeError: one cannot be opened.
    """
    logging = recipe.training.logging
    mirrors: dict[str, Mirror] = {}
    if logging.tensorboard:
        mirrors["tensorboard"] = _TensorBoard(run)
    if logging.wandb:
        mirrors["wandb"] = _WeightsAndBiases(run, recipe)
    return mirrors


def one_line(error: BaseException) -> str:
    """The message of an error that may have several lines, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


class _TensorBoard:
    """A new file of events, before which all older ones of the run count as purged."""

    def __init__(self, run: Path) -> None:
        module = _import("torch.utils.tensorboard", "tensorboard")
        self.writer = module.SummaryWriter(str(run / "tensorboard"), purge_step=0)
        self.last_steps: dict[str, int] = {}

    def write(self, step: int, figures: dict[str, float], seconds: float | None) -> None:
        for key, value in figures.items():
            if self.last_steps.get(key) != step:  # the rows of a step and of its evaluation both have its tokens
                self.writer.add_scalar(key, value, step, walltime=seconds)
                self.last_steps[key] = step

    def close(self) -> None:
        self.writer.close()


class _WeightsAndBiases:
    """The run of the same id as in all sessions; what its server has already is not sent again."""

    def __init__(self, run: Path, recipe: Recipe) -> None:
        wandb, logging = _import("wandb", "wandb"), recipe.training.logging
        try:
            self.session = wandb.init(
                id=_wandb_id(run),
                resume="allow",
                project=logging.wandb_project,
                entity=logging.wandb_entity,
                group=logging.wandb_group,
                tags=logging.wandb_tags,
                name=run.name,
                dir=str(run),
                config=recipe.model_dump(mode="json"),
            )
        except Exception as error:  # its errors have no common base class but Exception
            raise RecipeError(
                f"training.logging.wandb: {one_line(error)}; `wandb login` again, or set WANDB_MODE=offline"
            ) from None
        self.first_step: int = self.session.starting_step  # `step` is 0 until a row is logged
        """The first step that the server has not; 0 for a new run, and offline."""

    def write(self, step: int, figures: dict[str, float], seconds: float | None) -> None:
        # The service takes no step after a later one. Those it has are of a session that trained the same steps.
        if step >= self.first_step:
            self.session.log(figures, step=step)

    def close(self) -> None:
        self.session.finish()


def _wandb_id(run: Path) -> str:
    """The id that a run has in W&B: made once, and kept beside the run's other files."""
    path = run / "wandb-id"
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    made = secrets.token_hex(8)
    write_whole(path, f"{made}\n")
    return made


def _wandb_can_log() -> bool:
    """Whether W&B is offline, or finds a key where it looks for one; the user is not asked, and nothing is sent."""
    settings = _wandb_settings(_import("wandb", "wandb"))
    if os.environ.get("WANDB_MODE") in _OFFLINE or getattr(settings, "mode", None) in _OFFLINE:
        return True
    if any(os.environ.get(name) for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")):
        return True
    address = getattr(settings, "base_url", None) or os.environ.get("WANDB_BASE_URL") or _HOST
    return urlsplit(address).hostname in _netrc_hosts()


def _wandb_settings(wandb: Any) -> Any:
    """The settings that W&B reads from its files and the environment, or None when it cannot read them."""
    try:
        return wandb.setup().settings
    except Exception:  # `wandb.init` meets the same error, and its message is shown then
        return None


def _netrc_hosts() -> set[str]:
    """The hosts that the user's netrc file knows a password for."""
    named = os.environ.get("NETRC")
    hosts: set[str] = set()
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            hosts |= netrc.netrc(str(path)).hosts.keys()
        except (OSError, netrc.NetrcParseError, UnicodeDecodeError):
            continue
    return hosts


def _import(module: str, key: str) -> Any:
    """A module of an optional package; RecipeError names the recipe's key that wants it when it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        raise RecipeError(f'training.logging.{key}: not installed; pip install "inl[logging]"') from None
