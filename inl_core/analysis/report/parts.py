"""What a report is made of: findings first, then sections of parts, each a sentence, numbers as a table, and a chart.

The page, --json and the terminal are all made from these, so that they cannot show different numbers.
"""

import math
from dataclasses import dataclass, field
from typing import Any

Spec = dict[str, Any]
"""A Vega-Lite specification without its data, which are the rows of its part."""


@dataclass(frozen=True)
class Part:
    """One figure, and its numbers."""

    key: str
    """What it is called in links and in --json; no other part of a report has the same."""
    title: str
    see: str
    """The sentence that says what to see in it."""
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    specs: tuple[Spec, ...] = ()
    """The charts of these numbers; none for a part that is its table alone."""
    reading: dict[str, dict[str, str]] = field(default_factory=dict)
    """Of a text whose tokens are the rows: measure -> place -> the column by which the page colours the tokens."""

    def records(self) -> list[dict[str, Any]]:
        """The rows as mappings."""
        return [dict(zip(self.columns, row, strict=True)) for row in self.rows]


@dataclass(frozen=True)
class Finding:
    """A sentence that a reader should take away, and the part that it rests on."""

    sentence: str
    part: str = ""


@dataclass(frozen=True)
class Section:
    """Parts that belong together, and what was found in them, under a note that holds for all of it."""

    title: str
    parts: list[Part]
    note: str = ""
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """Everything that is shown."""

    title: str
    sections: list[Section]

    @property
    def findings(self) -> list[Finding]:
        """Those of all sections, in their order."""
        return [finding for section in self.sections for finding in section.findings]

    @property
    def parts(self) -> list[Part]:
        """Those of all sections, in their order."""
        return [part for section in self.sections for part in section.parts]

    def summary(self) -> dict[str, Any]:
        """All sentences and numbers as JSON values, without the charts; what is not finite is null."""
        return {
            "title": self.title,
            "findings": [{"sentence": found.sentence, "part": found.part} for found in self.findings],
            "sections": [
                {"title": section.title, "note": section.note, "parts": [_of_part(part) for part in section.parts]}
                for section in self.sections
            ],
        }


def _of_part(part: Part) -> dict[str, Any]:
    rows = [[_plain(cell) for cell in row] for row in part.rows]
    return {"key": part.key, "title": part.title, "see": part.see, "columns": list(part.columns), "rows": rows}


def _plain(cell: Any) -> Any:
    """A cell as JSON has it; numbers are rounded to seven digits, about as many as the model computes with."""
    if not isinstance(cell, float):
        return cell
    return float(f"{cell:.7g}") if math.isfinite(cell) else None
