"""The convergence report as parts: verdicts, motion, stability, and what iterations, layers and steps are worth.

Every number is one of summary.json's, which docs/convergence-report.md defines. What lies beyond the iterations that
the model runs is marked as that.
"""

from collections.abc import Iterator
from typing import Any

from inl_core.analysis.convergence.markdown import BEYOND, WORDS, sentences, system_name
from inl_core.analysis.convergence.stability import KINDS
from inl_core.analysis.convergence.verdict import is_negligible
from inl_core.analysis.report.charts import chosen, number, tooltip, with_error
from inl_core.analysis.report.parts import Finding, Part, Spec
from inl_core.training.depth import place_name

Summary = dict[str, Any]

_SHADE: Spec = {
    "mark": {"type": "rect", "color": "var(--soft)", "opacity": 0.12},
    "transform": [
        {"filter": "datum.beyond"},
        {
            "aggregate": [
                {"op": "min", "field": "iteration", "as": "least"},
                {"op": "max", "field": "iteration", "as": "to"},
            ]
        },
        {"calculate": "datum.least - 0.5", "as": "from"},
    ],
    "encoding": {"x": {"field": "from", "type": "quantitative"}, "x2": {"field": "to"}},
}

_MOTION = ("residual", "state_rms", "velocity_rms", "distance_mu", "distance_fixed_point", "distance_end")
_BEYOND = "Hollow marks and the shaded part lie beyond the iterations that the model runs."


def convergence_parts(name: str, summary: Summary) -> list[Part]:
    """All parts of one checkpoint; `name` begins their keys."""
    found = [_verdicts(name, summary), _motion(name, summary)]
    if not summary["terms"]:
        found += [_stability(name, summary), _by_iterations(name, summary)]
    return [*found, _worth(name, summary)]


def convergence_findings(name: str, summary: Summary) -> Iterator[Finding]:
    """The verdict on each layer, or on the stream; which iterations and layers could be left out."""
    yield Finding(f"{name}: {_all_verdicts(summary)}.", f"{name}-verdicts")
    bits = summary["bits_per_byte"]
    limit = summary["thresholds"]["ignored_change"] * (bits["bits_per_byte"] or 0)
    idle = [_worth_name(row) for row in _worth_rows(bits) if is_negligible(row["change"], row["standard_error"], limit)]
    if idle:
        alone = "" if len(idle) == 1 else "each alone "
        what = f"could {alone}be left out: without it bits per byte change by less than 0.1%"
        yield Finding(f"{name}: {', '.join(idle)} {what}.", f"{name}-worth")
    if best := _best_iterations(summary):
        yield Finding(f"{name}: {best}", f"{name}-by-iterations")


def _all_verdicts(summary: Summary) -> str:
    """What the states do in one sentence, however many layers there are."""
    layers = summary["layers"]
    if len(layers) == 1:
        return sentences(summary)[0]
    within = _grouped([layer["verdict"]["word"] for layer in layers], WORDS)
    if layers[0]["beyond"] is None:
        return f"the states {within}"
    beyond = _grouped([layer["beyond"]["word"] for layer in layers], BEYOND)
    return f"within T the states {within}; beyond T, which the model does not run, they would {beyond}"


def _grouped(words: list[str], names: dict[str, str]) -> str:
    """`drift in layers 0, 1; are ignored in layer 2`."""
    if len(set(words)) == 1:
        return f"{names[words[0]]} in every layer"
    places = {word: [str(layer) for layer, own in enumerate(words) if own == word] for word in dict.fromkeys(words)}
    told = (f"{names[word]} in layer{'s' if len(own) > 1 else ''} {', '.join(own)}" for word, own in places.items())
    return " and ".join(told)


def _best_iterations(summary: Summary) -> str | None:
    rows = [row for row in summary["bits_per_byte"]["by_iterations"] if row["bits_per_byte"] is not None]
    if not rows:
        return None
    best, own = min(rows, key=lambda row: row["bits_per_byte"]), summary["num_iterations"]
    if best["iterations"] == own:
        return f"bits per byte are lowest at T = {own}, with which it was trained."
    return f"bits per byte are lowest with T = {best['iterations']} ({best['change']:+.4f}), not at the trained {own}."


def _verdicts(name: str, summary: Summary) -> Part:
    rows = []
    for layer in summary["layers"]:
        verdict, beyond = layer["verdict"], layer["beyond"]
        reached = (beyond["word"], beyond["reason"]) if beyond else (None, None)
        rows.append((system_name(summary, layer), verdict["word"], verdict["reason"], *reached))
    columns = ("system", "within_T", "because", "beyond_T", "because_beyond")
    see = "What the states do in the iterations that the model runs, and apart from that what they would do beyond."
    return Part(f"{name}-verdicts", "Converge, oscillate, drift, or ignored", see, columns, rows)


def _motion(name: str, summary: Summary) -> Part:
    first = summary["layers"][0]["iterations"]
    measures = [measure for measure in _MOTION if any(measure in row for row in first)]
    columns = ("system", "iteration", "place", "beyond", *measures)
    rows = []
    for layer in summary["layers"]:
        for row in layer["iterations"]:
            place = place_name(row) if "sub_layer" in row else f"iteration {row['iteration']}"
            medians = (row.get(measure, {}).get("p50") for measure in measures)
            rows.append((system_name(summary, layer), row["iteration"], place, not row["used"], *medians))
    see = (
        "How far each step moves the state, the size of state and velocity, and how far the state is from its targets; "
    )
    see += "medians over tokens, rms over dimensions. "
    see += "Distance end is to where the state itself ends." if summary["terms"] else _BEYOND
    labels = [measure.replace("_", " ") for measure in measures]
    spec = _steps(
        "system", measures, labels, "step" if summary["terms"] else "iteration", shaded=any(row[3] for row in rows)
    )
    return Part(f"{name}-motion", "How the states move", see, columns, rows, (spec,))


def _stability(name: str, summary: Summary) -> Part:
    columns = ("system", "iteration", "place", "beyond", "spectral_radius", *KINDS, "alpha", "beta", "gate")
    rows = []
    for layer in summary["layers"]:
        for row in layer["iterations"][1:]:
            stability = row["stability"]
            shares = (stability["spectral_radius"]["p50"], *(stability[kind] for kind in KINDS))
            gains = (row[gain]["mean"] for gain in ("alpha", "beta", "gate"))
            place = f"iteration {row['iteration']}"
            rows.append((system_name(summary, layer), row["iteration"], place, not row["used"], *shares, *gains))
    see = "The step with its coefficients frozen: a spectral radius below 1 brings the state to rest, the slower the "
    see += f"closer to 1; the shares say how many dimensions of tokens move in which way. {_BEYOND}"
    figures = ["spectral_radius", *KINDS, "alpha", "beta", "gate"]
    spec = _steps("system", figures, [figure.replace("_", " ") for figure in figures], "iteration")
    return Part(f"{name}-stability", "Stability of the frozen steps", see, columns, rows, (spec,))


def _by_iterations(name: str, summary: Summary) -> Part:
    bits, own = summary["bits_per_byte"], summary["num_iterations"]
    columns = ("system", "iteration", "beyond", "bits_per_byte", "change", "standard_error")
    rows = [
        ("all layers", row["iterations"], row["iterations"] > own, *(row[key] for key in columns[3:]))
        for row in bits["by_iterations"]
    ]
    see = (
        "Bits per byte with T iterations in every layer; 0 skips every integrator. Lowest at the trained T means that "
    )
    see += f"the iterations are used like layers, and not as a relaxation. {_BEYOND}"
    spec = _steps(
        "system", ["bits_per_byte", "change"], ["bits per byte", "change"], "iterations in every layer", least=1
    )
    return Part(f"{name}-by-iterations", "Bits per byte by T", see, columns, rows, (spec,))


def _worth(name: str, summary: Summary) -> Part:
    rows = [
        (_worth_name(row), row["bits_per_byte"], row["change"], row["standard_error"])
        for row in _worth_rows(summary["bits_per_byte"])
    ]
    what = "step of the stream passed over" if summary["terms"] else "layer's integrator skipped"
    see = f"Bits per byte more with one {what}; a bar is two standard errors. What costs nothing could be left out."
    columns = ("without", "bits_per_byte", "change", "standard_error")
    title = "What each step is worth" if summary["terms"] else "What each layer's integrator is worth"
    return Part(f"{name}-worth", title, see, columns, rows, (with_error("without", len(rows)),))


def _worth_rows(bits: Summary) -> list[Summary]:
    return bits["without_step"] or bits["without_layer"]


def _worth_name(row: Summary) -> str:
    return place_name(row) if "sub_layer" in row else f"layer {row['layer']}"


def _steps(
    group: str, figures: list[str], labels: list[str], title: str, *, least: int = 0, shaded: bool = True
) -> Spec:
    """Lines over iterations; what lies beyond those that the model runs, if any do, is hollow and `shaded`."""
    base = {"x": {"field": "iteration", "type": "quantitative", "title": title, "axis": {"tickMinStep": 1}}}
    color = {"field": group, "type": "nominal", "title": None, "sort": None}
    return {
        "height": 240,
        "params": [chosen("figure", "show ", figures, labels)],
        "transform": [
            {"calculate": "datum[figure]", "as": "value"},
            {"filter": f"isValid(datum.value) && datum.iteration >= {least}"},
        ],
        "layer": [
            *([_SHADE] if shaded else []),
            {
                "mark": {"type": "line"},
                "encoding": {**base, "y": number("value", ""), "color": color, "strokeDash": color},
            },
            {
                "mark": {"type": "point", "size": 50, "opacity": 1},
                "encoding": {
                    **base,
                    "y": number("value", ""),
                    "color": color,
                    "shape": color,
                    "fillOpacity": {"condition": {"test": "datum.beyond", "value": 0}, "value": 1},
                    "fill": color,
                    "tooltip": tooltip(group, "iteration", "beyond", *figures),
                },
            },
        ],
    }
