"""`inl plan`: what a recipe or a model would cost, without putting the model into memory."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.early import check_recipe
from inl_cli.loading import check_recipe_or_model
from inl_cli.options import JsonOption, PresetOption, QuietOption, RecipeOrModelArgument, SetOption, SizeOption
from inl_core.errors import RecipeError

if TYPE_CHECKING:
    from inl_core.analysis.planning.fit import Devices
    from inl_core.recipe import Recipe

VocabularyOption = Annotated[
    int | None,
    typer.Option(
        "--vocab-size", metavar="V", min=1, help="Vocabulary; default the recipe's or its data's, else 50,000."
    ),
]
LengthOption = Annotated[
    int | None,
    typer.Option(
        "--sequence-length", metavar="S", min=1, help="Tokens in a window; default the recipe's or the context."
    ),
]
MicroBatchOption = Annotated[
    int | None,
    typer.Option(
        "--micro-batch-size", metavar="B", min=1, help="Windows in one forward pass; default the recipe's, else 1."
    ),
]
GpusOption = Annotated[
    int | None,
    typer.Option("--gpus", metavar="N", min=1, max=1_000_000, help="Refuse a recipe that does not fit N GPUs."),
]
GpuMemoryOption = Annotated[
    str | None,
    typer.Option("--gpu-memory", metavar="SIZE", help="Memory of each GPU, such as 80GB; default this machine's GPU."),
]
AllSizesOption = Annotated[
    bool, typer.Option("--all-sizes", help="Every size beside the documents' figures, as Markdown: docs/sizes.md.")
]


@errors_to_exit_codes
def plan(
    recipe: RecipeOrModelArgument = None,
    preset: PresetOption = None,
    size: SizeOption = None,
    vocab_size: VocabularyOption = None,
    sequence_length: LengthOption = None,
    micro_batch_size: MicroBatchOption = None,
    gpus: GpusOption = None,
    gpu_memory: GpuMemoryOption = None,
    overrides: SetOption = None,
    all_sizes: AllSizesOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Show parameters, FLOPs, memory, disk and schedule of a recipe or a model, without putting the model into memory.

    inl plan recipes/medium.yaml --micro-batch-size 8

    inl plan --preset v3 --size 13B --vocab-size 50000

    inl plan recipes/13b.yaml --gpus 8 --gpu-memory 80GB

    Memory is that of one device, by recomputation mode and by the number of devices over which weights, gradients and
    optimizer are sharded (training.distributed). A recipe that does not fit the GPUs that are named, or else those of
    this machine, is refused after its figures. FLOPs are those of the matrix products. The first plan on a machine
    compiles and measures the operations in C++, which takes some seconds.
    """
    console = Console(json=json, quiet=quiet)
    chosen = (recipe, preset, size, vocab_size, sequence_length, micro_batch_size)
    if all_sizes:
        _show_all_sizes(console, alone=not overrides and all(value is None for value in chosen))
        return
    planned, devices = _choose(*chosen, overrides or []), _devices(gpus, gpu_memory)

    from inl_cli.plan_view import plan_data, show_model_plan
    from inl_core.analysis.planning import plan_model
    from inl_core.analysis.planning.fit import check_fit

    figures, has_schedule = plan_model(planned), recipe is not None
    console.result(
        plan_data(figures, has_schedule=has_schedule),
        lambda: show_model_plan(console, figures, has_schedule=has_schedule),
    )
    if has_schedule and figures.run.warning:
        console.warn(figures.run.warning)
    if devices is not None and (has_schedule or gpus or gpu_memory):
        layout = check_fit(figures, devices)
        console.info(f"fits {devices.number} x {devices.memory / 1e9:g} GB: {layout.strategy}")


def _choose(
    recipe: Path | None,
    preset: str | None,
    size: str | None,
    vocab_size: int | None,
    sequence_length: int | None,
    micro_batch_size: int | None,
    overrides: list[str],
) -> "Recipe":
    """The recipe at `recipe`, or one around a preset at a size; RecipeError when neither or both are named."""
    if recipe is None and preset is None and size is None:
        raise RecipeError(
            "inl plan needs a recipe or a model: inl plan recipes/tiny.yaml, or inl plan --preset v3 --size 13B"
        )
    check_recipe_or_model(recipe, preset, size)
    check_recipe(recipe)

    from inl_core.analysis.planning import recipe_of_model
    from inl_core.recipe.load import load_recipe
    from inl_core.recipe.presets import DEFAULT_PRESET

    if recipe is None:
        given = {"preset": preset or DEFAULT_PRESET, "size": size, "vocab_size": vocab_size}
        model = {key: value for key, value in given.items() if value is not None}
        return recipe_of_model(
            model, sequence_length=sequence_length, micro_batch_size=micro_batch_size, overrides=overrides
        )
    options = {
        "model.vocab_size": vocab_size,
        "training.sequence_length": sequence_length,
        "training.micro_batch_size": micro_batch_size,
    }
    return load_recipe(recipe, [*overrides, *(f"{key}={value}" for key, value in options.items() if value is not None)])


def _devices(number: int | None, memory: str | None) -> "Devices | None":
    """The devices that the options name, or those of this machine; None where there is neither."""
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?) ?GB", (memory or "").strip(), re.IGNORECASE | re.ASCII)
    if memory is not None and (found is None or float(found[1]) == 0):
        raise RecipeError(f"--gpu-memory {memory!r}: not a size in GB; write, for instance, 80GB")

    import torch

    from inl_core.analysis.planning.fit import Devices
    from inl_core.training.layout import device_memory

    if found is not None:
        return Devices(number or 1, round(float(found[1]) * 1e9))
    if torch.cuda.is_available():
        return Devices(number or torch.cuda.device_count(), device_memory(torch.device("cuda", 0)))
    if number is not None:
        raise RecipeError(
            "--gpus: torch sees no GPU here whose memory could be taken; add, for instance, --gpu-memory 80GB"
        )
    return None


def _show_all_sizes(console: Console, *, alone: bool) -> None:
    if not alone:
        raise RecipeError("--all-sizes plans every size by itself: give no recipe, size or other option with it")
    from inl_cli.sizes_page import sizes_page

    page = sizes_page()
    console.result({"markdown": page}, lambda: console.write(page))
