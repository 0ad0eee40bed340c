"""`inl export`: a checkpoint as a directory that other programs load."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.early import check_checkpoint
from inl_cli.options import CheckpointArgument, JsonOption, QuietOption, path_option
from inl_core.errors import RecipeError
from inl_core.files import refuse_filled

if TYPE_CHECKING:
    from inl_core.interop.huggingface.export import Exported

OutputOption = Annotated[Path, path_option("--output", help="The directory to write; it must be new or empty.")]
FormatOption = Annotated[
    Literal["huggingface", "llama", "inl"],
    typer.Option(help="llama: a plain Llama; inl: this project's model; huggingface: llama where the model is one."),
]


@errors_to_exit_codes
def export(
    output: OutputOption,
    checkpoint: CheckpointArgument = None,
    format: FormatOption = "huggingface",
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Write a checkpoint as a directory that transformers loads, and prove that the logits are the same."""
    console = Console(json=json, quiet=quiet)
    refuse_filled(output)
    check_checkpoint(checkpoint)

    from importlib.util import find_spec

    if find_spec("transformers") is None:
        raise RecipeError('inl export: transformers is not installed; pip install "inl[hf]"')

    from inl_cli.loading import noted
    from inl_core.inference.loading import find_checkpoint
    from inl_core.interop.huggingface.export import export as export_checkpoint

    exported = export_checkpoint(find_checkpoint(checkpoint, note=noted(console)), output, format=format)
    if not exported.has_tokenizer:
        console.warn(f"{exported.checkpoint}: has no tokenizer, so the directory has none")
    console.result(exported, lambda: _show(console, exported))


def _show(console: Console, exported: "Exported") -> None:
    found = exported.differences
    kind = "LlamaForCausalLM" if exported.format == "llama" else "InlForCausalLM, model_type inl"
    why = f"no Llama: the model {exported.not_llama}" if exported.not_llama else ""
    rows = [
        ("model", kind, why),
        ("parameters", f"{exported.parameters:,}", f"{exported.bytes / 1e6:,.1f} MB with all files"),
        ("in one pass", f"{found.full:.2g}", f"largest difference of the logits of {found.tokens} tokens"),
        ("token by token", f"{found.cached:.2g}", "with the cache"),
        ("with padding", f"{found.padded:.2g}", f"the largest logit is {found.largest_logit:.3g}"),
    ]
    console.table(f"{exported.checkpoint} -> {exported.output}", ("", "", ""), rows)
