"""`inl generate`: prompts -> text, streamed."""

import time
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.early import check_checkpoint
from inl_cli.loading import open_model
from inl_cli.options import (
    CheckpointArgument,
    DeviceOption,
    IterationsOption,
    JsonOption,
    MaxNewTokensOption,
    MinPOption,
    NoEarlyStoppingOption,
    PenaltyOption,
    PrecisionOption,
    QuietOption,
    SeedOption,
    TemperatureOption,
    TopKOption,
    TopPOption,
)
from inl_core.inference.settings import GenerationSettings

if TYPE_CHECKING:
    from inl_core.inference.loading import LoadedModel

_DEFAULTS = GenerationSettings()

PromptOption = Annotated[
    list[str] | None, typer.Option("--prompt", help="Text to continue; may be repeated; default: begin a new text.")
]
PromptFileOption = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Prompts in any form that prepare-data reads, or - for stdin: of text every line that is not blank, "
        'of JSON Lines a string or {"prompt": ...} a line, of Parquet the column prompt.',
    ),
]
NumSamplesOption = Annotated[int, typer.Option(help="Completions of each prompt.")]
StopOption = Annotated[list[str] | None, typer.Option(help="End before this string; may be repeated.")]
CompileOption = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Decode with generated kernels: faster, after tens of seconds of compiling; for long or many texts.",
    ),
]
NoBosOption = Annotated[
    bool, typer.Option("--no-bos", help="Do not begin the prompt with the token that begins a document in training.")
]
ShowIterationsOption = Annotated[
    bool, typer.Option("--show-iterations", help="Colour each token by the mean integrator iterations it took.")
]


@errors_to_exit_codes
def generate(
    checkpoint: CheckpointArgument = None,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    max_new_tokens: MaxNewTokensOption = _DEFAULTS.max_new_tokens,
    temperature: TemperatureOption = _DEFAULTS.temperature,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = _DEFAULTS.repetition_penalty,
    seed: SeedOption = _DEFAULTS.seed,
    num_samples: NumSamplesOption = _DEFAULTS.num_samples,
    stop: StopOption = None,
    iterations: IterationsOption = None,
    no_early_stopping: NoEarlyStoppingOption = False,
    no_bos: NoBosOption = False,
    show_iterations: ShowIterationsOption = False,
    compile: CompileOption = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Continue text: each prompt is printed with what the model makes of it, as it comes."""
    console = Console(json=json, quiet=quiet)
    check_checkpoint(checkpoint)
    settings = GenerationSettings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
        num_samples=num_samples,
        num_iterations=iterations,
        early_stopping=not no_early_stopping,
        bos=not no_bos,
        compiled=compile,
    )
    prompts = _prompts(console, prompt, prompt_file)
    for remark in settings.without_effect():
        console.warn(remark)
    loaded = open_model(console, checkpoint, device, iterations=iterations)
    from inl_core.training.precision import is_bf16

    bf16 = is_bf16(precision, loaded.model.embedding.table.weight.device)
    _run(console, loaded, prompts, replace(settings, bf16=bf16), show_iterations)


def _run(
    console: Console, loaded: "LoadedModel", prompts: list[str], settings: GenerationSettings, show_iterations: bool
) -> None:
    from inl_cli.generation_view import CompletionView
    from inl_core.inference.generate import stream

    view = CompletionView(console, loaded, settings, prompts=prompts, show_iterations=show_iterations)
    start = time.perf_counter()
    completions = view.show(stream(loaded.model, loaded.tokenizer, prompts, settings))
    seconds = time.perf_counter() - start
    data = {
        "checkpoint": loaded.path,
        "step": loaded.step,
        "settings": settings,
        "max_iterations": view.max_iterations or None,
        "seconds": seconds,
        "completions": [asdict(one) | ({} if view.max_iterations else {"iterations": None}) for one in completions],
    }
    console.result(data, lambda: None)
    console.info(view.summary(completions, seconds))


def _prompts(console: Console, given: list[str] | None, file: str | None) -> list[str]:
    """All prompts, from the options and the file; one empty prompt when there is neither."""
    from inl_core.corpus.reading.whole_sources import check_utf8, read_prompts

    prompts = list(given or [])
    for prompt in prompts:
        check_utf8(prompt, "--prompt")
    if file is not None:
        prompts += read_prompts(file, note=console.info)
    return prompts or [""]
