"""How fast a page of `inl report` opens in Chromium, in milliseconds since it was asked for: median of several times.

.venv/bin/python benchmarks/report_page.py tiny.html
"""

import argparse
import re
import statistics
import subprocess
import tempfile
from pathlib import Path

_WATCH = """<script>
const seen = document.documentElement.dataset, now = () => performance.now();
addEventListener("load", () => { seen.load = now(); });
new MutationObserver(() => {
  if (!seen.chart && document.querySelector(".chart svg")) seen.chart = now();
  for (const entry of performance.getEntriesByName("first-contentful-paint")) seen.paint = entry.startTime;
}).observe(document, { subtree: true, childList: true, attributes: true, attributeFilter: ["data-load"] });
</script>"""


def measure(page: Path) -> dict[str, float]:
    """When the first text was painted, the first chart drawn, and everything loaded, by a fresh browser."""
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
        command = ["chromium", *options, page.as_uri()]
        document = subprocess.run(command, capture_output=True, encoding="utf-8", check=True, timeout=60).stdout
    return {name: float(value) for name, value in re.findall(r'data-(paint|chart|load)="([\d.]+)"', document)}


def main() -> None:
    """Print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        watched = Path(folder) / "page.html"
        text = arguments.page.read_text(encoding="utf-8")
        watched.write_text(text.replace("<head>", f"<head>{_WATCH}", 1), encoding="utf-8")
        found = [measure(watched) for _ in range(arguments.repeats)]
    for name in ("paint", "chart", "load"):
        print(f"{name}: {statistics.median(one[name] for one in found):.0f} ms")


if __name__ == "__main__":
    main()
