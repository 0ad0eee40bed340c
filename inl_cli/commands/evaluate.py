"""`inl eval`: what a checkpoint scores on held-out or any other text."""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.early import check_checkpoint, check_task_folder
from inl_cli.loading import check_source, open_model, open_source
from inl_cli.options import (
    CheckpointArgument,
    CompletionColumnOption,
    DataOption,
    DeviceOption,
    IterationsOption,
    JsonOption,
    MessagesColumnOption,
    NoEarlyStoppingOption,
    PrecisionOption,
    PromptColumnOption,
    QuietOption,
    SplitOption,
    TextColumnOption,
    TextOption,
    path_option,
)
from inl_cli.task_runs import run_tasks
from inl_core.errors import NonFiniteError, RecipeError

if TYPE_CHECKING:
    from inl_core.corpus.loader import Batch
    from inl_core.inference.texts import Text
    from inl_core.model import Options
    from inl_core.recipe.data import ColumnSettings

WindowOption = Annotated[
    int | None, typer.Option(help="Tokens the model sees at once; default what it was trained on.")
]
StrideOption = Annotated[
    int | None, typer.Option(help="Tokens from one window to the next; less than the window gives each token context.")
]
TokensOption = Annotated[int | None, typer.Option("--max-tokens", "--tokens", min=1, help="Score only the first N.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Windows, or requests, in one pass; changes speed only.")]
TasksOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...", help="Run these tasks of lm-eval instead, as arc_easy,blimp; patterns with * too."
    ),
]
TaskPathOption = Annotated[
    Path | None,
    path_option("--task-path", help="A folder of task files besides lm-eval's own; its paths count from it."),
]
TrustOption = Annotated[
    bool, typer.Option("--trust-task-code", help="Let the files of --task-path run Python code; else it is refused.")
]
FewshotOption = Annotated[
    int | None, typer.Option(min=0, help="Solved examples before each question; default the task's own.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Only the first N examples of each task.")]


@errors_to_exit_codes
def evaluate(
    checkpoint: CheckpointArgument = None,
    data: DataOption = None,
    text: TextOption = None,
    text_column: TextColumnOption = None,
    prompt_column: PromptColumnOption = None,
    completion_column: CompletionColumnOption = None,
    messages_column: MessagesColumnOption = None,
    split: SplitOption = "validation",
    window: WindowOption = None,
    stride: StrideOption = None,
    iterations: IterationsOption = None,
    no_early_stopping: NoEarlyStoppingOption = False,
    max_tokens: TokensOption = None,
    batch_size: BatchSizeOption = 16,
    tasks: TasksOption = None,
    task_path: TaskPathOption = None,
    trust_task_code: TrustOption = False,
    num_fewshot: FewshotOption = None,
    limit: LimitOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Score text: loss, perplexity, bits per byte, accuracy, iterations; or, with --tasks, benchmarks of lm-eval."""
    console = Console(json=json, quiet=quiet)
    check_source(data, text)
    columns = _columns(text, text_column, prompt_column, completion_column, messages_column)
    check_checkpoint(checkpoint)
    others = (data, text, window, stride, max_tokens)
    names = _task_names(tasks, task_path, trust_task_code, others=others, settings=(num_fewshot, limit))
    loaded = open_model(console, checkpoint, device, iterations=iterations)

    from inl_core.model import Options
    from inl_core.training.precision import is_bf16

    options = Options(num_iterations=iterations, early_stopping=not no_early_stopping)
    bf16 = is_bf16(precision, loaded.model.embedding.table.weight.device)
    if names:
        from inl_core.interop.harness import TaskSettings

        settings = TaskSettings(task_path, num_fewshot, limit, batch_size, options, bf16, trust_task_code)
        run_tasks(console, loaded, names, settings)
        return
    source = open_source(console, loaded, data, text, split, columns)
    result = _score(
        console,
        source,
        window=window,
        stride=stride,
        batch_size=batch_size,
        max_tokens=max_tokens,
        options=options,
        bf16=bf16,
    )
    console.result(result, lambda: _show(console, result))


def _columns(source: str | None, *names: str | None) -> "ColumnSettings":
    """The columns of --text in the order text, prompt, completion, messages; refused without --text, or when empty."""
    from inl_core.recipe.data import ColumnSettings

    if source is None and any(name is not None for name in names):
        raise RecipeError("--text-column, --prompt-column and their like are about --text: give it, too")
    if "" in names:
        raise RecipeError("'' names no column of --text")
    return ColumnSettings(**dict(zip(ColumnSettings.model_fields, names, strict=True)))


def _score(
    console: Console,
    source: "Text",
    *,
    window: int | None,
    stride: int | None,
    batch_size: int,
    max_tokens: int | None,
    options: "Options",
    bf16: bool,
) -> dict[str, Any]:
    """What the model scores on the text, and what it is."""
    import torch

    from inl_core.inference import evaluate as evaluation
    from inl_core.inference.texts import default_window

    loaded = source.loaded
    window = default_window(loaded) if window is None else window
    batches = source.windows(window=window, stride=stride, batch_size=batch_size, max_tokens=max_tokens)
    counts = source.byte_counts(max_tokens)
    iterations = options.num_iterations if isinstance(options.num_iterations, int) else None
    scores = evaluation.evaluate(
        loaded.model,
        _counted(console, batches, min(source.num_targets, max_tokens or source.num_targets)),
        counts.token_num_bytes,
        num_bytes=counts.num_bytes,
        num_iterations=iterations,
        early_stopping=options.early_stopping,
        autocast=torch.autocast(loaded.model.embedding.table.weight.device.type, torch.bfloat16, enabled=bf16),
    )
    if not math.isfinite(scores.loss):
        raise NonFiniteError(
            f"{loaded.path}: its loss on {source.name} is {scores.loss:g}; the model overflows there, so use an "
            "earlier checkpoint"
        )
    return {
        "checkpoint": loaded.path,
        "step": loaded.step,
        "text": source.name,
        "window": window,
        "stride": stride or window,
        "max_iterations": evaluation.most_iterations(loaded.model, iterations),
        **asdict(scores),
    }


def _task_names(
    tasks: str | None,
    task_path: Path | None,
    trust_task_code: bool,
    *,
    others: tuple[object, ...],
    settings: tuple[object, ...],
) -> list[str]:
    """The tasks that were asked for; together with what scores a text they are refused, as are their settings alone."""
    if trust_task_code and task_path is None:
        raise RecipeError("--trust-task-code is about --task-path: give it, too")
    if tasks is None:
        if any(value is not None for value in (task_path, *settings)):
            raise RecipeError("--task-path, --num-fewshot and --limit are about --tasks: give it, too")
        return []
    if any(value is not None for value in others):
        raise RecipeError("--tasks with --data, --text, --window, --stride or --max-tokens: those score a text; choose")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise RecipeError("--tasks: names no task")
    check_task_folder(task_path)
    from inl_core.interop.harness import check_folder, require_harness

    require_harness()
    if task_path is not None:
        check_folder(task_path)
    return names


def _counted(console: Console, batches: "Iterator[Batch]", total: int) -> "Iterator[Batch]":
    """The batches, while the console shows how many tokens are done."""
    done = 0
    with console.progress() as progress:
        progress.start("evaluating", "tokens")
        for batch in batches:
            yield batch
            done += batch.num_targets
            progress.update(done, total)


def _show(console: Console, result: dict[str, Any]) -> None:
    stride, window = result["stride"], result["window"]
    context = f"windows of {window:,} tokens, stride {stride:,}"
    bits = ("-", "this tokenizer does not tell the bytes of the tokens scored")
    if result["bits_per_byte"] is not None:
        bits = (f"{result['bits_per_byte']:.4f}", f"over {result['bytes']:,} bytes of text")
    rows = [
        ("loss", f"{result['loss']:.4f}", "nats per token"),
        ("perplexity", f"{result['perplexity']:.2f}", "per token"),
        ("bits per byte", *bits),
        ("accuracy", f"{result['accuracy']:.2%}", f"of {result['tokens']:,} tokens"),
    ]
    if result["max_iterations"]:
        rows.append(
            ("iterations", f"{result['iterations']:.2f}", f"a token and layer, at most {result['max_iterations']:g}")
        )
    rows.append(("time", f"{result['seconds']:.1f} s", f"{result['tokens'] / result['seconds']:,.0f} tokens/s"))
    console.table(f"{result['checkpoint']} on {result['text']}\n{context}", ("", "score", ""), rows)
