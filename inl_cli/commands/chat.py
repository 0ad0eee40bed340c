"""`inl chat`: a conversation with a model, on a terminal or line by line from stdin."""

import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from inl_cli.console import Console, errors_to_exit_codes
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
from inl_core.errors import RecipeError
from inl_core.inference.settings import GenerationSettings

if TYPE_CHECKING:
    from inl_core.inference.chat import Chat

_DEFAULTS = GenerationSettings()
_LONGEST_LINE = 1 << 20
"""Bytes of a line from a pipe: far more than a message that fits a context."""
_HELP = "/reset forgets what was said, /exit ends"

SystemOption = Annotated[
    str | None, typer.Option("--system", help="The system's message, which stands before the conversation.")
]


@errors_to_exit_codes
def chat(
    checkpoint: CheckpointArgument = None,
    system: SystemOption = None,
    max_new_tokens: MaxNewTokensOption = _DEFAULTS.max_new_tokens,
    temperature: TemperatureOption = _DEFAULTS.temperature,
    top_k: TopKOption = None,
    top_p: TopPOption = None,
    min_p: MinPOption = None,
    repetition_penalty: PenaltyOption = _DEFAULTS.repetition_penalty,
    seed: SeedOption = _DEFAULTS.seed,
    iterations: IterationsOption = None,
    no_early_stopping: NoEarlyStoppingOption = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Talk with a model that was trained on conversations: a line is a message, the answer comes as it is made.

    /reset forgets what was said, /exit ends, Ctrl-C ends an answer. From a pipe, each line of stdin is a message:

    printf 'What is a list?\\n' | inl chat runs/tiny-chat --temperature 0
    """
    console = Console(json=json, quiet=quiet)
    settings = GenerationSettings(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, seed)
    for remark in settings.without_effect():
        console.warn(remark)
    loaded = open_model(console, checkpoint, device, iterations=iterations)
    from inl_core.inference.chat import Chat
    from inl_core.training.precision import is_bf16

    bf16 = is_bf16(precision, loaded.model.embedding.table.weight.device)
    settings = replace(settings, num_iterations=iterations, early_stopping=not no_early_stopping, bf16=bf16)
    talk = Chat(loaded, settings, system=system)
    if not talk.is_trained:
        console.warn(f"{loaded.path}: has no chat template, so it was hardly trained to answer; ours is taken")
    _converse(console, talk)
    data = {"checkpoint": loaded.path, "step": loaded.step, "settings": settings, "messages": talk.messages}
    console.result(data, lambda: None)


def _converse(console: Console, chat: "Chat") -> None:
    is_terminal = sys.stdin.isatty()
    for line in _typed_lines(console) if is_terminal else _piped_lines(console):
        command, *_ = line.split(maxsplit=1)
        if command == "/exit":
            return
        if command == "/reset":
            chat.reset()
            console.info("forgotten; a new conversation begins")
        elif line.startswith("/"):
            console.warn(f"{command}: no such command: {_HELP}; a space before it makes it a message")
        else:
            try:
                _answer(console, chat, line)
            except RecipeError as error:
                if not is_terminal:
                    raise
                console.warn(str(error))


def _answer(console: Console, chat: "Chat", line: str) -> None:
    """Show one answer as it comes; Ctrl-C ends it, and what was said stays said."""
    try:
        with closing(chat.answer(line)) as pieces:
            for text in pieces:
                console.write(text)
    except KeyboardInterrupt:
        pass
    console.write("\n")
    if chat.num_left_out:
        console.info(f"(the oldest {chat.num_left_out} messages did not fit the model's context)")
    if chat.completion is not None and chat.completion.finish_reason != "eos":
        reason = "--max-new-tokens" if chat.completion.finish_reason == "length" else "the end of the model's context"
        console.info(f"(cut off at {reason})")


def _typed_lines(console: Console) -> Iterator[str]:
    """What the user types, until Ctrl-D or Ctrl-C; blank lines are passed over."""
    import readline  # noqa: F401  (gives input() its editing keys and history)

    console.info(_HELP)
    while True:
        try:
            line = input("> ")
        except (EOFError, KeyboardInterrupt):
            console.write("\n")
            return
        if line.strip():
            yield line


def _piped_lines(console: Console) -> Iterator[str]:
    stdin, number = sys.stdin.buffer, 0
    while line := stdin.readline(_LONGEST_LINE + 1):
        number += 1
        if len(line) > _LONGEST_LINE:
            console.warn(f"stdin: line {number:,} is longer than {_LONGEST_LINE:,} bytes, and is passed over")
            while line and not line.endswith(b"\n"):
                line = stdin.readline(_LONGEST_LINE)
            continue
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            raise RecipeError(f"stdin: line {number:,} is not UTF-8 text; convert it first") from None
        if text.strip():
            yield text
