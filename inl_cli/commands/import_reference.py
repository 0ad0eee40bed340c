"""`inl import-reference`: the released reference generation's weights as a checkpoint."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.early import check_file
from inl_cli.options import JsonOption, QuietOption, path_argument, path_option
from inl_core.errors import RecipeError

if TYPE_CHECKING:
    from inl_core.interop.reference import Imported

FileArgument = Annotated[Path, path_argument("FILE.safetensors", "The reference model's weights, all in one file.")]
OutputOption = Annotated[Path, path_option("--output", help="The checkpoint's directory; it must be new or empty.")]
IterationsOption = Annotated[
    str,
    typer.Option(metavar="T", help="Integrator iterations: the model's T, or one for each layer (2,3,...), bottom up."),
]
HeadsOption = Annotated[int | None, typer.Option(help="Query heads; may be left out where the file has rotary tables.")]
KeyValueHeadsOption = Annotated[
    int | None, typer.Option(help="Key-value heads; follows from the file, checked when given.")
]
ContextOption = Annotated[
    int | None, typer.Option(help="Context in tokens; default the file's tables of positions, else 1024.")
]
GroupOption = Annotated[
    int | None, typer.Option(help="Dimensions that share an offset of mu; default 64, or what the file allows alone.")
]
ThetaOption = Annotated[
    float | None, typer.Option(help="Base of the rotary frequencies; default that of the file's tables, else 10000.")
]
TokenizerOption = Annotated[
    Path | None,
    path_option("--tokenizer", help="The model's tokenizer.json; without one it cannot be given text."),
]


@errors_to_exit_codes
def import_reference(
    file: FileArgument,
    output: OutputOption,
    iterations: IterationsOption,
    num_heads: HeadsOption = None,
    num_kv_heads: KeyValueHeadsOption = None,
    max_seq_len: ContextOption = None,
    group_size: GroupOption = None,
    rope_theta: ThetaOption = None,
    tokenizer: TokenizerOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Turn the released reference model's weights, or its predecessor's, into a checkpoint."""
    console = Console(json=json, quiet=quiet)
    each = _parse(iterations)
    check_file(file, "no such file")
    check_file(tokenizer, "missing")

    from inl_core.interop import reference

    imported = reference.import_reference(
        file,
        output,
        iterations=each,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        max_seq_len=max_seq_len,
        group_size=group_size,
        rope_theta=rope_theta,
        tokenizer=tokenizer,
    )
    for warning in imported.warnings:
        console.warn(warning)
    console.result(imported, lambda: _show(console, imported))


def _parse(iterations: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in iterations.split(","))
    except ValueError:
        raise RecipeError(f"--iterations {iterations}: give a whole number, or one for each layer: 2,3,2") from None


def _show(console: Console, imported: "Imported") -> None:
    config = imported.config
    assert config.integrator
    rows = [
        ("source", imported.source),
        ("sha256", imported.sha256),
        ("generation", imported.generation),
        ("layers", f"{config.num_layers}, {config.d_model:,} wide"),
        ("heads", f"{config.num_heads} query, {config.key_value_heads} key-value, {config.head_dim} wide"),
        ("iterations", ", ".join(map(str, config.integrator.iterations_per_layer or ())) or config.num_iterations),
        ("vocabulary", f"{config.vocab_size:,}" + (f", rank {config.rank}" if config.rank else "")),
        ("context", f"{config.max_seq_len:,} tokens"),
        ("tensors used", len(imported.used)),
        ("tensors skipped", len(imported.skipped)),
    ]
    console.table(f"{imported.checkpoint}", ("", ""), rows)
    if imported.skipped:
        console.write("\n")
        numbers = Counter(imported.skipped.values())
        example = {reason: name for name, reason in reversed(imported.skipped.items())}  # the first of each
        cells = [(reason, number, example[reason]) for reason, number in numbers.items()]
        console.table("skipped", ("why", "tensors", "such as"), cells)
