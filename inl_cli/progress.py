"""How far a long piece of work is: a bar on a terminal, a plain line per interval elsewhere, or nothing."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress as RichProgress

_SECONDS_BETWEEN_LINES = 10.0
_SECONDS_TO_FIRST_LINE = 1.0
_BYTE_UNITS = ("B", "kB", "MB", "GB", "TB")


class Progress:
    """What a command tells of its work, piece after piece. This class itself shows nothing of it."""

    def start(self, description: str, unit: str = "") -> None:
        """A new piece of work; unit "B" shows sizes, any other word is put behind the numbers."""

    def update(self, done: float, total: float | None = None) -> None:
        """`done` of `total` (None while unknown) of this piece."""


class LineProgress(Progress):
    """A line after a second, then one in ten seconds; a piece of work that is over sooner shows none.

    While `ticking`, lines go on where nothing is told for long, as when a library works on one thing for a minute.
    """

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self.write = write
        self.clock = clock
        self._lock = threading.Lock()
        self.start("working")
        self._next = math.inf  # until there is work

    def start(self, description: str, unit: str = "") -> None:
        """A new piece of work."""
        with self._lock:
            self.description, self.unit, self.done, self.total = description, unit, 0.0, None
            self._started = self.clock()
            self._next = self._started + _SECONDS_TO_FIRST_LINE

    def update(self, done: float, total: float | None = None) -> None:
        """Write a line when the interval is over."""
        self.done, self.total = done, total
        self.tick()

    def tick(self) -> None:
        """Write a line when the interval is over, with what was told last."""
        with self._lock:
            now, done, total = self.clock(), self.done, self.total
            if now < self._next:
                return
            self._next = now + _SECONDS_BETWEEN_LINES
            share = f" of {amount(total, self.unit)} ({done / total:.0%})" if total else ""
            self.write(f"{self.description}: {amount(done, self.unit)}{share}, {now - self._started:.0f} s")

    @contextmanager
    def ticking(self) -> Iterator["LineProgress"]:
        """Ticks every second, from a thread of its own."""
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(1.0):
                self.tick()

        thread = threading.Thread(target=run, name="progress", daemon=True)
        thread.start()
        try:
            yield self
        finally:
            ended.set()
            thread.join()


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
