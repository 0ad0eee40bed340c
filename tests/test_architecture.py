"""docs/architecture.md is what the code is: picture, list and names. docs/model.md has the sections that are cited."""

import ast
import re
import runpy
from pathlib import Path

PROJECT = Path(__file__).parent.parent
CITED = re.compile(r'docs/model\.md, "([^"]+)"')
NAMED = re.compile(r"`([\w.]+)`\s+(?:in|is in)\s+\[[^]]*\]\((\.\./[^)]+\.py)\)")


def test_the_generated_part_is_what_make_architecture_writes() -> None:
    written = runpy.run_path(str(PROJECT / "docs" / "architecture.py"))["page"]()
    page = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert page == written, "run `make architecture` and commit the page"


def test_every_section_of_the_models_page_that_the_code_cites_is_there() -> None:
    headings = set(re.findall(r"^#+ (.*)$", (PROJECT / "docs" / "model.md").read_text(encoding="utf-8"), re.MULTILINE))
    sources = [path for folder in ("inl_core", "inl_cli", "tests") for path in (PROJECT / folder).rglob("*.py")]
    cited = {title for path in sources for title in CITED.findall(path.read_text(encoding="utf-8"))}
    assert "One step" in cited
    assert {" ".join(title.split()) for title in cited} <= headings


def test_every_name_that_a_page_places_in_a_file_is_defined_there() -> None:
    missing, found = [], 0
    for page in ("architecture.md", "model.md"):
        for name, link in NAMED.findall((PROJECT / "docs" / page).read_text(encoding="utf-8")):
            found += 1
            if name not in _names(PROJECT / "docs" / link):
                missing.append(f"{page}: {name} in {link}")
    assert found > 30
    assert not missing


def _names(path: Path) -> set[str]:
    """Functions, classes, methods as Class.method, and constants of a module."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names
