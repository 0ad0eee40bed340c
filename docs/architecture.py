"""Writes the generated part of docs/architecture.md: the picture of the rooms' imports, and the list of files.

    make architecture        (tests/test_architecture.py fails when the page is not what this would write)

- The picture shows which room imports which, read from the code by grimp. An arrow that already follows from a chain
  of others is left out.
- The list takes the first sentence of each file: of a module's docstring, or of the comment at the top of a C++ file.
"""

import ast
import re
from itertools import permutations
from pathlib import Path

import grimp

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("inl_cli", "inl_core")
START, END = "<!-- make architecture writes from here -->\n", "<!-- to here -->\n"
SMALL = "files"
"""The room of the modules that lie directly in inl_core."""


def first_sentence(path: Path) -> str:
    """What a source file says of itself: the first sentence, on one line, without its full stop."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = re.sub(r"^// ?", "", re.split(r"\n(?!//)", text)[0], flags=re.MULTILINE)
    paragraph = " ".join(text.split("\n\n")[0].split())
    return re.split(r"(?<=[\w)`]\.)\s", paragraph)[0].rstrip(".:")


def rooms() -> dict[str, Path]:
    """The rooms by name, each with its folder: inl_cli, and the packages of inl_core."""
    folders = sorted(path.parent for path in (ROOT / "inl_core").glob("*/__init__.py"))
    return {"inl_cli": ROOT / "inl_cli"} | {folder.name: folder for folder in folders}


def imports(names: list[str]) -> set[tuple[str, str]]:
    """(importer, imported) for rooms and for the single files, which count as one room."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    modules = graph.modules - {"inl_core"}  # it hands out names of all rooms, and only when they are asked for

    def room(module: str) -> str:
        parts = module.split(".")
        name = parts[0] if parts[0] == "inl_cli" else parts[1]
        return name if name in names else SMALL

    pairs = {(room(a), room(b)) for a in modules for b in graph.find_modules_directly_imported_by(a) & modules}
    return {(a, b) for a, b in pairs if a != b}


def without_shortcuts(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The arrows whose end cannot be reached from their beginning by way of another room."""
    reached = set(arrows)
    while more := {(a, d) for a, b in reached for c, d in arrows if b == c} - reached:
        reached |= more
    names = {name for arrow in arrows for name in arrow}
    by_way = {(a, c) for a, b, c in permutations(names, 3) if (a, b) in reached and (b, c) in reached}
    return {(a, b) for a, b in arrows if (a, b) not in by_way or (b, a) in arrows}


def picture() -> str:
    """The rooms and their imports as a Mermaid diagram, which GitHub draws."""
    found = rooms()
    says = {name: first_sentence(folder / "__init__.py").split(":")[0] for name, folder in found.items()}
    says[SMALL] = ", ".join(sorted(path.stem for path in (ROOT / "inl_core").glob("[!_]*.py")))
    boxes = [f'    {name}["{name}<br>{text}"]'.replace("`", "") for name, text in says.items()]
    arrows = [f"    {a} --> {b}" for a, b in sorted(without_shortcuts(imports(list(found))))]
    return "\n".join(["```mermaid", "flowchart TD", *boxes, *arrows, "```"])


def file_list() -> str:
    """Every source file with its first sentence, under its room's."""
    lines = []
    for package in PACKAGES:
        folders = {path.parent for path in (ROOT / package).rglob("*.py")}
        for folder in sorted(folders):
            name = folder.relative_to(ROOT).as_posix()
            lines += ["", f"**{name}**: {first_sentence(folder / '__init__.py')}", ""]
            for path in sorted(path for path in folder.iterdir() if path.suffix in (".py", ".cpp", ".h")):
                if path.name != "__init__.py":
                    lines.append(f"- [{path.name}](../{name}/{path.name}): {first_sentence(path)}")
    return "\n".join(lines)


def page() -> str:
    """docs/architecture.md as it should be."""
    before, rest = PAGE.read_text(encoding="utf-8").split(START)
    after = rest.split(END)[1]
    return f"{before}{START}\n{picture()}\n\n## The files\n{file_list()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
