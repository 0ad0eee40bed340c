"""Python loads this when it starts: a process stops at a chosen row of metrics until the test has done its work.

PAUSE_ROW says which of the rows that this process writes it is. The process writes to the FIFO STANDIN/reached, and
reads from STANDIN/go.
"""

import os
import sys

_row, _at = int(os.environ.get("PAUSE_ROW") or 0), os.environ.get("STANDIN", "")
_count = 0


def _pause(event: str, arguments: tuple) -> None:
    global _count
    is_row = event == "open" and str(arguments[0]).endswith("metrics.jsonl") and arguments[2] & os.O_APPEND
    if not is_row:
        return
    _count += 1
    if _count == _row:
        os.write(os.open(f"{_at}/reached", os.O_WRONLY), b"x")
        os.read(os.open(f"{_at}/go", os.O_RDONLY), 1)


if _row:
    sys.addaudithook(_pause)
