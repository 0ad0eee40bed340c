"""A group of commands whose help tells the whole first sentence of each command, on as many lines as that takes."""

from typing import Any

from typer.core import TyperGroup

_LONGEST_SENTENCE = 1000


class WholeSentences(TyperGroup):
    """Typer's group cuts the sentences at the width of the terminal."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list of commands in `--help`."""
        named = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        rows = [
            (name, command.get_short_help_str(limit=_LONGEST_SENTENCE))
            for name, command in named
            if command is not None and not command.hidden
        ]
        if rows:
            with formatter.section("Commands"):
                formatter.write_dl(rows)
