"""Statistics of a stream: the mean exactly, percentiles within 1%, in memory that does not grow.

- A percentile comes from a histogram. A value's bin is its exponent and the first 6 bits of its fraction, as float32
  stores them: a bin is at most 1/64 of the value wide, so its middle is off by less than 0.8%. The result does not
  depend on how the stream was cut into batches.
- Values below 2^-40 (1e-12) count as 0. Values that are not finite are counted and kept out of everything else.
"""

import math

import torch
from torch import Tensor

PERCENTILES = (5, 50, 95)
_SHIFT = 17  # of a float32's 23 fraction bits, 6 are kept
_FIRST = (127 - 40) << (23 - _SHIFT)
_NUM_BINS = 64 << (23 - _SHIFT)  # up to 2^24; what is above counts as that much


class Distribution:
    """Mean, extremes and percentiles of non-negative numbers that arrive in parts."""

    def __init__(self) -> None:
        self.count, self.num_nonfinite, self.total = 0, 0, 0.0
        self.lowest, self.highest = math.inf, -math.inf
        self.bins = torch.zeros(_NUM_BINS + 1, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count a tensor of any shape."""
        flat = values.flatten().float()
        finite = torch.isfinite(flat)
        if not finite.all():
            self.num_nonfinite += int((~finite).sum())
            flat = flat[finite]
        if not flat.numel():
            return
        self.count += flat.numel()
        self.total += flat.sum(dtype=torch.float64).item()
        low, high = torch.aminmax(flat)
        self.lowest, self.highest = min(self.lowest, low.item()), max(self.highest, high.item())
        places = ((flat.view(torch.int32) >> _SHIFT) - (_FIRST - 1)).clamp(0, _NUM_BINS)  # 0 is the bin of zero
        self.bins += torch.bincount(places, minlength=_NUM_BINS + 1).cpu()

    @property
    def mean(self) -> float:
        """Mean of the finite values; NaN when there is none."""
        return self.total / self.count if self.count else math.nan

    def percentile(self, percent: float) -> float:
        """The value that `percent` of the values do not exceed, within 1%; NaN when there is none."""
        if not self.count:
            return math.nan
        rank = max(1, math.ceil(percent / 100 * self.count))
        place = int(torch.searchsorted(self.bins.cumsum(0), rank))
        edges = torch.tensor([place + _FIRST - 1, place + _FIRST], dtype=torch.int32) << _SHIFT
        middle = edges.view(torch.float32).mean().item() if place else 0.0
        return min(max(middle, self.lowest), self.highest)

    def summary(self) -> dict[str, float]:
        """mean, p5, p50, p95."""
        return {"mean": self.mean, **{f"p{percent}": self.percentile(percent) for percent in PERCENTILES}}
