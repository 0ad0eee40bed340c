"""How far a long piece of work is: a bar on a terminal, a plain line per interval elsewhere, or nothing."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress as RichProgress

_SECONDS_BETWEEN_LINES = 10.0
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


class Progress:
    """What a command tells of its work, piece after piece. This class itself shows nothing of it."""

    def start(self, description: str, unit: str = "") -> None:
        """A new piece of work; unit "B" shows sizes, any other word is put behind the numbers."""

    def update(self, done: float, total: float | None = None) -> None:
        """`done` of `total` (None while unknown) of this piece."""


class LineProgress(Progress):
    """At most one line in ten seconds; a piece of work that is over sooner shows none."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.write = write
        self.clock = clock
        self.start("working")

    def start(self, description: str, unit: str = "") -> None:
        """A new piece of work."""
        self.description, self.unit = description, unit
        self._started = self._last = self.clock()

    def update(self, done: float, total: float | None = None) -> None:
        """Write a line when the interval is over."""
        now = self.clock()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        share = f" of {amount(total, self.unit)} ({done / total:.0%})" if total else ""
        self.write(f"{self.description}: {amount(done, self.unit)}{share}, {now - self._started:.0f} s")


class BarProgress(Progress):
    """A rich bar that each piece of work starts anew."""

    def __init__(self, bar: "RichProgress") -> None:
        self.bar = bar
        self.unit = ""
        self.task = bar.add_task("", total=None, amounts="")

    def start(self, description: str, unit: str = "") -> None:
        """A new piece of work."""
        self.unit = unit
        self.bar.reset(self.task, description=description, total=None, amounts="")

    def update(self, done: float, total: float | None = None) -> None:
        """Move the bar."""
        share = f" / {amount(total, self.unit)}" if total else ""
        self.bar.update(self.task, completed=done, total=total, amounts=f"{amount(done, self.unit)}{share}")


@contextmanager
def open_bar(console: "RichConsole") -> Iterator[BarProgress]:
    """A bar that disappears from the terminal when the work is done."""
    from rich import progress

    texts = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[amounts]}"),
    )
    times = (progress.TimeElapsedColumn(), progress.TimeRemainingColumn())
    with progress.Progress(*texts, *times, console=console, transient=True) as bar:
        yield BarProgress(bar)


def amount(number: float, unit: str) -> str:
    """`12.3 MB` for unit "B", else `12,345 documents`."""
    if unit != "B":
        return f"{number:,.0f} {unit}".strip()
    power = 0
    while number >= 1000 and power < len(_BYTE_UNITS) - 1:
        number, power = number / 1000, power + 1
    return f"{number:.1f} {_BYTE_UNITS[power]}" if power else f"{number:.0f} B"
