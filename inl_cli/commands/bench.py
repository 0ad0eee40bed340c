"""`inl bench`: how fast and how large, against another model, by turns in one run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from inl_cli.console import Console, errors_to_exit_codes, to_plain
from inl_cli.early import check_recipe
from inl_cli.loading import check_recipe_or_model
from inl_cli.options import (
    DeviceOption,
    JsonOption,
    PresetOption,
    QuietOption,
    RecipeOrModelArgument,
    SetOption,
    SizeOption,
)
from inl_cli.progress import Progress
from inl_core.errors import RecipeError

if TYPE_CHECKING:
    from inl_core.analysis.bench.choosing import Choice
    from inl_core.analysis.bench.settings import BenchSettings, Candidate

Task = Literal["train", "prefill", "decode", "data", "startup"]

TaskArgument = Annotated[Task, typer.Argument(metavar="TASK", help="train, prefill, decode, data or startup.")]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        metavar="OTHER",
        help="A recipe; v1 - v5 or transformer in the same dimensions; llama, of transformers; uncached (decode).",
    ),
]
AgainstSetOption = Annotated[
    list[str] | None,
    typer.Option("--against-set", metavar="KEY=VALUE", help="Override a key of the other candidate; may be repeated."),
]
ModelWidthOption = Annotated[int | None, typer.Option("--d-model", metavar="D", min=1, help="Width of the model.")]
LayersOption = Annotated[int | None, typer.Option("--layers", metavar="L", min=1, help="Blocks.")]
HeadsOption = Annotated[int | None, typer.Option("--heads", metavar="H", min=1, help="Query heads.")]
KeyValueHeadsOption = Annotated[int | None, typer.Option("--kv-heads", metavar="K", min=1, help="Key and value heads.")]
FeedForwardOption = Annotated[
    int | None, typer.Option("--feedforward-dim", metavar="F", min=1, help="Nominal feed-forward width.")
]
VocabularyOption = Annotated[int | None, typer.Option("--vocab-size", metavar="V", min=1, help="Vocabulary.")]
IterationsOption = Annotated[
    int | None,
    typer.Option("--iterations", metavar="T", min=1, max=10_000, help="Integrator iterations of the first candidate."),
]
BatchOption = Annotated[
    int | None,
    typer.Option(
        "--batch-size", metavar="B", help="Rows; default the recipe's, 4 of a preset, 1 in prefill and decode."
    ),
]
LengthOption = Annotated[
    int | None, typer.Option("--sequence-length", metavar="S", help="Tokens of a row; default the recipe's, else 256.")
]
PromptOption = Annotated[int, typer.Option("--prompt-tokens", metavar="P", help="Tokens of a prompt (decode).")]
NewTokensOption = Annotated[
    int, typer.Option("--new-tokens", metavar="N", help="Tokens to generate in a row (decode).")
]
RoundsOption = Annotated[int, typer.Option(help="Turns of each candidate.")]
WarmupOption = Annotated[int | None, typer.Option(help="Repetitions before the first turn; default 2, or 1 in decode.")]
StepsOption = Annotated[int | None, typer.Option(help="Timed repetitions in a turn; default 3, or 1 in decode.")]
ModeOption = Annotated[
    Literal["eager", "compiled", "best"], typer.Option(help="best measures both and takes the faster of the two.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads of each candidate; default torch's own.")]
GemmOption = Annotated[
    int | None,
    typer.Option(help="n of the ceiling, an n x n matrix product; 0 is none; default 2048, or 8192 on a GPU."),
]
NoPartsOption = Annotated[bool, typer.Option("--no-parts", help="Do not profile the time by part.")]


@errors_to_exit_codes
def bench(
    task: TaskArgument,
    recipe: RecipeOrModelArgument = None,
    against: AgainstOption = None,
    preset: PresetOption = None,
    size: SizeOption = None,
    d_model: ModelWidthOption = None,
    layers: LayersOption = None,
    heads: HeadsOption = None,
    kv_heads: KeyValueHeadsOption = None,
    feedforward_dim: FeedForwardOption = None,
    vocab_size: VocabularyOption = None,
    iterations: IterationsOption = None,
    overrides: SetOption = None,
    against_overrides: AgainstSetOption = None,
    batch_size: BatchOption = None,
    sequence_length: LengthOption = None,
    prompt_tokens: PromptOption = 32,
    new_tokens: NewTokensOption = 256,
    rounds: RoundsOption = 7,
    warmup: WarmupOption = None,
    steps: StepsOption = None,
    mode: ModeOption = "best",
    threads: ThreadsOption = None,
    device: DeviceOption = "auto",
    gemm_size: GemmOption = None,
    no_parts: NoPartsOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Measure speed, memory and time by part of a recipe or a model, against another one by turns.

    inl bench train --preset v5 --d-model 512 --layers 6 --heads 8 --kv-heads 2 --vocab-size 16384 --against llama

    inl bench decode recipes/tiny.yaml --against uncached

    inl bench data recipes/tiny.yaml

    Figures are medians over rounds with their quartiles; docs/bench.md says how to read them.
    """
    console = Console(json=json, quiet=quiet)
    model = {"size": size, "d_model": d_model, "num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads}
    model |= {"feedforward_dim": feedforward_dim, "vocab_size": vocab_size}
    own = [*(overrides or []), *([f"model.integrator.num_iterations={iterations}"] if iterations else [])]
    settings = {"rounds": rounds, "warmup": warmup, "steps": steps, "threads": threads, "gemm_size": gemm_size}
    settings |= {"batch_size": batch_size, "sequence_length": sequence_length}
    settings |= {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "mode": mode, "parts": not no_parts}
    _check(task, recipe, preset, _given(model), against, against_overrides)
    check_recipe(recipe)
    from inl_core.analysis.bench.choosing import Choice

    choice = Choice(recipe, preset, _given(model), own, batch_size, sequence_length)
    measured, candidates = _prepare(task, choice, against, against_overrides or [], device, _given(settings))
    with console.progress() as progress:
        frame, show = _run(task, measured, candidates, _teller(progress))
    console.result(frame, lambda: show(console, frame))


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


def _check(
    task: Task,
    recipe: Path | None,
    preset: str | None,
    model: dict[str, Any],
    against: str | None,
    against_overrides: list[str] | None,
) -> None:
    """Refuse what does not go together."""
    if recipe is None and preset is None and not model:
        raise RecipeError(
            "inl bench needs a recipe or a model: inl bench train recipes/tiny.yaml, or inl bench train --preset v5"
        )
    check_recipe_or_model(recipe, preset, model.get("size"))
    if task == "data" and against:
        raise RecipeError("--against: inl bench data measures the loader alone; leave it out")
    if against == "uncached" and task != "decode":
        raise RecipeError(f"--against uncached: only decoding has a cache to leave out, not {task}")
    if against_overrides and not against:
        raise RecipeError(f"--against-set {against_overrides[0]}: there is nothing to override without --against")


def _prepare(
    task: Task,
    choice: "Choice",
    against: str | None,
    against_overrides: list[str],
    device: str,
    given: dict[str, Any],
) -> "tuple[BenchSettings, list[Candidate]]":
    """The settings and the candidates. Whatever the user got wrong is found here, before anything runs."""
    import torch

    from inl_core.analysis.bench.choosing import first_candidate, other_candidate
    from inl_core.analysis.bench.settings import BenchSettings
    from inl_core.training.distributed import choose_device
    from inl_core.training.precision import uses_bf16

    wanted = BenchSettings("train" if task in ("data", "startup") else task, **given)
    is_decode = task == "decode"
    first = first_candidate(choice, context=wanted.context if is_decode else None)
    candidates = [first, *([other_candidate(against, first, against_overrides)] if against else [])]
    where, training = choose_device(device), first.recipe.training
    defaults = {
        "batch_size": training.batch_size if wanted.task == "train" else 1,
        "sequence_length": training.sequence_length,
        "warmup": 1 if is_decode else 2,
        "steps": 1 if is_decode else 3,
        "threads": torch.get_num_threads(),
        "gemm_size": 8192 if where.type == "cuda" else 2048,
    }
    settings = replace(wanted, **{name: value for name, value in defaults.items() if name not in given})
    return replace(settings, device=where.type, bf16=uses_bf16(first.recipe, where)), candidates


def _teller(progress: Progress) -> Callable[[str, int, int], None]:
    """What tells `progress` of the work: a new piece where the words change, else how far the same piece is."""
    current = ""

    def tell(what: str, done: int, total: int) -> None:
        nonlocal current
        if what != current:
            current = what
            progress.start(what, "rounds")
        progress.update(done, total)

    return tell


def _run(
    task: Task, settings: "BenchSettings", candidates: "list[Candidate]", tell: Callable[[str, int, int], None]
) -> tuple[dict[str, Any], Callable[[Console, dict[str, Any]], None]]:
    """The figures, and what shows them as tables."""
    from inl_cli import bench_view
    from inl_core.analysis.bench.comparison import compare
    from inl_core.analysis.bench.loading import measure_loader
    from inl_core.analysis.bench.measuring import describe_machine, describe_versions
    from inl_core.analysis.bench.startup import measure_startup

    frame: dict[str, Any] = {
        "task": task,
        "machine": describe_machine(settings.device, settings.threads),
        "versions": describe_versions(),
    }
    if task == "data":
        recipe = candidates[0].recipe
        speed = measure_loader(recipe, rounds=settings.rounds, device=settings.device, progress=tell)
        return frame | bench_view.loader_data(settings, candidates[0], speed), bench_view.show_loader
    if task == "startup":
        seconds = measure_startup(candidates, settings, tell)
        return frame | to_plain({"rounds": settings.rounds, "seconds": seconds}), bench_view.show_startup
    comparison = compare(candidates, settings, tell)
    return frame | bench_view.comparison_data(comparison), bench_view.show_comparison
