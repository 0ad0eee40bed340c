"""Find, verify and open what training leaves behind: runs, checkpoints, and the model inside one.

- Weights alone are read here: evaluation, generation and inspection need no optimizer.
- Everything is verified before it is used; what fails says which file and what to do.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError
from inl_core.inference.finite import first_nonfinite
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import ModelConfig
from inl_core.recipe.problems import find_problems

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to evaluate, its tokenizer, and where it came from."""

    model: IntegratorLanguageModel
    tokenizer: Tokenizer
    path: Path
    config: dict[str, Any]
    """The checkpoint's config.json."""

    @property
    def step(self) -> int:
        """Optimizer steps it was trained for."""
        return checkpoint_step(self.path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checkpoint_step(path: Path) -> int:
    """The step in a checkpoint's name."""
    digits = path.name.removeprefix("step-")
    return int(digits) if digits.isdigit() else 0


def list_checkpoints(parent: Path) -> list[Path]:
    """The directories named step-N below `parent`, by step, valid or not."""
    found = [path for path in parent.glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=checkpoint_step)


def verify_checkpoint(path: Path, *, contents: bool = True) -> dict[str, Any]:
    """The manifest of an intact checkpoint; ArtefactError names the first thing that is wrong.

    `contents` False looks at sizes alone, not at checksums and at whether the weights are finite.
    """
    manifest_path = path / MANIFEST
    if not path.is_dir():
        raise ArtefactError(f"{path}: no such checkpoint")
    if not manifest_path.is_file():
        raise ArtefactError(f"{path}: has no {MANIFEST}, so the save never finished; use an earlier checkpoint")
    try:
        manifest = json.loads(manifest_path.read_text())
        entries = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtefactError(f"{manifest_path}: damaged ({error}); use an earlier checkpoint") from error
    for name, (size, digest) in entries.items():
        file = path / name
        if not file.is_file():
            raise ArtefactError(f"{file}: missing; use an earlier checkpoint")
        if file.stat().st_size != size:
            raise ArtefactError(
                f"{file}: {file.stat().st_size} bytes where the manifest says {size}, truncated or changed; "
                "use an earlier checkpoint"
            )
        if contents and file_digest(file) != digest:
            raise ArtefactError(f"{file}: its checksum is wrong, the file is damaged; use an earlier checkpoint")
    if contents:
        _check_finite(path / "model.safetensors")
    return manifest


def _check_finite(file: Path) -> None:
    """ArtefactError when a weight is NaN or infinite; one tensor at a time is in memory."""
    try:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  (not a mapping)
                if first_nonfinite({name: weights.get_tensor(name)}):
                    raise ArtefactError(
                        f"{file}: {name} holds NaN or infinity, the training had failed; use an earlier checkpoint"
                    )
    except (SafetensorError, OSError) as error:
        raise ArtefactError(f"{file}: cannot be read ({error}); use an earlier checkpoint") from None


def find_checkpoint(
    path: Path | None, runs: Path = Path("runs"), note: Callable[[str], None] = lambda text: None
) -> Path:
    """A checkpoint from what a user names: a checkpoint, a run, or nothing (the newest run's newest valid one).

    `note` hears what was chosen and what was passed over; the result is verified.
    """
    if path is None:
        path = _newest_run(runs)
    if not path.exists():
        hint = f"; did you mean {runs / path}?" if (runs / path).is_dir() else ""
        raise ArtefactError(f"{path}: no such run or checkpoint{hint}")
    if (path / MANIFEST).is_file() or path.name.startswith("step-"):
        verify_checkpoint(path)
        return path
    parent = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    for candidate in reversed(list_checkpoints(parent)):
        try:
            verify_checkpoint(candidate)
        except ArtefactError as error:
            note(f"skipped: {error}")
        else:
            note(f"using {candidate}")
            return candidate
    raise ArtefactError(f"{path}: holds no intact checkpoint; `inl train RECIPE` makes one")


def _newest_run(runs: Path) -> Path:
    """The run with the newest checkpoint below `runs`."""
    candidates = [path for path in runs.glob("*/checkpoints/step-*") if (path / MANIFEST).is_file()]
    if not candidates:
        raise ArtefactError(f"{runs}/: no run with a checkpoint here; name one, or train with `inl train RECIPE`")
    return max(candidates, key=lambda path: (path / MANIFEST).stat().st_mtime).parent.parent


def load_model(path: Path, device: torch.device | str = "cpu") -> LoadedModel:
    """The model and tokenizer of a verified checkpoint, in evaluation mode."""
    config = read_json(path / "config.json")
    model_config = read_model_config(path, config)
    tokenizer = _load_tokenizer(path, config, model_config)
    return LoadedModel(load_weights(path, model_config, device), tokenizer, path, config)


def _load_tokenizer(path: Path, config: dict[str, Any], model_config: ModelConfig) -> Tokenizer:
    """The checkpoint's tokenizer, which must be the one its model was trained with."""
    if config.get("tokenizer", "") is None:
        raise ArtefactError(
            f"{path}: was imported without a tokenizer, so it cannot read or write text; "
            "import it again with --tokenizer FILE"
        )
    tokenizer = Tokenizer.load(path / "tokenizer.json")
    if tokenizer.vocab_size != model_config.vocab_size:
        raise ArtefactError(
            f"{path / 'tokenizer.json'}: has {tokenizer.vocab_size} tokens where the model has "
            f"{model_config.vocab_size}; put back the tokenizer the model was trained with"
        )
    if config.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise ArtefactError(
            f"{path / 'tokenizer.json'}: is not the tokenizer that config.json names, so its tokens mean something "
            "else; put back the tokenizer the model was trained with"
        )
    return tokenizer


def load_weights(path: Path, model_config: ModelConfig, device: torch.device | str = "cpu") -> IntegratorLanguageModel:
    """The model of a verified checkpoint without its tokenizer, in evaluation mode."""
    with torch.device("meta"):
        model = IntegratorLanguageModel(model_config)
    model.to_empty(device=device)
    model.reset_buffers()
    weights = load_file(path / "model.safetensors", device=str(device))
    try:
        problems = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # a tensor of another shape; torch's own first line says only that there is one
        reason = str(error).split("\n\t")[-1].strip()
        raise ArtefactError(f"{path / 'model.safetensors'}: does not fit config.json ({reason})") from error
    if problems.missing_keys or problems.unexpected_keys:
        wrong = [*problems.missing_keys, *problems.unexpected_keys][0]
        raise ArtefactError(f"{path / 'model.safetensors'}: does not fit config.json (first difference: {wrong})")
    return model.eval()


def read_model_config(path: Path, config: dict[str, Any]) -> ModelConfig:
    """The model section of a checkpoint's config.json, or an ArtefactError that names the first wrong key."""
    try:
        return ModelConfig.model_validate(config["model"])
    except KeyError:
        problem = "it has no 'model'"
    except ValidationError as error:
        key, message = next(iter(find_problems(error, ModelConfig).items()))
        problem = f"{'.'.join(('model', *map(str, key)))}: {message}"
    raise ArtefactError(f"{path / 'config.json'}: not a model configuration this version knows ({problem})")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or an ArtefactError."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ArtefactError(f"{path}: missing") from error
    except ValueError as error:
        raise ArtefactError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(value, dict):
        raise ArtefactError(f"{path}: not a JSON object")
    return value
