"""Reports of single checkpoints as pages, made of the same parts: `inl convergence-report` and `inl inspect-params`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from inl_core.analysis.parameters import ParameterReport
from inl_core.analysis.report.charts import category, number, tooltip
from inl_core.analysis.report.convergence import convergence_findings, convergence_parts
from inl_core.analysis.report.forces import ablation_part
from inl_core.analysis.report.learned import LEARNED, parameter_findings
from inl_core.analysis.report.parts import Finding, Part, Report, Section, Spec
from inl_core.training.depth import place_name

_FIGURES = ("mean", "std", "min", "p5", "p50", "p95", "max", "saturated", "share", "drift", "against")
_VARIANCES = ("variance_dimensions", "variance_tokens", "variance_iterations")


def convergence_page(summary: dict[str, Any]) -> Report:
    """The convergence report of a checkpoint, from its summary."""
    parts = [ablation_part("checkpoint", summary), *convergence_parts("checkpoint", summary)]
    note = f"Step {summary['step']:,}, measured on {summary['tokens']:,} tokens of {summary['text']}."
    findings = list(convergence_findings("checkpoint", summary))
    section = Section("What the states do", parts, note, findings)
    return Report(f"Convergence of {summary['checkpoint']}", [section])


def parameters_page(report: ParameterReport, checkpoint: str) -> Report:
    """What the dynamics of a checkpoint learned, from the report of `inl inspect-params`."""
    sizes = [(part, count) for part, count in report.parameters.items()]
    weights = [Part("parameters", "Parameters by part", "How many numbers each part has.", ("part", "number"), sizes)]
    if report.ranks:
        see = "An effective rank far below the full one: the matrix uses few of its directions."
        weights.append(_table("ranks", "Effective rank", see, report.ranks))
    for key, since, rows in (("start", "the start", report.since_start), ("other", report.against, report.since_other)):
        if rows:
            see = "What has hardly changed has learned little since then."
            weights.append(_table(f"since-{key}", f"Change since {since}", see, rows))
    names = list(dict.fromkeys(row["quantity"] for row in report.layers))
    note = f"What is measured, and not learned, is measured on {report.tokens:,} tokens of {report.text}."
    sections = [Section("Learned and measured", [_quantity(report, name) for name in names], note)] if names else []
    sections.append(Section("Weights", weights))
    sections[0].findings.extend(_findings(report))
    return Report(f"Parameters of {checkpoint}", sections)


def _findings(report: ParameterReport) -> list[Finding]:
    said = parameter_findings(report)
    return [Finding(f"{text}.", f"quantity-{quantity}" if quantity else "") for text, quantity in said]


def _quantity(report: ParameterReport, name: str) -> Part:
    rows = report.of(name)
    figures = [figure for figure in (*_FIGURES, *_VARIANCES) if any(row.get(figure) is not None for row in rows)]
    cells = [(_place(row), *(row.get(figure) for figure in figures)) for row in rows]
    see = (
        "The bar holds nine tenths of the values, the dot is the median. Places that look alike have learned the same."
    )
    title = LEARNED.get(name, name.replace("_", " "))
    return Part(f"quantity-{name}", title[0].upper() + title[1:], see, ("place", *figures), cells, (_bars(len(rows)),))


def _bars(num_rows: int) -> Spec:
    base: Spec = {"y": category("place", ""), "tooltip": tooltip("place", "p5", "p50", "p95", "mean")}
    return {
        "height": 22 * num_rows,
        "encoding": base,
        "layer": [
            {
                "mark": {"type": "rule", "color": "var(--c0)", "strokeWidth": 3, "opacity": 0.5},
                "encoding": {"x": number("p5", ""), "x2": {"field": "p95"}},
            },
            {
                "mark": {"type": "point", "filled": True, "size": 60, "color": "var(--c0)", "opacity": 1},
                "encoding": {"x": number("p50", "")},
            },
        ],
    }


def _table(key: str, title: str, see: str, rows: Sequence[Any]) -> Part:
    plain = [asdict(row) for row in rows]
    return Part(key, title, see, tuple(plain[0]), [tuple(row.values()) for row in plain])


def _place(row: dict[str, Any]) -> str:
    return place_name(row) if "sub_layer" in row else f"layer {row['layer']}"
