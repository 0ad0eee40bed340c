"""docs/architecture.md is what the code is: its generated part, and every file and function that its text names."""

import ast
import re
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

PROJECT = Path(__file__).parent.parent
NAMED = re.compile(r"`([\w.]+)`\s+(?:in|is in)\s+\[[^]]*\]\((\.\./[^)]+\.py)\)")


def test_the_generated_part_is_what_make_architecture_writes() -> None:
    spec = spec_from_file_location("architecture", PROJECT / "docs" / "architecture.py")
    assert spec
    assert spec.loader
    generator = module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert generator.PAGE.read_text(encoding="utf-8") == generator.page(), "run `make architecture` and commit the page"


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
