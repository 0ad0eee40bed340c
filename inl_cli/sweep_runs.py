"""The sessions of `inl sweep`: each run is an `inl train` of its own, started when the one before it has ended."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from inl_core.errors import Interrupted
from inl_core.training.interruption import SIGNALS

STOPPED = 75
"""The exit code of a session that was stopped and can go on."""


class Sessions:
    """Starts sessions one at a time, and passes on to them the signals that ask this process to stop.

    A session is not in this process's group: the terminal's Ctrl-C would reach it twice, which means to end unsaved.
    """

    def __init__(self) -> None:
        self._session: subprocess.Popen[bytes] | None = None
        self._asked: int | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this is entered, a signal asks the session, and not this process, to save and leave."""
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        previous = {number: signal.signal(number, self._pass_on) for number in heard}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def train(self, arguments: Sequence[str]) -> int:
        """Run `inl` with these arguments until it ends; what it shows on stderr is seen, its result is not.

        Returns:
            Its exit code, or the negative number of the signal that killed it.

        Raises:
            Interrupted: it was asked to stop, or its time was up.
        """
        if self._asked is None:
            command = [sys.executable, "-m", "inl_cli", *arguments]
            quiet = subprocess.DEVNULL
            self._session = subprocess.Popen(command, stdin=quiet, stdout=quiet, start_new_session=True)
            if self._asked is not None:  # the signal came while it was being started
                self._session.send_signal(self._asked)
            code = self._session.wait()
            self._session = None
            if self._asked is None and code != STOPPED:
                return code
        raise Interrupted("the sweep was stopped; the same command goes on")

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._asked = number
        if self._session is not None:
            self._session.send_signal(number)
