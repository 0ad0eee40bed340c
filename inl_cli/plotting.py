"""A curve drawn with characters, as wide and high as is asked for."""

import math
from collections.abc import Iterable, Mapping, Sequence

_LABEL = 8


def plot(title: str, series: Mapping[str, Iterable[tuple[int, float | None]]], *, width: int, height: int) -> list[str]:
    """The lines of a plot: the values of each series, drawn with its key, a single character, over their steps.

    A column shows the mean of the values that fall into it. The first tenth of the steps does not stretch the scale, as
    a loss begins far above where it is going: what is higher than all after it is drawn at the top. Later series are
    drawn over earlier ones. No lines where there is no value.
    """
    points = {mark: [(x, y) for x, y in own if y is not None and math.isfinite(y)] for mark, own in series.items()}
    known = [point for own in points.values() for point in own]
    if not known:
        return []
    left, right = min(x for x, _ in known), max(x for x, _ in known)
    calm = [y for x, y in known if x >= left + (right - left) / 10]
    low, high = min(y for _, y in known), max(calm)
    columns = max(8, width - _LABEL - 3)
    grid = [[" "] * columns for _ in range(height)]
    for mark, own in points.items():
        for column, value in _column_means(own, left, right, columns).items():
            share = (high - value) / (high - low) if high > low else 0.5
            grid[min(height - 1, max(0, round(share * (height - 1))))][column] = mark
    labels = {0: high, height - 1: low}
    body = [f"{_label(labels.get(line)):>{_LABEL}} |{''.join(cells).rstrip()}" for line, cells in enumerate(grid)]
    steps = f"{left:,}".ljust(columns - len(f"{right:,}")) + f"{right:,}"
    return [title, *body, f"{'':>{_LABEL}} +{'-' * columns}", f"{'':>{_LABEL}}  {steps}"]


def beside(blocks: Sequence[Sequence[str]], *, width: int) -> list[str]:
    """Blocks of lines beside each other, each `width` wide."""
    height = max((len(block) for block in blocks), default=0)
    padded = [[*block, *[""] * (height - len(block))] for block in blocks]
    return ["".join(line.ljust(width) for line in lines).rstrip() for lines in zip(*padded, strict=True)]


def _column_means(points: list[tuple[int, float]], left: int, right: int, columns: int) -> dict[int, float]:
    found: dict[int, list[float]] = {}
    for x, y in points:
        found.setdefault(round((x - left) / max(1, right - left) * (columns - 1)), []).append(y)
    return {column: sum(values) / len(values) for column, values in found.items()}


def _label(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
