"""Which terms move the state, and whether the model needs them: is the equilibrium doing anything?"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from inl_core.analysis.convergence.verdict import Thresholds, is_negligible
from inl_core.analysis.report.charts import labelled_map, with_error
from inl_core.analysis.report.parts import Finding, Part
from inl_core.analysis.report.probe import Probe

TERM_OF_ABLATION = {"equilibrium": "pull"}
"""The name of a term among the forces, where it has another when it is left out."""
_ZERO = {
    "momentum": "alpha = 0",
    "equilibrium": "beta = 0",
    "excitation": "A = 0",
    "transport": "b = 0",
    "anchor": "r = 0",
}

Summary = dict[str, Any]


def forces_part(name: str, found: Probe) -> Part:
    """Shares of the terms at each place, and what each adds along the movement."""
    rows = [
        (place, term, _mean(values[index]), float(found.along[term][index]))
        for index, place in enumerate(found.places)
        for term, values in found.terms.items()
        if not np.isnan(values[index]).all()
    ]
    see = (
        f"The share of each term in {moved(found)}, by length; a share near 0 does nothing. Along is what the "
        "term adds in the direction of the movement: negative is a brake."
    )
    spec = labelled_map(
        "term", "place", len(found.places), {"share": "share of the lengths", "along": "share along the movement"}
    )
    title = "What moves the state" if found.is_stream else "What makes the velocity"
    return Part(f"{name}-forces", title, see, ("place", "term", "share", "along"), rows, (spec,))


def ablation_part(name: str, summary: Summary) -> Part:
    """Bits per byte without each term."""
    bits = summary["bits_per_byte"]
    columns = ("without", "bits_per_byte", "change", "standard_error")
    rows = [tuple(row[key] for key in ("term", *columns[1:])) for row in bits["without_term"]]
    see = (
        "Bits per byte more with one term set to 0 everywhere; a bar is two standard errors. This is how much this "
        "model relies on the term, and not what a model trained without it would reach."
    )
    return Part(f"{name}-without-term", "Without each term", see, columns, rows, (with_error("without", len(rows)),))


def term_findings(name: str, found: Probe, summary: Summary) -> Iterator[Finding]:
    """A sentence for each term that can be left out: whether the model needs it, the equilibrium first."""
    rows: dict[str, Summary] = {row["term"]: row for row in summary["bits_per_byte"]["without_term"]}
    for term in sorted(rows, key=lambda term: term != "equilibrium"):
        row, own = rows[term], found.terms.get(TERM_OF_ABLATION.get(term, term))
        part = "" if own is None else f"; its share of {moved(found)} is {_mean(own):.0%}"
        yield Finding(f"{name}: {_judged(term, row, summary, part)}", f"{name}-without-term")


def _judged(term: str, row: Summary, summary: Summary, share: str) -> str:
    change, error, bits = row["change"], row["standard_error"], summary["bits_per_byte"]["bits_per_byte"]
    if change is None or not bits:
        return f"whether the {term} does anything was not measured, since this text's bytes are not known."
    if error is None:
        return (
            f"whether the {term} does anything cannot be told from so little text: without it bits per byte change by "
            f"{change:+.4f}, and the standard error is not known."
        )
    limit = Thresholds(**summary["thresholds"]).ignored_change * bits
    measured = f"{change:+.4f} (standard error {error:.4f})"
    if is_negligible(change, error, limit):
        return f"the {term} does nothing here: without it ({_ZERO[term]}) bits per byte change by {measured}{share}."
    if abs(change) < max(2 * error, limit):
        return f"whether the {term} does anything is too close to tell: without it bits per byte change by {measured}."
    if change < 0:
        return f"the {term} does harm here: without it ({_ZERO[term]}) bits per byte fall by {measured}{share}."
    return f"the {term} works: without it ({_ZERO[term]}) bits per byte rise by {measured}{share}."


def moved(found: Probe) -> str:
    """What the terms add up to."""
    return "what moves the state" if found.is_stream else "what makes the velocity"


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values))
