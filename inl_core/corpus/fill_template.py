"""Fill in a chat template; as a program, in a process of its own that is stopped before it takes the machine.

- jinja2's sandbox keeps a template from files and from Python's insides, but not from endless loops or all the memory.
- The program reads {"template": ..., "values": ...} from stdin and writes {"text": ...} or {"error": ...}. It imports
  nothing of this project, so that it starts quickly.
"""

import json
import sys
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 1 << 22
"""Characters that a filled template may have."""
MEMORY = 1 << 30
"""Bytes of address space that the process may take."""
CPU_SECONDS = 3
"""The time that it may compute."""


def fill_template(template: str, values: dict[str, Any]) -> str:
    """The text of a template. Raises whatever the template provokes, so a caller catches every Exception."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as in transformers
    environment.globals["raise_exception"] = _refuse
    pieces, length = [], 0
    for piece in environment.from_string(template).generate(values):
        length += len(piece)
        if length > LONGEST:
            raise OverflowError(f"its text is longer than {LONGEST:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def _refuse(message: str) -> Any:
    raise jinja2.TemplateError(message)


def _limit_this_process() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):
        pass  # not on every system; the caller's limit on the time remains


def _main() -> None:
    given = json.load(sys.stdin)
    _limit_this_process()
    try:
        answer = {"text": fill_template(given["template"], given["values"])}
    except Exception as error:
        answer = {"error": str(error) or type(error).__name__}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    _main()
