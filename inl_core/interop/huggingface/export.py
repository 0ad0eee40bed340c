"""A checkpoint -> a directory that transformers loads, compared with the checkpoint before it is there.

    exported = export(checkpoint, output)       # exported.format, exported.differences

- Only the weights, config.json and the tokenizer are read, whole or in shards; the optimizer is not needed.
- An existing directory must be empty: it is replaced in one step, by a directory that is complete.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from inl_core.corpus.chat_template import end_of_answer, read_chat_template
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.errors import RecipeError
from inl_core.files import ASIDE, named_errors, refuse_filled, umask
from inl_core.inference.checkpoint_files import TOKENIZER_CONFIG, read_config
from inl_core.inference.loading import load_tokenizer, load_weights, read_model_config
from inl_core.interop.huggingface.llama import llama_config, llama_weights, why_not_llama
from inl_core.interop.huggingface.modeling import InlConfig, InlForCausalLM
from inl_core.interop.huggingface.proof import TOLERANCE, Differences, compare_logits
from inl_core.interop.huggingface.tokenizer import convert_tokenizer, save_tokenizer
from inl_core.model import IntegratorLanguageModel

Format = Literal["huggingface", "llama", "inl"]


@dataclass(frozen=True)
class Exported:
    """What was written."""

    checkpoint: Path
    output: Path
    format: Literal["llama", "inl"]
    not_llama: str | None
    """Why the model is no Llama; None where it is one."""
    has_tokenizer: bool
    parameters: int
    bytes: int
    """Of all files together."""
    differences: Differences
    """Of the logits of what was written, read again, to the checkpoint's."""


def export(checkpoint: Path, output: Path, *, format: Format = "huggingface", tolerance: float = TOLERANCE) -> Exported:
    """Write a verified checkpoint as the directory `output`.

    Args:
        format: "llama" and "inl" are the two kinds of model; "huggingface" takes llama where the model is one.
        tolerance: how much the logits may differ, in parts of the largest one.

    Raises:
        RecipeError: `output` is not new or empty, or the model is no Llama where it must be.
        ArtefactError: a file of the checkpoint is damaged or does not fit the others.
        InlError: the logits of what was written differ from the checkpoint's.
    """
    refuse_filled(output)
    config = read_config(checkpoint)
    model_config = read_model_config(checkpoint, config)
    reason = why_not_llama(model_config)
    if format == "llama" and reason:
        raise RecipeError(f"--format llama: {checkpoint} {reason}, so it is no Llama; use --format huggingface")
    kind = "llama" if format != "inl" and reason is None else "inl"
    tokenizer = None if config.tokenizer is None else load_tokenizer(checkpoint, config, model_config)
    own = load_weights(checkpoint, model_config)
    with _quiet(), _directory_aside(output) as aside:
        _write(aside, own, tokenizer, kind, checkpoint / TOKENIZER_CONFIG)
        written = _load(aside, kind)
        differences = compare_logits(own, written)
        differences.check(str(output), tolerance)
        size = sum(file.stat().st_size for file in aside.iterdir())
    parameters = sum(parameter.numel() for parameter in written.parameters())
    return Exported(checkpoint, output, kind, reason, tokenizer is not None, parameters, size, differences)


def _write(
    directory: Path, own: IntegratorLanguageModel, tokenizer: Tokenizer | None, kind: str, template_file: Path
) -> None:
    from transformers import GenerationConfig, LlamaForCausalLM

    template = read_chat_template(template_file)
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = (tokenizer.bos_id, tokenizer.eos_id, tokenizer.bos_id) if tokenizer else (None, None, None)
    special: dict[str, Any] = dict(zip(names, ids, strict=True))
    ends = ids[1]
    if tokenizer and template:
        ends = [tokenizer.eos_id, end_of_answer(tokenizer, template, origin=template_file)]
    if kind == "llama":
        model = _unfilled(LlamaForCausalLM, llama_config(own.config, special))
        weights = llama_weights(own)
    else:
        model = _unfilled(InlForCausalLM, InlConfig(inl=own.config.model_dump(mode="json"), **special))
        weights = {f"model.{name}": tensor for name, tensor in own.state_dict().items()}
    model.generation_config = GenerationConfig(**special | {"eos_token_id": ends})
    model.save_pretrained(directory, state_dict=weights)
    if tokenizer is not None:
        converted = convert_tokenizer(tokenizer, max_seq_len=own.config.max_seq_len, chat_template=template)
        save_tokenizer(converted, directory)


def _unfilled(kind: Any, config: Any) -> Any:
    """A model without memory, whose names and shapes alone are needed."""
    import torch

    with torch.device("meta"):
        return kind(config)


def _load(directory: Path, kind: str) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM if kind == "llama" else InlForCausalLM
    return model.from_pretrained(directory, dtype=torch.float32).eval()


@contextmanager
def _directory_aside(output: Path) -> Iterator[Path]:
    """A new directory that becomes `output` at the end, and is removed where an error comes before.

    Its name is its own, so of several exports to one place each is whole, and the first to end has the place.
    """
    with named_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{output.name[:100]}.", suffix=ASIDE, dir=output.parent))
        try:
            yield aside
            aside.chmod(0o777 & ~umask())  # only its owner may enter a temporary directory
            for file in aside.iterdir():
                file.chmod(0o666 & ~umask())  # and safetensors lets only the owner read a file
            try:
                aside.rename(output)
            except OSError:
                refuse_filled(output)  # another export was faster
                raise
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its bars and remarks, which are about its own doings."""
    from transformers.utils import logging

    level, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if had_bars:
            logging.enable_progress_bar()
