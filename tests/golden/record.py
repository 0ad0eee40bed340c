"""`make golden`: train every curve again and rewrite its file, and say how far it moved; README.md says when to.

    python -m tests.golden.record [NAME ...]     these curves only

- A curve that moved by less than float64's tolerance is left as it is, so that nothing changes without a reason.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.golden.curves import TOLERANCE, Curve, curve_files, read_curve, train


def record(path: Path) -> Iterator[str]:
    """Train the curve of one file and rewrite the file; yields what to tell about it."""
    recipe, before = read_curve(path)

    def trained(dtype: str, *, is_plain: bool = False) -> Curve:
        with TemporaryDirectory() as directory:
            return train(recipe, Path(directory), dtype, is_plain=is_plain)

    curve = trained("float64")
    yield f"{path.stem}: {curve.loss[0]:.4f} to {curve.loss[-1]:.4f} nats a token in {len(curve.loss)} steps"
    if before.loss:
        moved, is_same_data = curve.distance(before), curve.data == before.data
        yield f"  moved by {moved:.1e}{'' if is_same_data else ' on other data'}: {_first_move(curve, before)}"
        if moved <= TOLERANCE["float64"] and is_same_data:
            return
    found = {
        "float32": trained("float32").distance(curve),
        "float32, torch's own operations": trained("float32", is_plain=True).distance(curve),
    }
    rounded = {name: float(f"{distance:.1e}") for name, distance in found.items()}
    yield f"  written; relative distance of {rounded}"
    about = json.loads(path.read_text(encoding="utf-8"))["about"]
    file = {"about": about, "recipe": recipe, "distance_when_recorded": rounded, **asdict(curve)}
    path.write_text(json.dumps(file, indent=1) + "\n", encoding="utf-8")


def _first_move(curve: Curve, before: Curve) -> str:
    """From which step on a curve differs from the one before, and where it ended then and now."""
    pairs = list(zip(curve.loss, before.loss, strict=False))
    steps = [step for step, (now, then) in enumerate(pairs, 1) if abs(now - then) > TOLERANCE["float64"] * abs(then)]
    if not steps:
        return "unchanged at every step"
    return f"from step {steps[0]} on; the last loss was {before.loss[-1]:.6f}, and is {curve.loss[-1]:.6f}"


def main(names: list[str]) -> None:
    """Record the named curves, or all."""
    files = curve_files()
    for name in names or files:
        for line in record(files[name]):
            print(line, flush=True)  # noqa: T201 - a script's only output


if __name__ == "__main__":
    main(sys.argv[1:])
