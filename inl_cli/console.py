"""The one place that talks to the user: stdout, stderr, tables, progress, --json, and errors -> exit codes.

- Data goes to stdout, everything else to stderr; with --json stdout carries one object and nothing else.
- Colour and live bars only on a terminal; elsewhere plain lines. NO_COLOR is respected.
- Of several processes (inl_core/launcher.py) only the first talks. Two things every process shows: the traceback of a
  crash, and an error that may concern its machine alone (its disk, its copy of a file).
- rich is imported only when something needs it, so that `inl --help` is instant.
"""

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TextIO, TypeVar

import typer

from inl_cli.memory import describe_out_of_memory, is_out_of_memory
from inl_cli.progress import LineProgress, Progress, open_bar
from inl_core.errors import (
    ArtefactError,
    ExecutionWarning,
    InlError,
    Interrupted,
    NonFiniteError,
    RecipeError,
    RecipeWarning,
)
from inl_core.files import describe_os_error, expand_home, shortened
from inl_core.launcher import place_or_alone

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

EXIT_FAILURE = 1
EXIT_CODES: tuple[tuple[type[InlError], int], ...] = (
    (RecipeError, 2),
    (NonFiniteError, 3),
    (ArtefactError, 4),
    (Interrupted, 75),
)
_WIDTH_OFF_TERMINAL = 160
_MOST_ERROR_LINES, _LONGEST_ERROR_LINE = 40, 1000
_CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if code != 9}

P = ParamSpec("P")
R = TypeVar("R")


class Console:
    """What one command prints. `quiet` drops information and progress; warnings, results and errors stay."""

    def __init__(self, *, json: bool = False, quiet: bool = False) -> None:
        self.json = json
        self.quiet = quiet
        self.is_main = is_main_process()

    @property
    def is_live(self) -> bool:
        """Whether bars and live views may be drawn (on stderr)."""
        return self.is_main and not self.quiet and _is_terminal(sys.stderr)

    @functools.cached_property
    def rich_stdout(self) -> "RichConsole":
        """Rich's console for data."""
        return _rich_console(sys.stdout, quiet=not self.is_main or self.json)

    @functools.cached_property
    def rich_stderr(self) -> "RichConsole":
        """Rich's console for everything else: live views, tables of information."""
        return _rich_console(sys.stderr, quiet=not self.is_main or self.quiet)

    def info(self, text: str) -> None:
        """A line of information, on stderr."""
        if self.is_main and not self.quiet:
            _write_line(sys.stderr, text)

    def warn(self, text: str) -> None:
        """A warning, on stderr, also under --quiet."""
        if self.is_main:
            _write_line(sys.stderr, f"warning: {text}", style="yellow")

    def write(self, text: str) -> None:
        """Text on stdout as it is, without adding a line end, at once; nothing under --json."""
        if self.is_main and not self.json:
            sys.stdout.write(text)
            sys.stdout.flush()

    def table(self, title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], *, is_data: bool = True) -> None:
        """A table, on stdout when it is data; columns whose cells are all numbers are set to the right."""
        from rich import box
        from rich.table import Table

        cells = [[format_value(cell) for cell in row] for row in rows]
        table = Table(box=box.SIMPLE_HEAD, show_header=any(columns), show_edge=False, pad_edge=False)
        for index, name in enumerate(columns):
            numeric = bool(cells) and all(_looks_numeric(row[index]) for row in cells)
            table.add_column(name, justify="right" if numeric else "left")
        for row in cells:
            table.add_row(*(_plain_text(cell) for cell in row))
        console = self.rich_stdout if is_data else self.rich_stderr
        if title:  # printed here: rich would break the table's own title at the table's width
            console.print(_plain_text(title), style="bold", soft_wrap=True)
        if console.is_terminal:
            console.print(table)
            return
        with console.capture() as captured:
            console.print(table)
        for line in captured.get().splitlines():  # in a file the spaces that fill a row up are in the way
            console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)

    def result(self, data: Any, render: Callable[[], None]) -> None:
        """The command's outcome: `data` as one JSON object under --json, else whatever `render` prints."""
        if not self.is_main:
            return
        if self.json:
            _write_line(sys.stdout, _json_text(to_plain(data), sys.stdout.encoding))
        else:
            render()

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A bar on a terminal, plain lines elsewhere, nothing under --quiet; both go on while nothing is told.

        `with console.progress() as progress: progress.start("reading", "B"); progress.update(done, total)`
        """
        if self.quiet or not self.is_main:
            yield Progress()
        elif self.is_live:
            with open_bar(self.rich_stderr) as bar:
                yield bar
        else:
            with LineProgress(self.info).ticking() as lines:
                yield lines


def errors_to_exit_codes(command: Callable[P, R]) -> Callable[P, R]:
    """Decorate a command: a user's error becomes its lines on stderr and its exit code, a bug keeps its traceback.

    `~` is expanded in every argument that is a Path, since no shell does it behind `--output=` or in quotes.
    """

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            for name, value in kwargs.items():
                if isinstance(value, Path):
                    kwargs[name] = expand_home(value)
                elif isinstance(value, list):
                    kwargs[name] = [expand_home(item) if isinstance(item, Path) else item for item in value]
            with _own_warnings_shown():
                return command(*args, **kwargs)
        except InlError as error:
            if is_main_process():
                show_error(_escaped(str(error), kwargs.values()))
            elif isinstance(error, ArtefactError) and not error.is_shared:
                show_error(_escaped(f"rank {place_or_alone().rank}: {error}", kwargs.values()))
            raise typer.Exit(exit_code(error)) from None
        except BrokenPipeError:
            raise  # `inl ... | head`: Typer ends quietly
        except OSError as error:
            # Shown by every process: a full disk or a missing right may concern one machine only.
            show_error(_escaped(describe_os_error(error), kwargs.values()))
            raise typer.Exit(EXIT_FAILURE) from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            show_error(describe_out_of_memory(error, command))  # by every process, too
            raise typer.Exit(EXIT_FAILURE) from None

    run.__dict__["maps_errors"] = True
    return run


@contextmanager
def _own_warnings_shown() -> Iterator[None]:
    """A warning of the project's own becomes a line of the console; Python shows all others as before."""
    with warnings.catch_warnings():
        show_other = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, RecipeWarning | ExecutionWarning):
                Console().warn(str(message))
            else:
                show_other(message, category, *place)

        warnings.showwarning = show
        yield


def exit_code(error: InlError) -> int:
    """The exit code of a user's error."""
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), EXIT_FAILURE)


def is_main_process() -> bool:
    """Whether this is the process that talks: the only one, or rank 0 of several."""
    return place_or_alone().rank == 0


def format_value(value: Any) -> str:
    """One table cell: whole numbers grouped, others to four significant digits, None as a dash."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def to_plain(value: Any) -> Any:
    """Anything a command returns as JSON values; what JSON has no word for (NaN, infinity) becomes null."""
    from pydantic_core import to_jsonable_python

    def of_array(unknown: Any) -> Any:  # numpy and torch
        if hasattr(unknown, "tolist"):
            return unknown.tolist()
        raise TypeError(f"{type(unknown).__name__} cannot be written as JSON")

    if isinstance(value, Mapping):  # pydantic refuses keys that are not UTF-8, which a damaged file may have
        return {str(key): to_plain(item) for key, item in value.items()}
    return to_jsonable_python(value, inf_nan_mode="null", fallback=of_array)


def _json_text(value: Any, encoding: str | None) -> str:
    """JSON with its characters as they are, or escaped where the stream cannot write one of them."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, allow_nan=False)
    return text


def show_error(text: str) -> None:
    """What went wrong, on stderr; long texts are shortened, and control characters are spelt out."""
    with suppress(OSError):
        sys.stdout.flush()  # so that on a terminal the error comes after the output
    lines = text.split("\n")
    if len(lines) > _MOST_ERROR_LINES:
        lines[_MOST_ERROR_LINES - 1 :] = [f"... and {len(lines) - _MOST_ERROR_LINES + 1:,} more lines"]
    shown = (shortened(line, _LONGEST_ERROR_LINE).translate(_CONTROL_CHARACTERS) for line in lines)
    _write_line(sys.stderr, "\n".join(shown), style="red")


def _escaped(text: str, given: Iterable[Any]) -> str:
    """A message in which no argument of the command has a line end: a problem is one line, whatever a file's name."""
    for value in given:
        if isinstance(value, list):
            text = _escaped(text, value)
        elif isinstance(value, Path | str) and "\n" in str(value).strip():
            text = text.replace(str(value), str(value).translate(_CONTROL_CHARACTERS))
    return text


def _write_line(stream: TextIO, text: str, *, style: str = "") -> None:
    """A line, coloured only on a terminal; nothing in the text is taken for markup."""
    if style and _is_terminal(stream) and not os.environ.get("NO_COLOR"):
        _rich_console(stream).print(_plain_text(text), style=style, soft_wrap=True)
    else:
        stream.write(text + "\n")
        stream.flush()


def _rich_console(stream: TextIO, *, quiet: bool = False) -> "RichConsole":
    from rich.console import Console as RichConsole

    is_terminal = _is_terminal(stream)
    width = None if is_terminal else _WIDTH_OFF_TERMINAL
    return RichConsole(
        file=stream, quiet=quiet, width=width, highlight=False, markup=False, emoji=False, force_terminal=is_terminal
    )


def _plain_text(text: str) -> Any:
    from rich.text import Text

    return Text(text)


def _looks_numeric(text: str) -> bool:
    return text == "-" or text.lstrip("+-")[:1].isdigit()


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"
