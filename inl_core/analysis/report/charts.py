"""The Vega-Lite specifications of the report's figures, without their data (https://vega.github.io/vega-lite/docs/).

- Whoever sees no colours must be able to read a figure: beside its colour a line has dashes and points have shapes, and
  a heat map's colours run from dark to light.
- Width, fonts and colours come from the page (assets/page.js), so that they fit its theme and the reader's screen.
"""

from collections.abc import Sequence
from typing import Any

from inl_core.analysis.report.parts import Spec

HEIGHT = 280


def chosen(name: str, label: str, options: Sequence[Any], labels: Sequence[str] = ()) -> Spec:
    """A parameter that the reader picks from a list."""
    bind: Spec = {"input": "select", "options": list(options), "name": label}
    if labels:
        bind["labels"] = list(labels)
    return {"name": name, "value": options[0], "bind": bind}


def number(field: str, title: str, **more: Any) -> Spec:
    """A channel of numbers; the scale need not begin at 0."""
    return {"field": field, "type": "quantitative", "title": title, "scale": {"zero": False}, **more}


def category(field: str, title: str, **more: Any) -> Spec:
    """A channel of names, in the order of the rows."""
    return {"field": field, "type": "nominal", "title": title, "sort": None, **more}


def tooltip(*fields: str) -> list[Spec]:
    """What is shown of the mark under the pointer."""
    return [{"field": field, "title": field.replace("_", " ")} for field in fields]


def curves(
    xs: dict[str, str], ys: dict[str, str], *, group: str, group_title: str, shown: Sequence[str], points: bool = False
) -> Spec:
    """Lines of several groups; the reader chooses what is on each axis.

    Args:
        xs: columns -> their names for people, of which the first is shown first.
        ys: the same for the other axis.
        shown: columns that the tooltip has.
    """
    mark: Spec = {"type": "line", "tooltip": True, "clip": True}
    mark["point"] = {"filled": True, "size": 45} if points else {"size": 60, "opacity": 0}
    return {
        "height": HEIGHT,
        "params": [
            chosen("horizontal", "along the axis ", list(xs), list(xs.values())),
            chosen("vertical", "show ", list(ys), list(ys.values())),
        ],
        "transform": [
            {"calculate": "datum[horizontal]", "as": "x"},
            {"calculate": "datum[vertical]", "as": "y"},
            {"filter": "isValid(datum.x) && isValid(datum.y)"},
        ],
        "mark": mark,
        "encoding": {
            "x": number("x", "", axis={"format": "~s", "tickCount": 6}),
            "y": number("y", ""),
            "color": category(group, group_title),
            "strokeDash": category(group, group_title),
            "shape": category(group, group_title),
            "tooltip": tooltip(group, *shown),
        },
    }
