"""The recipes that come with the package, which a name alone stands for: `inl train tiny`.

- A path always is a path: `./tiny`, `tiny.yaml`, and `tiny` where a file of that name lies here. Only a bare name that
  is no file is looked up. A file `tiny.yaml` beside it is not what `tiny` names; who has both is told.
"""

import re
import warnings
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from inl_core.errors import RecipeError, RecipeWarning
from inl_core.files import expand_home


@dataclass(frozen=True)
class ShippedRecipe:
    """One line of the list of shipped recipes."""

    name: str
    preset: str
    size: str
    """d_model x layers."""
    about: str
    """The first sentence of the file's comments."""
    path: Path


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package, be it installed or a checkout of the repository."""
    here = Path(__file__).resolve().parent
    for directory in (here / "shipped", here.parents[1] / "recipes"):
        if found := sorted(directory.glob("*.yaml")):
            return {path.stem: path for path in found}
    return {}


def find_recipe(given: str | Path) -> Path:
    """The file that a user means by a path or by the name of a shipped recipe.

    A RecipeWarning says which one is taken where there are two that could be meant.
    """
    path = expand_home(given)
    # Path drops a leading ./, so only the text as it was given tells `./tiny` from `tiny`.
    is_name = not path.suffix and str(given) == path.name
    shipped = shipped_recipes().get(path.name) if is_name else None
    if shipped is None:
        return path
    if path.is_file() or path.is_fifo():
        warnings.warn(f"{path}: the file here, not the shipped recipe of that name", RecipeWarning, stacklevel=2)
        return path
    if (beside := path.with_suffix(".yaml")).is_file():
        warnings.warn(
            f"{path}: the shipped recipe, not the file here; name that one {beside}", RecipeWarning, stacklevel=2
        )
    return shipped


def describe_shipped() -> list[ShippedRecipe]:
    """The shipped recipes with their preset and size, the small ones first."""
    from inl_core.recipe.load import load_recipe

    found = []
    for name, path in shipped_recipes().items():
        model = load_recipe(path).model
        size = (model.d_model * model.d_model * model.num_layers, name)
        found.append(
            (size, ShippedRecipe(name, model.preset, f"{model.d_model} x {model.num_layers}", _about(path), path))
        )
    return [recipe for _, recipe in sorted(found, key=lambda pair: pair[0])]


def copy_shipped(name: str, target: Path | None) -> Path:
    """Copy a shipped recipe to a file that does not exist yet, and return its path.

    Args:
        target: the file, or a directory to put NAME.yaml into; None is the working directory.

    Raises:
        RecipeError: there is no such recipe, or the file exists: nothing is ever overwritten.
        OSError: it cannot be written.
    """
    recipes = shipped_recipes()
    if name not in recipes:
        near = get_close_matches(name, recipes, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "; `inl recipe list` names them"
        raise RecipeError(f"{name}: no shipped recipe{hint}")
    path = Path() if target is None else target
    path = path / f"{name}.yaml" if path.is_dir() else path
    text = recipes[name].read_text(encoding="utf-8")
    # The copy is run by its path; the schema lies beside the shipped file only.
    text = re.sub(rf"(?m)^(# .*\btrain ){re.escape(name)}$", lambda found: f"{found[1]}{path}", text)
    text = re.sub(r"(?m)^# yaml-language-server:.*\n", "", text)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(f"{path}: exists already and is left as it is; name another file") from None
    return path


def _about(path: Path) -> str:
    """The first sentence of the comments that follow the commands in a shipped recipe."""
    comments = path.read_text(encoding="utf-8").split("\n#\n", 1)[1].split("# yaml-language-server", 1)[0]
    text = " ".join(line.removeprefix("#").strip() for line in comments.splitlines())
    return re.split(r"(?<=[.]) (?=[A-Z`])", text, maxsplit=1)[0].removeprefix("`inl plan`: ").strip()
