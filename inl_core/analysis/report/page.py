"""A report as one HTML file that needs nothing else: no network, no other file.

- The numbers are inside as the very JSON that --json prints; assets/page.js makes charts and tables of them.
- The charts are drawn by Vega, Vega-Lite and Vega-Embed, of which copies lie in assets/ (LICENSES.txt has their
  licences and those of what they contain).
- The page forbids itself to load anything (Content-Security-Policy).
"""

import json
import re
from pathlib import Path
from typing import Any

from inl_core.analysis.report.parts import Report
from inl_core.files import HTML, output_file, write_whole

_ASSETS = Path(__file__).with_name("assets")
LIBRARIES = {"vega": "6.4.0", "vega-lite": "6.5.0", "vega-embed": "7.3.0"}
"""Their versions, in the order in which a page needs them."""


def write_page(report: Report, path: Path) -> None:
    """Write the report over `path`, or the file that a link there leads to, whole or not at all.

    Raises:
        RecipeError: there is something else than a file.
        OSError: it could not be written.
    """
    file = output_file(path, HTML)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, to_page(report))


def to_page(report: Report) -> str:
    """The text of the file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(loader=FileSystemLoader(_ASSETS), undefined=StrictUndefined, autoescape=True)
    specs = {part.key: part.specs for part in report.parts}
    readings = {part.key: part.reading for part in report.parts if part.reading}
    return environment.get_template("page.html.jinja").render(
        report=report,
        style=_asset("page.css"),
        libraries=[_without_map(_asset(f"{name}.min.js")) for name in LIBRARIES],
        script=_asset("page.js"),
        numbers=_for_script(report.summary()),
        specs=_for_script(specs),
        readings=_for_script(readings),
    )


def _asset(name: str) -> str:
    return (_ASSETS / name).read_text(encoding="utf-8")


def _without_map(script: str) -> str:
    """A library without the line that makes a browser's developer tools look for another file."""
    return re.sub(r"^//# sourceMappingURL=.*$", "", script, flags=re.MULTILINE)


def _for_script(value: Any) -> str:
    """JSON that no text inside can end early: `</script>` needs a `<`."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
