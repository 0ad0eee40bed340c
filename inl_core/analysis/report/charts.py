"""The Vega-Lite specifications of the report's figures, without their data (https://vega.github.io/vega-lite/docs/).

- Whoever sees no colours must be able to read a figure: beside its colour a line has dashes and points have shapes, and
  a heat map's colours run from dark to light.
- Width, fonts and colours come from the page (assets/page.js), so that they fit its theme and the reader's screen.
"""

from collections.abc import Sequence
from typing import Any

from inl_core.analysis.report.parts import Spec

HEIGHT = 280
_WORDS = {"std": "standard deviation", "p5": "5th percentile", "p50": "median", "p95": "95th percentile"}
_WORDS["drift"] = "distance from the start"


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


def heat_map(figures: Sequence[str], places: Sequence[str]) -> Spec:
    """Colour by step (a column) and place (a row), of the figure that the reader chooses."""
    return {
        "height": min(640, max(90, 22 * len(places))),
        "params": [chosen("figure", "show ", figures, [_WORDS.get(name, name) for name in figures])],
        "transform": [{"calculate": "datum[figure]", "as": "value"}, {"filter": "isValid(datum.value)"}],
        "mark": {"type": "rect", "tooltip": True},
        "encoding": {
            "x": {
                "field": "step",
                "type": "ordinal",
                "title": "step",
                "axis": {"labelOverlap": "greedy", "labelAngle": 0},
            },
            "y": category("place", ""),
            "color": {"field": "value", "type": "quantitative", "title": None, "scale": {"zero": False}},
            "tooltip": tooltip("step", "place", *figures),
        },
    }


def fan(places: Sequence[str], title: str) -> Spec:
    """The band from the 5th to the 95th percentile and the median over steps, at the place that the reader chooses."""
    return {
        "height": 180,
        "params": [chosen("shown", "at ", places)],
        "transform": [{"filter": "datum.place === shown"}],
        "encoding": {"x": number("step", "step")},
        "layer": [
            {
                "mark": {"type": "area", "opacity": 0.25, "color": "var(--c0)"},
                "encoding": {"y": number("p5", title), "y2": {"field": "p95"}},
            },
            {
                "mark": {"type": "line", "color": "var(--c0)", "point": {"opacity": 0, "size": 80}},
                "encoding": {
                    "y": number("p50", title),
                    "tooltip": tooltip("step", "place", "p5", "p50", "p95", "mean"),
                },
            },
        ],
    }
