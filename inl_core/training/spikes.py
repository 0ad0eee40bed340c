"""Warnings of a loss that jumps, by a plain rule over the rows of metrics.jsonl.

    loss > mean + max(6 std, mean / 20), of the 20 rows before

- A jump is among the rows that later ones are compared with, so it is warned of once, and a loss that stays high is the
  new normal after a while.
- A resumed session knows no rows at first, so it warns from its 21st on.
"""

import statistics
from collections import deque
from collections.abc import Callable

_ROWS, _DEVIATIONS, _LEAST_SHARE = 20, 6.0, 0.05


class SpikeWatch:
    """Hears the loss of each row, and warns of a spike."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.warn = warn
        self._losses: deque[float] = deque(maxlen=_ROWS)

    def hear(self, step: int, loss: float) -> None:
        """Judge the finite loss of the row of `step` by the rows before, and add it to them."""
        if len(self._losses) == _ROWS:
            mean, deviation = statistics.fmean(self._losses), statistics.pstdev(self._losses)
            if loss > mean + max(_DEVIATIONS * deviation, _LEAST_SHARE * mean):
                self.warn(
                    f"step {step}: the loss jumped to {loss:.4f}, from {mean:.4f} with a standard deviation of "
                    f"{deviation:.4f} in the {_ROWS} rows before; should it not come down again, an earlier checkpoint "
                    "and a lower training.optimizer.learning_rate help"
                )
        self._losses.append(loss)
