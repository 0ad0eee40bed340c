"""Every text file is opened with a named encoding. Ruff sees only the calls whose type it knows; this test sees all."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]


def opens_text_without_encoding(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    keywords = {keyword.arg for keyword in call.keywords}
    if "encoding" in keywords:
        return False
    if name == "open":
        modes = [item.value for item in call.args if isinstance(item, ast.Constant) and isinstance(item.value, str)]
        return not call.args or any(mode in ("r", "w", "a", "x", "r+", "w+", "a+") for mode in modes)
    if isinstance(call.func, ast.Attribute) and name == "read_text":
        return not call.args
    if isinstance(call.func, ast.Attribute) and name == "write_text":
        return len(call.args) == 1
    return "text" in keywords and name in ("run", "Popen", "check_output")


def test_every_text_file_names_its_encoding() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for folder in ("inl_core", "inl_cli", "benchmarks")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and opens_text_without_encoding(node)
    ]
    assert found == []
