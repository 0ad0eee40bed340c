"""`inl bench`: how fast and how large, against another model, by turns in one run."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.options import DeviceOption, JsonOption, QuietOption, SetOption, given_path
from inl_cli.progress import Progress
from inl_core.errors import RecipeError

if TYPE_CHECKING:
    from inl_core.analysis.bench import BenchSettings, Candidate, Choice

Task = Literal["train", "prefill", "decode", "data", "startup"]

TaskArgument = Annotated[Task, typer.Argument(metavar="TASK", help="train, prefill, decode, data or startup.")]
MeasuredRecipe = Annotated[
    Path | None,
    typer.Argument(
        metavar="[RECIPE]", help="The recipe, a YAML file; or name --preset or --size instead.", parser=given_path
    ),
]
AgainstOption = Annotated[
    str | None,
    typer.Option(
        metavar="OTHER",
        help="A recipe; v1 - v4 or transformer in the same dimensions; transformers' llama; uncached (decode).",
    ),
]
AgainstSetOption = Annotated[
    list[str] | None,
    typer.Option("--against-set", metavar="KEY=VALUE", help="Override a key of the other one; may be repeated."),
]
PresetOption = Annotated[str | None, typer.Option("--preset", help="A generation: v1, v2, v3, v4, transformer.")]
SizeOption = Annotated[str | None, typer.Option("--size", help="A size of the documents: small, medium, ...")]
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
    typer.Option("--iterations", metavar="T", min=1, max=10_000, help="Integrator iterations of the first one."),
]
BatchOption = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="B", help="Rows; default the recipe's, 4 of a preset, 1 to decode."),
]
LengthOption = Annotated[
    int | None, typer.Option("--sequence-length", metavar="S", help="Tokens of a row; default the recipe's, else 256.")
]
PromptOption = Annotated[int, typer.Option("--prompt-tokens", metavar="P", help="Tokens of a prompt (decode).")]
NewTokensOption = Annotated[int, typer.Option("--new-tokens", metavar="N", help="Tokens generated a row (decode).")]
RoundsOption = Annotated[int, typer.Option(help="Turns of each candidate.")]
WarmupOption = Annotated[int | None, typer.Option(help="Repetitions before the first turn; default 2, 1 to decode.")]
StepsOption = Annotated[int | None, typer.Option(help="Timed repetitions in a turn; default 3, 1 to decode.")]
ModeOption = Annotated[
    Literal["eager", "compiled", "best"], typer.Option(help="best measures both and takes the faster of each.")
]
ThreadsOption = Annotated[int | None, typer.Option(help="Threads of each candidate; default torch's own.")]
GemmOption = Annotated[
    int | None, typer.Option(help="n of the n x n product that is the ceiling; 0 is none; default 2048, 8192 on a GPU.")
]
NoPartsOption = Annotated[bool, typer.Option("--no-parts", help="Do not profile the time by part.")]


@errors_to_exit_codes()
def bench(
    task: TaskArgument,
    recipe: MeasuredRecipe = None,
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

    inl bench train --preset v4 --d-model 512 --layers 6 --heads 8 --kv-heads 2 --vocab-size 16384 --against llama

    inl bench decode recipes/tiny.yaml --against uncached

    inl bench data recipes/tiny.yaml

    Figures are medians over rounds with their quartiles; docs/bench.md says how to read them.
    """
    console = Console(json=json, quiet=quiet)
    _check(task, against, against_overrides)
    model = {"size": size, "d_model": d_model, "num_layers": layers, "num_heads": heads, "num_kv_heads": kv_heads}
    model |= {"feedforward_dim": feedforward_dim, "vocab_size": vocab_size}
    own = [*(overrides or []), *([f"model.integrator.num_iterations={iterations}"] if iterations else [])]
    given = {"rounds": rounds, "warmup": warmup, "steps": steps, "threads": threads, "gemm_size": gemm_size}
    given |= {"batch_size": batch_size, "sequence_length": sequence_length}
    given |= {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "mode": mode, "parts": not no_parts}
    from inl_core.analysis.bench import Choice

    choice = Choice(recipe, preset, model, own, batch_size, sequence_length)
    settings, candidates = _prepare(task, choice, against, against_overrides or [], device, given)
    with console.progress() as progress:
        frame, show = _run(task, settings, candidates, _teller(progress))
    console.result(frame, lambda: show(console, frame))


def _check(task: Task, against: str | None, against_overrides: list[str] | None) -> None:
    """What does not go together."""
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
    """The settings and the candidates; every user's error comes from here, before anything runs."""
    from inl_core.analysis.bench import BenchSettings, first_candidate, other_candidate

    kind = "train" if task in ("data", "startup") else task
    known = {name: value for name, value in given.items() if value is not None}
    wanted = BenchSettings(kind, **known)  # the options by themselves, before they meet the recipe
    first = first_candidate(choice, context=wanted.context if task == "decode" else None)
    candidates = [first, *([other_candidate(against, first, against_overrides)] if against else [])]
    return _settings(wanted, known, first, device), candidates


def _settings(wanted: "BenchSettings", given: dict[str, Any], first: "Candidate", device: str) -> "BenchSettings":
    """What was not given, from the recipe, the task and the machine."""
    import torch

    from inl_core.training.distributed import choose_device
    from inl_core.training.trainer import uses_bf16

    where, training = choose_device(device), first.recipe.training
    is_decode = wanted.task == "decode"
    defaults = {
        "batch_size": training.batch_size if wanted.task == "train" else 1,
        "sequence_length": training.sequence_length,
        "warmup": 1 if is_decode else 2,
        "steps": 1 if is_decode else 3,
        "threads": torch.get_num_threads(),
        "gemm_size": 8192 if where.type == "cuda" else 2048,
    }
    missing = {name: value for name, value in defaults.items() if name not in given}
    return replace(wanted, **missing, device=where.type, bf16=uses_bf16(first.recipe, where))


def _teller(progress: Progress) -> Callable[[str, int, int], None]:
    """A new piece of work where the words change, else the same one further on."""
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
    from inl_core.analysis import bench

    frame: dict[str, Any] = {
        "task": task,
        "machine": bench.describe_machine(settings.device, settings.threads),
        "versions": bench.describe_versions(),
    }
    if task == "data":
        recipe = candidates[0].recipe
        speed = bench.measure_loader(recipe, rounds=settings.rounds, device=settings.device, progress=tell)
        return frame | bench_view.loader_data(settings, candidates[0], speed), bench_view.show_loader
    if task == "startup":
        seconds = bench.measure_startup(candidates, settings, tell)
        return frame | {"rounds": settings.rounds, "seconds": seconds}, bench_view.show_startup
    comparison = bench.compare(candidates, settings, tell)
    return frame | bench_view.comparison_data(comparison), bench_view.show_comparison
