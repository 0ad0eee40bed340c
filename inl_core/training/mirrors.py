"""Two services that show the rows of metrics.jsonl too: TensorBoard and Weights & Biases.

Both come with `pip install "inl[logging]"`. `check_mirrors` finds what is missing before anything is prepared.
"""

import netrc
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from inl_core.errors import RecipeError
from inl_core.recipe import Recipe

Mirror = Callable[[int, dict[str, float]], None]
"""Is called with a step and its figures by name."""

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


def open_mirrors(run: Path, recipe: Recipe) -> dict[str, Mirror]:
    """The recipe's mirrors by name, for the run in the directory `run`.

    Raises:
        RecipeError: one cannot be opened.
    """
    logging, mirrors = recipe.training.logging, {}
    if logging.tensorboard:
        mirrors["tensorboard"] = _tensorboard(run)
    if logging.wandb:
        mirrors["wandb"] = _wandb(run, recipe)
    return mirrors


def one_line(error: BaseException) -> str:
    """The message of an error that may have several lines, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _tensorboard(run: Path) -> Mirror:
    writer = _import("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(run / "tensorboard"))

    def mirror(step: int, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            writer.add_scalar(key, value, step)

    return mirror


def _wandb(run: Path, recipe: Recipe) -> Mirror:
    wandb, config = _import("wandb", "wandb"), recipe.model_dump(mode="json")
    try:
        session = wandb.init(project="inl", name=run.name, dir=str(run), config=config, resume="allow")
    except Exception as error:  # its errors have no common base class but Exception
        raise RecipeError(
            f"training.logging.wandb: {one_line(error)}; `wandb login` again, or set WANDB_MODE=offline"
        ) from None
    return lambda step, figures: session.log(figures, step=step)


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
