"""The pages say what is so: their tables are the program's, their links lead somewhere, the files they name exist."""

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
names_of_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_the_tables_are_those_of_the_program() -> None:
    with_tables = runpy.run_path(str(ROOT / "docs" / "tables.py"))["with_tables"]
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert with_tables(text) == text, f"{page.name} is out of date: run `make pages`"


@names_of_pages
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, heading = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name} links to {target}"
        assert not heading or heading in _anchors(path), f"{page.name} links to {target}"


@names_of_pages
def test_files_that_are_named_exist(page: Path) -> None:
    named = r"`((?:inl_core|inl_cli|docs|tests|benchmarks|recipes|\.ci)/[a-z\d_./-]*[a-z\d])/?`"
    missing = [name for name in re.findall(named, page.read_text(encoding="utf-8")) if not (ROOT / name).exists()]
    assert not missing


def test_the_first_page_stays_short() -> None:
    assert (ROOT / "README.md").stat().st_size <= 9 * 1024


def _anchors(path: Path) -> set[str]:
    """What the headings of a page are called in links, as GitHub calls them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
