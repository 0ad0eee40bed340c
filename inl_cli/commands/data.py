"""`inl prepare-data`: text -> a prepared data set, and the progress that `inl train` shows when it prepares one."""

import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from inl_cli.console import Console, errors_to_exit_codes
from inl_cli.early import check_file, check_text
from inl_cli.options import (
    CompletionColumnOption,
    JsonOption,
    MessagesColumnOption,
    PromptColumnOption,
    QuietOption,
    TextColumnOption,
    path_option,
)
from inl_core.errors import Interrupted, RecipeError

if TYPE_CHECKING:
    from inl_core.corpus.manifest import Manifest
    from inl_core.corpus.preparation import Part, PartSummary, PrepareProgress
    from inl_core.recipe import DataSettings

Result = TypeVar("Result")
_MOST_PARTS = 99_999
_STAGES = {
    "hash": ("hashing the sources", "B"),
    "read": ("reading", "B"),
    "tokenizer": ("training the tokenizer", "B"),
    "tokenise": ("tokenising", "B"),
    "shards": ("writing shards", "shards"),
}

SourcesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE",
        help="Files, directories with all below them, globs, - for stdin, or builtin:python. "
        "Text, .jsonl, .json (an array) and .parquet; .gz and .zst too.",
    ),
]
OutputOption = Annotated[
    Path | None, path_option("--output", help="The data set's directory; derived as data/NAME when not given.")
]
VocabSizeOption = Annotated[int, typer.Option(help="Size of the tokenizer to train, special tokens included.")]
TokenizerOption = Annotated[Path | None, path_option("--tokenizer", help="Use this tokenizer.json and train none.")]
FractionOption = Annotated[float, typer.Option(help="Share of the documents held out, chosen by a hash of their text.")]
ShardsOption = Annotated[int, typer.Option(help="Training shards; documents go to them by hash.")]
BadRatioOption = Annotated[float, typer.Option(help="Fail when a larger share of the rows is unreadable.")]
WeightOption = Annotated[
    list[float] | None,
    typer.Option(
        "--weight", metavar="X", help="How often a source is taken, as 2 or 0.5; once for each source, in their order."
    ),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace another data set in the directory.")]
PartOption = Annotated[
    str | None,
    typer.Option(
        "--part", metavar="I/N", help="Prepare part I of N, from 1/N to N/N: one for each machine or task of an array."
    ),
]
FinishOption = Annotated[bool, typer.Option("--finish", help="Join the parts, when all of them are prepared.")]


@errors_to_exit_codes
def prepare_data(
    sources: SourcesArgument,
    output: OutputOption = None,
    vocab_size: VocabSizeOption = 2048,
    tokenizer: TokenizerOption = None,
    validation_fraction: FractionOption = 0.05,
    num_shards: ShardsOption = 8,
    max_bad_ratio: BadRatioOption = 0.01,
    weights: WeightOption = None,
    text_column: TextColumnOption = None,
    prompt_column: PromptColumnOption = None,
    completion_column: CompletionColumnOption = None,
    messages_column: MessagesColumnOption = None,
    overwrite: OverwriteOption = False,
    part: PartOption = None,
    finish: FinishOption = False,
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Turn text into a tokenizer and verified token shards; a stopped run goes on when started again."""
    console = Console(json=json, quiet=quiet)
    if (is_new := output is None or not (output / "manifest.json").exists()) and part is None and not finish:
        for source in sources:
            check_text(source)
    check_file(tokenizer if is_new else None, "missing")
    from inl_core.corpus import preparation
    from inl_core.corpus.manifest import default_directory
    from inl_core.corpus.reading.paths import portable

    columns = {"text": text_column, "prompt": prompt_column}
    columns |= {"completion": completion_column, "messages": messages_column}
    settings = _settings(
        columns=columns,
        weights=tuple(weights or ()),
        sources=tuple(map(portable, sources)),
        tokenizer={"vocab_size": vocab_size, "file": tokenizer},
        validation_fraction=validation_fraction,
        num_shards=num_shards,
        max_bad_ratio=max_bad_ratio,
    )
    directory = output or default_directory(settings)
    if part is not None:
        wanted = _part(part, finish=finish)
        summary = _with_progress(
            directory,
            console,
            lambda report: preparation.prepare_part(settings, directory, wanted, progress=report, overwrite=overwrite),
        )
        _tell_part(wanted, summary, directory, console)
        return
    prepare = preparation.finish if finish else preparation.prepare
    manifest = _with_progress(
        directory, console, lambda report: prepare(settings, directory, progress=report, overwrite=overwrite)
    )
    console.result(_summary(manifest, directory), lambda: _show(manifest, directory, console))


def _part(text: str, *, finish: bool) -> "Part":
    from inl_core.corpus.preparation import Part

    if finish:
        raise RecipeError("--part and --finish: give one of them; --finish joins the parts when all are prepared")
    match = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text)
    number, count = map(int, match.groups()) if match else (0, 0)
    if not 1 <= number <= count:
        raise RecipeError(f"--part: {text[:40]!r} is no part; write I/N, from 1/N to N/N, with N up to {_MOST_PARTS:,}")
    return Part(number, count)


def prepare_with_progress(
    settings: "DataSettings", directory: Path, console: Console, *, wait: bool = False
) -> "Manifest":
    """Prepare a data set while the console shows how far it is; Interrupted on Ctrl-C, which loses nothing.

    `wait` waits for another process that prepares the same.
    """
    from inl_core.corpus.preparation import prepare

    return _with_progress(directory, console, lambda report: prepare(settings, directory, progress=report, wait=wait))


def _with_progress(
    directory: Path, console: Console, run: Callable[[Callable[["PrepareProgress"], None]], Result]
) -> Result:
    stage = ""
    with console.progress() as progress:

        def report(event: "PrepareProgress") -> None:
            nonlocal stage
            if event.message:
                console.info(event.message)
            elif event.stage in _STAGES:
                if event.stage != stage:
                    stage = event.stage
                    progress.start(*_STAGES[stage])
                progress.update(event.done, event.total)

        try:
            return run(report)
        except KeyboardInterrupt:
            raise Interrupted(f"{directory}: stopped; the same command goes on where it was") from None


def _settings(**values: Any) -> "DataSettings":
    """Validated settings; problems are reported under the names of the options."""
    from pydantic import ValidationError

    from inl_core.recipe import DataSettings
    from inl_core.recipe.problems import find_problems

    try:
        return DataSettings(**values)
    except ValidationError as error:
        options = {"file": "--tokenizer", "sources": "SOURCE", "weights": "--weight"}
        options |= {name: f"--{name}-column" for name in ("text", "prompt", "completion", "messages")}
        named = []
        for path, message in find_problems(error, DataSettings).items():
            keys = [str(part) for part in path if isinstance(part, str)]  # a number is a place in the list of sources
            key = keys[-1] if keys else "sources"
            named.append(f"{options.get(key, '--' + key.replace('_', '-'))}: {message}")
        raise RecipeError("\n".join(named)) from None


def _tell_part(part: "Part", summary: "PartSummary | None", directory: Path, console: Console) -> None:
    if summary is None:
        result: dict[str, Any] = {"part": str(part), "is_complete": True}
        text = f"{directory}: the data set is complete, nothing is left to do for part {part}"
    else:
        result = asdict(summary) | {"is_complete": False}
        end = "" if summary.is_tokenised else "; --finish will tokenise it"
        text = (
            f"{directory}: part {part}: {summary.documents:,} documents, {summary.bytes:,} bytes of text from "
            f"{summary.num_sources:,} files{end}"
        )
    console.result({"directory": str(directory), **result}, lambda: console.write(text + "\n"))


def _summary(manifest: "Manifest", directory: Path) -> dict[str, Any]:
    """The manifest without its lists of files, which may be long; manifest.json in the directory has them."""
    plain = manifest.model_dump(mode="json", exclude={"sources": True, "splits": {"__all__": {"shards"}}})
    return {"directory": str(directory), "num_sources": len(manifest.sources), **plain}


def _show(manifest: "Manifest", directory: Path, console: Console) -> None:
    rows = [(name, split.documents, split.tokens, split.bytes) for name, split in manifest.splits.items()]
    console.table(f"{directory}", ("split", "documents", "tokens", "bytes of text"), rows)
    console.write(
        f"vocabulary {manifest.vocab_size:,}   duplicates dropped {manifest.duplicates:,}   "
        f"empty {manifest.empty:,}   unreadable rows {manifest.quarantined:,}\n"
    )
    console.write(f"fingerprint {manifest.fingerprint[:16]}\n")
