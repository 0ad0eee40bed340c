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
                "axis": {"labelOverlap": "greedy", "labelSeparation": 6, "labelAngle": 0},
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
        "encoding": {"x": {**number("step", "step"), "scale": {"zero": False, "nice": False}}},
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


def labelled_map(x: str, y: str, num_rows: int, figures: dict[str, str]) -> Spec:
    """Colour and a percentage for every pair of two names, of the figure that the reader chooses."""
    value = {"field": "value", "type": "quantitative", "title": None}
    return {
        "height": 24 * num_rows,
        "params": [chosen("figure", "show ", list(figures), list(figures.values()))],
        "transform": [{"calculate": "datum[figure]", "as": "value"}, {"filter": "isValid(datum.value)"}],
        "encoding": {
            "x": category(x, "", axis={"labelAngle": -35, "labelLimit": 90}),
            "y": category(y, ""),
            "tooltip": tooltip(x, y, *figures),
        },
        "layer": [
            {"mark": "rect", "encoding": {"color": {**value, "legend": None}}},
            {"mark": {"type": "rect", "color": "var(--paper)", "height": 15, "width": 38, "opacity": 0.8}},
            {"mark": {"type": "text", "color": "var(--ink)"}, "encoding": {"text": {**value, "format": ".0%"}}},
        ],
    }


def with_error(group: str, num_rows: int) -> Spec:
    """A dot and a bar of two standard errors on each side for the change of each group; a line marks no change."""
    return {
        "height": 24 * num_rows,
        "transform": [
            {"calculate": "datum.change - 2 * datum.standard_error", "as": "low"},
            {"calculate": "datum.change + 2 * datum.standard_error", "as": "high"},
        ],
        "encoding": {
            "y": category(group, ""),
            "tooltip": tooltip(group, "bits_per_byte", "change", "standard_error"),
        },
        "layer": [
            {"mark": {"type": "rule", "strokeDash": [4, 4]}, "encoding": {"x": {"datum": 0}, "y": None}},
            {
                "mark": {"type": "rule", "color": "var(--c0)", "strokeWidth": 2},
                "encoding": {"x": number("low", "bits per byte more"), "x2": {"field": "high"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 70, "color": "var(--c0)", "opacity": 1},
                "encoding": {"x": number("change", "bits per byte more")},
            },
        ],
    }


def grouped_map(group: str, num_rows: int, figures: Sequence[str]) -> Spec:
    """Colour by a group of tokens (a column) and a place (a row), of the figure that the reader chooses."""
    spec = heat_map(figures, ())
    spec["height"] = 22 * num_rows
    spec["encoding"]["x"] = category(group, "", axis={"labelAngle": -35, "labelLimit": 90})
    spec["encoding"]["tooltip"] = tooltip(group, "place", "tokens", *figures)
    return spec


def path_plane(systems: Sequence[str]) -> Spec:
    """Lines of named tokens in a plane, with a dot where each begins and an arrow at each step's end."""
    # On screen a direction depends on how many pixels the plane has each way, which only the page knows.
    across = "(datum.first - datum.x0) / (datum.x1 - datum.x2) * width"
    up = "(datum.second - datum.y0) / (datum.y1 - datum.y2) * height"
    axes = {
        "x": {"field": "first", "type": "quantitative", "title": "first principal component", "scale": {"nice": False}},
        "y": {
            "field": "second",
            "type": "quantitative",
            "title": "second principal component",
            "scale": {"nice": False},
        },
    }
    color = {"field": "token", "type": "nominal", "title": None, "sort": None, "legend": None}
    shown = tooltip("token", "place", "first", "second")
    order = {"sort": [{"field": "step", "order": "ascending"}], "groupby": ["token"]}
    return {
        "height": 420,
        "params": [chosen("shown", "in ", systems)],
        "transform": [
            {"filter": "datum.system === shown"},
            {
                "joinaggregate": [
                    {"op": op, "field": field, "as": name}
                    for op, field, name in (
                        ("max", "first", "x1"),
                        ("min", "first", "x2"),
                        ("max", "second", "y1"),
                        ("min", "second", "y2"),
                        ("max", "step", "last"),
                    )
                ]
            },
            {
                "window": [{"op": "lag", "field": "first", "as": "x0"}, {"op": "lag", "field": "second", "as": "y0"}],
                **order,
            },
            {"calculate": f"atan2({across}, {up}) * 180 / PI", "as": "angle"},
        ],
        "encoding": {**axes, "color": color, "tooltip": shown},
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 1.5},
                "encoding": {"order": {"field": "step"}, "strokeDash": color},
            },
            {"transform": [{"filter": "datum.step === 0"}], "mark": {"type": "circle", "size": 40, "opacity": 1}},
            {
                "transform": [{"filter": "datum.step > 0"}],
                "mark": {"type": "point", "shape": "triangle-up", "filled": True, "size": 60, "opacity": 1},
                "encoding": {"angle": {"field": "angle", "type": "quantitative", "scale": None}},
            },
            {
                "transform": [{"filter": "datum.step === datum.last"}],
                "mark": {"type": "text", "align": "left", "dx": 6, "fontSize": 11},
                "encoding": {"text": {"field": "token"}},
            },
        ],
    }
