"""Rewrites the tables on the pages that come from the program itself: `make pages`.

- A table stands between `<!-- options COMMAND -->`, `<!-- keys SECTION -->`, `<!-- presets -->` or `<!-- sizes -->` and
  `<!-- end -->`.
- Options come from the functions of the command line, keys from the recipe's JSON schema: change the help text or the
  docstring there and run this again. A test fails when a page is out of date.
"""

import inspect
import re
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inl_cli.app import app
from inl_core.recipe.model import ModelConfig
from inl_core.recipe.presets import PRESETS
from inl_core.recipe.schema import recipe_schema
from inl_core.recipe.sizes import ALIASES, SIZES

PAGES = sorted(Path(__file__).parent.glob("*.md"))
_MARKED = re.compile(r"(<!-- (options|keys|presets|sizes)(?: ([\w.-]+))? -->\n).*?(<!-- end -->)", re.DOTALL)
_WORDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "array": "list"}

Row = tuple[str, ...]


def with_tables(page: str) -> str:
    """The text of a page with its tables as the program has them now."""
    makers = {"options": _options, "keys": _keys, "presets": _presets, "sizes": _sizes}
    return _MARKED.sub(lambda found: found[1] + _markdown(makers[found[2]](found[3])) + found[4], page)


def _markdown(rows: Iterator[Row]) -> str:
    head, *body = ([cell.replace("|", r"\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))


def _options(name: str) -> Iterator[Row]:
    *groups, command = name.split(".")  # check.resume is `inl check resume`
    owner = next((group.typer_instance for group in app.registered_groups if [group.name] == groups), app)
    assert owner is not None
    function = next(one.callback for one in owner.registered_commands if one.name == command)
    assert function is not None
    yield "argument or option", "meaning", "default"
    for key, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if key in ("json", "quiet"):  # every command has them: explained once in docs/commands.md
            continue
        kind, option = typing.get_args(parameter.annotation)
        if type(option).__name__ == "ArgumentInfo":
            yield f"`{option.metavar}`", option.help, ""
            continue
        given = [name for name in (option.default, *(option.param_decls or ())) if isinstance(name, str)]
        names = ", ".join(given or ["--" + key.replace("_", "-")])
        value = "" if kind is bool else option.metavar or _metavar(kind)
        required = parameter.default is inspect.Parameter.empty
        default = "" if parameter.default is None or parameter.default is False else f"`{parameter.default}`"
        yield f"`{f'{names} {value}'.strip()}`", option.help, "required" if required else default


def _metavar(kind: Any) -> str:
    """What stands for the value of an option that has no name of its own for it."""
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    return next(name for word, name in (("int", "N"), ("float", "X"), ("str", "TEXT")) if word in str(kind))


def _keys(section: str) -> Iterator[Row]:
    schema = recipe_schema()
    yield "key", "value", "default", "meaning"
    found: dict[str, Any] = schema
    for name in section.split("."):
        found = _section(found["properties"][name], schema["$defs"])
    yield from _rows(f"{section}.", found, schema["$defs"])


def _rows(above: str, section: dict[str, Any], sections: dict[str, Any]) -> Iterator[Row]:
    for name, field in section["properties"].items():
        below = _section(field, sections)
        if "properties" in below:
            yield from _rows(f"{above}{name}.", below, sections)
            continue
        default = f"`{_plain(field['default'])}`" if "default" in field else "required"
        if above + name in _set_by_presets():
            default = "the preset's"
        yield f"`{above}{name}`", _values(field), default, " ".join(field["description"].split())


def _section(field: dict[str, Any], sections: dict[str, Any]) -> dict[str, Any]:
    """The section that a field refers to, or the field itself where it holds a value."""
    for way in (field, *field.get("anyOf", ())):
        if "$ref" in way:
            return sections[way["$ref"].rsplit("/", 1)[1]]
    return field


def _values(field: dict[str, Any]) -> str:
    """What a key may hold."""
    found = []
    for way in field.get("anyOf", [field]):
        named = way.get("enum", [way["const"]] if "const" in way else [])
        found += [f"`{value}`" for value in named]
        if not named and way["type"] in _WORDS:
            found.append(_WORDS[way["type"]])
    return ", ".join(found)


def _presets(_: str | None) -> Iterator[Row]:
    models = {name: ModelConfig.model_validate({"preset": name}).model_dump() for name in PRESETS}
    values = {name: dict(_flat("model.", model)) for name, model in models.items()}
    yield "key", *(f"`{name}`" for name in PRESETS)
    for key in _set_by_presets():
        yield f"`{key}`", *(_plain(each[key]) if key in each else "-" for each in values.values())


def _set_by_presets() -> list[str]:
    """The keys that some preset sets, dotted."""
    keys = dict.fromkeys(key for preset in PRESETS.values() for key, _ in _flat("model.", preset))
    return [key for key in keys if key not in ("model.integrator", "model.stream")]  # null: its keys show a dash


def _sizes(_: str | None) -> Iterator[Row]:
    yield "size", "d_model", "layers", "heads", "iterations (v1, v2, v3)", "context"
    for name, size in SIZES.items():
        names = [name, *(alias for alias, meant in ALIASES.items() if meant == name)]
        numbers = (size.d_model, size.num_layers, size.num_heads, size.num_iterations, size.max_seq_len)
        yield ", ".join(f"`{each}`" for each in names), *(f"{number:,}" for number in numbers)


def _flat(above: str, section: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        yield from _flat(f"{above}{name}.", value) if isinstance(value, dict) else [(above + name, value)]


def _plain(value: Any) -> str:
    """A value as a recipe would spell it."""
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_plain, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def main() -> None:
    """Rewrite every page."""
    for path in PAGES:
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
