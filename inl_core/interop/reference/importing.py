"""A reference safetensors file -> a checkpoint directory that every command reads.

- Names, shapes and arguments are checked before any weight is read, and nothing is written before all of it is right.
- Not everything is in the file: iterations, and often heads and context, are arguments. `Imported.warnings` says which
  of them could not be checked.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from inl_core.corpus.chat_template import tokenizer_config
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import ArtefactError, RecipeError
from inl_core.files import is_directory, refuse_filled
from inl_core.inference.checkpoint_files import TOKENIZER_CONFIG, file_digest
from inl_core.inference.loading import check_tables
from inl_core.inference.tensor_files import open_tensors, read_shapes, read_tensor
from inl_core.interop.reference.budget import find_allocator, layer_iterations
from inl_core.interop.reference.conversion import build_config, convert
from inl_core.interop.reference.layout import GROUP_SIZE, ROTARY_BASE, Generation, Layout, read_layout
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import ModelConfig
from inl_core.recipe.problems import dotted, find_problems
from inl_core.training.checkpoint_writing import save_weights

DEFAULT_MAX_SEQ_LEN = 1024
_WRAPPER = "model."
_TABLE_ROUNDING = 0.02
"""Relative error of a rotary table, which may have been stored in bfloat16."""
CHAT_TOKENS = ("<USER>", "<ASSISTANT>", "<SYSTEM>", "<ERROR>")
"""What the released models have after GPT-2's tokens, as ids 50257 to 50260."""
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<' + message['role'] | upper + '> ' + message['content'] }}"
    "{% endfor %}"
    "{{ '<ASSISTANT>' if add_generation_prompt }}"
)
"""The released template as transformers fills it in, without the line ends that it has between messages. It has no
prompt for an answer; ours is what stands before one."""


@dataclass(frozen=True)
class Imported:
    """What was made of a file."""

    checkpoint: Path
    source: Path
    sha256: str
    generation: Generation
    config: ModelConfig
    used: tuple[str, ...]
    """The file's tensors that the model is made of, by name."""
    skipped: dict[str, str]
    """Its other tensors, and why they are not needed."""
    warnings: tuple[str, ...]


def import_reference(
    file: Path,
    output: Path,
    *,
    iterations: tuple[int, ...],
    num_heads: int | None = None,
    num_kv_heads: int | None = None,
    max_seq_len: int | None = None,
    group_size: int | None = None,
    rope_theta: float | None = None,
    tokenizer: Path | None = None,
) -> Imported:
    """Write the model of `file` as a checkpoint at `output`.

    Args:
        iterations: T, one number or one for each layer. From one number and the state of the reference's budget
            allocator, where the file has it, each layer's number is computed (budget.py).
        num_heads: query heads; None takes the head size of the file's rotary tables.
        num_kv_heads: key-value heads; follows from the other two, and is checked when given.
        max_seq_len: context in tokens; None takes the length of the file's tables of positions, else 1,024.
        group_size: dimensions that share an offset of mu; None takes the reference's 64, or what the file allows.
        rope_theta: base of the rotary frequencies; None takes that of the file's tables, else 10,000.
        tokenizer: a tokenizer.json; without one the checkpoint cannot be given text.

    Raises:
        RecipeError: an argument does not fit the file, or `output` is not empty.
        ArtefactError: the file or the tokenizer is missing, damaged or not what it should be.
    """
    refuse_filled(output)
    options = {"num-heads": num_heads, "num-kv-heads": num_kv_heads, "max-seq-len": max_seq_len}
    for name, value in (options | {"group-size": group_size, "rope-theta": rope_theta}).items():
        if value is not None and not 1 <= value < float("inf"):
            raise RecipeError(f"--{name} {value}: must be at least 1")
    if not os.path.lexists(file):
        raise ArtefactError(f"{file}: no such file")
    if is_directory(file):
        raise ArtefactError(f"{file}: is a directory; name the .safetensors file in it")
    with open_tensors(file) as opened:
        tensors = _Unwrapped(opened)
        layout = read_layout(file, read_shapes(tensors), group_size)
        rope_theta = _rotary_base(file, layout, tensors, rope_theta)
        heads, kv_heads = choose_heads(file, layout, num_heads=num_heads, num_kv_heads=num_kv_heads)
        with _within_bounds(file, is_asked=max_seq_len is not None):
            config = build_config(
                layout,
                num_heads=heads,
                num_kv_heads=kv_heads,
                iterations=_iterations_of_layers(file, iterations, layout, tensors),
                rope_theta=rope_theta,
                max_seq_len=max_seq_len or layout.max_seq_len or DEFAULT_MAX_SEQ_LEN,
            )
        own_tokenizer, remarks = load_tokenizer(tokenizer, layout.vocab_size)
        digest = file_digest(file)
        model, used = load_reference(file, layout, config, tensors)
    warnings = (*_unchecked(layout, config, iterations, max_seq_len), *remarks)
    imported = Imported(output, file, digest, layout.generation, config, used, layout.skipped, warnings)
    save_weights(output, model, _files(imported, own_tokenizer))
    return imported


class _Unwrapped:
    """The tensors of an open file, without the `model.` before all names that the reference's own class for
    transformers writes there."""

    def __init__(self, tensors: Any) -> None:
        self._tensors, names = tensors, tensors.keys()
        self._prefix = _WRAPPER if all(name.startswith(_WRAPPER) for name in names) else ""

    def keys(self) -> list[str]:
        return [name.removeprefix(self._prefix) for name in self._tensors.keys()]  # noqa: SIM118

    def get_slice(self, name: str) -> Any:
        return self._tensors.get_slice(self._prefix + name)

    def get_tensor(self, name: str) -> Tensor:
        return self._tensors.get_tensor(self._prefix + name)


@contextmanager
def _within_bounds(file: Path, *, is_asked: bool) -> Iterator[None]:
    """A model outside the limits of recipes is one line: about an option where it caused it, else about the file.

    Args:
        is_asked: whether the context's length was given as an option.
    """
    try:
        yield
    except ValidationError as error:
        key, message = next(iter(find_problems(error, ModelConfig).items()))
        if "num_iterations" in key or (is_asked and "max_seq_len" in key):
            raise RecipeError(f"--{'iterations' if 'num_iterations' in key else 'max-seq-len'}: {message}") from None
        raise ArtefactError(f"{file}: {dotted(key)}: {message}") from None


def choose_heads(file: Path, layout: Layout, *, num_heads: int | None, num_kv_heads: int | None) -> tuple[int, int]:
    """Numbers of query and key-value heads, from the arguments, the rotary tables and the key projection's rows."""
    dim, rows = layout.d_model, layout.key_value_dim
    heads_of_tables = dim // layout.head_dim if layout.head_dim else None
    heads = num_heads or heads_of_tables
    if heads is None:
        raise RecipeError(f"{file}: does not hold the number of heads; give --num-heads, a divisor of {dim}")
    if dim % heads:
        raise RecipeError(f"--num-heads {heads}: must divide the file's d_model of {dim}")
    size = dim // heads
    if layout.head_dim and size != layout.head_dim:
        raise RecipeError(
            f"--num-heads {heads}: the rotary tables in {file} are for heads of {layout.head_dim}, "
            f"which means {heads_of_tables}; leave the option out"
        )
    if layout.generation == "released" and size % 2:
        raise RecipeError(f"--num-heads {heads}: heads of {size} cannot have rotary positions, which need an even size")
    if rows % size or heads % (rows // size):
        raise RecipeError(
            f"--num-heads {heads}: heads of {size} do not divide the {rows} rows of k_proj in {file} "
            "into key-value heads that divide the query heads"
        )
    if num_kv_heads is not None and num_kv_heads != rows // size:
        raise RecipeError(
            f"--num-kv-heads {num_kv_heads}: with {heads} heads of {size} the {rows} rows of keys in {file} are "
            f"{rows // size} heads; leave the option out, or correct --num-heads"
        )
    return heads, rows // size


def spread_iterations(iterations: tuple[int, ...], num_layers: int) -> tuple[int, ...]:
    """One number of iterations for each layer."""
    given = ",".join(map(str, iterations))
    if not iterations or min(iterations) < 1:
        raise RecipeError(f"--iterations {given}: must be whole numbers from 1 up")
    if len(iterations) not in (1, num_layers):
        raise RecipeError(
            f"--iterations {given}: {len(iterations)} numbers for the file's {num_layers} layers; "
            "give one, or one for each layer"
        )
    return iterations * num_layers if len(iterations) == 1 else iterations


def _iterations_of_layers(file: Path, given: tuple[int, ...], layout: Layout, tensors: Any) -> tuple[int, ...]:
    """What was given for each layer, or what the file's budget allocator makes of one number."""
    spread = spread_iterations(given, layout.num_layers)
    allocator = find_allocator(layout.skipped)
    if allocator is None or len(given) != 1:
        return spread

    def read(name: str) -> Tensor | None:
        if allocator + name not in layout.skipped:
            return None
        found = _read_finite(file, allocator + name, tensors).reshape(-1)
        if len(found) not in (1, layout.num_layers):
            raise ArtefactError(f"{file}: {allocator}{name} has {len(found)} values for {layout.num_layers} layers")
        return found.expand(layout.num_layers)

    return layer_iterations(given[0], layout.num_layers, read)


def load_tokenizer(path: Path | None, vocab_size: int) -> tuple[Tokenizer | None, list[str]]:
    """The tokenizer, filled up with unused tokens to the embedding's number of rows, and warnings about it."""
    if path is None:
        return None, ["no tokenizer: inl inspect works, but generate, eval and inspect-params need --tokenizer FILE"]
    tokenizer = Tokenizer.load(path)
    unused = vocab_size - tokenizer.vocab_size
    if unused == 0:
        return tokenizer, []
    if unused < 0:
        raise ArtefactError(
            f"{path}: has {tokenizer.vocab_size:,} tokens where the model's embedding has {vocab_size:,} rows; "
            "name the tokenizer the model was trained with"
        )
    # The released embedding has exactly these rows more than GPT-2's tokenizer has tokens.
    names: tuple[str, ...] = (
        CHAT_TOKENS if unused == len(CHAT_TOKENS) and not tokenizer.special_ids.keys() & set(CHAT_TOKENS) else ()
    )
    padded = None if tokenizer.has_gaps else tokenizer.padded(vocab_size, names)
    if padded is None or padded.vocab_size != vocab_size:
        raise ArtefactError(
            f"{path}: its ids have gaps, so it cannot be extended to the embedding's {vocab_size:,} rows; "
            "name a tokenizer without gaps"
        )
    what = ", ".join(names) if names else "unused tokens"
    return padded, [f"{path}: {unused:,} tokens were added to match the embedding's {vocab_size:,} rows: {what}"]


def load_reference(
    file: Path, layout: Layout, config: ModelConfig, tensors: Any
) -> tuple[IntegratorLanguageModel, tuple[str, ...]]:
    """The model on the CPU in float32, and the names of the tensors it was filled from."""
    with torch.device("meta"):
        model = IntegratorLanguageModel(config)
    check_tables(file, model)
    model.to_empty(device="cpu")
    model.reset_buffers()
    used: list[str] = []

    def read(name: str) -> Tensor:
        used.append(name)
        return _read_finite(file, name, tensors)

    missing = model.state_dict()
    with torch.no_grad():
        for name, tensor in convert(layout, read):
            place = missing.pop(name)
            assert place.shape == tensor.shape, name
            place.copy_(tensor)
        model.excitation_amplitude.zero_()
        for integrator in model.integrators():
            integrator.excitation.initialise()  # gamma and phi, which have no effect at A = 0
    assert all("excitation" in name for name in missing), f"not filled: {missing.keys()}"
    assert sorted(used) == sorted(layout.expected), "a tensor was expected and not used"
    return model.eval(), tuple(used)


def _read_finite(file: Path, name: str, tensors: Any) -> Tensor:
    tensor = read_tensor(file, name, tensors)
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ArtefactError(f"{file}: {name} is {kind}, quantised; give the weights in a floating-point type")
    tensor = tensor.float()  # before the check, since a large float64 becomes infinite here
    if not bool(torch.isfinite(tensor).all()):
        raise ArtefactError(f"{file}: {name} holds values that are not finite; the model is broken")
    return tensor


def _rotary_base(file: Path, layout: Layout, tensors: Any, given: float | None) -> float:
    """The base of the file's rotary tables, which must all have one; without tables, what was given, or the usual one.

    Raises:
        ArtefactError: a table is none of powers of one base.
        RecipeError: another base was given than the tables have.
    """
    tables = [name for name in layout.skipped if name.endswith(".rope.inv_freq")]
    if not tables:
        return given or ROTARY_BASE
    found = {name: read_tensor(file, name, tensors).double().reshape(-1) for name in tables}
    count = len(found[tables[0]])
    # The smallest frequency is base^-((n - 1) / n), so it tells the base best.
    last = float(found[tables[0]][-1])
    measured = last ** (-count / (count - 1)) if count > 1 and 0 < last < 1 else given or ROTARY_BASE
    likely = [value for value in (given, ROTARY_BASE, float(f"{measured:.2g}")) if value and _is_near(value, measured)]
    base = [*likely, measured][0]
    for name, frequencies in found.items():
        powers = base ** (-torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies))
        if not torch.allclose(frequencies, powers, rtol=_TABLE_ROUNDING, atol=0):
            raise ArtefactError(
                f"{file}: {name} is not a table of base {base:g}, as rotary frequencies are; not supported"
            )
    if given and base != given:
        raise RecipeError(f"--rope-theta {given:g}: the tables in {file} are of base {base:g}; leave the option out")
    return base


def _is_near(value: float, measured: float) -> bool:
    return abs(value - measured) <= _TABLE_ROUNDING * measured


def _unchecked(layout: Layout, config: ModelConfig, iterations: tuple[int, ...], max_seq_len: int | None) -> list[str]:
    """Warnings about what the file does not hold and was therefore not checked."""
    assert config.integrator
    each = config.integrator.iterations_per_layer or (config.integrator.num_iterations,)
    counts = f"iterations ({', '.join(map(str, each))})"
    is_allocated = find_allocator(layout.skipped) is not None and len(iterations) == 1
    given = [] if layout.head_dim else [f"heads ({config.num_heads})"]
    given.append(f"iterations ({iterations[0]} on average)" if is_allocated else counts)
    found = [f"{' and '.join(given)} are as given: the file does not hold them, and a wrong number shows no error"]
    if is_allocated:
        found.append(f"{counts} of the layers follow from that average and the budget allocator in the file")
    if layout.group_size != GROUP_SIZE:
        found.append(
            f"groups of {layout.group_size} dimensions share an offset of mu: it fits the file, and others may"
        )
    if max_seq_len is None and layout.max_seq_len is None:
        found.append(
            f"context of {config.max_seq_len:,} tokens: the file does not hold its length; --max-seq-len sets it"
        )
    return found


def _files(imported: Imported, tokenizer: Tokenizer | None) -> dict[str, str]:
    """The texts of config.json and, with a tokenizer, tokenizer.json; one with chat tokens has a chat template, too."""
    event = {
        "event": "import",
        "source": str(imported.source),
        "sha256": imported.sha256,
        "generation": imported.generation,
        "inl": version("inl"),
        "torch": torch.__version__,
    }
    config = {
        "format": 1,
        "model": imported.config.model_dump(mode="json"),
        "special_tokens": tokenizer.special_ids if tokenizer else {},
        "bos_id": tokenizer.bos_id if tokenizer else None,
        "eos_id": tokenizer.eos_id if tokenizer else None,
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
        "provenance": [event],
    }
    files = {"config.json": json.dumps(config, indent=1)}
    if tokenizer:
        files["tokenizer.json"] = tokenizer.to_json()
        if tokenizer.special_ids.keys() >= set(CHAT_TOKENS):
            files[TOKENIZER_CONFIG] = tokenizer_config(tokenizer, _CHAT_TEMPLATE)
    return files
