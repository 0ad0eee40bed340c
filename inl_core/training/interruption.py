"""SIGINT and SIGTERM become a request that the training loop honours between two steps."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class StopSignal:
    """While entered, the first signal sets `requested`; a second one interrupts at once, in the usual way."""

    def __init__(self) -> None:
        self.requested, self.name = False, "another process"
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            return self  # Python lets only the main thread listen
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested, self.name = True, signal.Signals(number).name
