"""One row of input: a document of plain text, prompt + completion or chat messages, or a bad row with its reason."""

import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from inl_core.corpus.tokenizer import ROLES

_ROLE_CODE = {role: role[0] for role in ROLES}  # s, u, a
ROLE_OF_CODE = {code: role for role, code in _ROLE_CODE.items()}
PROMPT_ROLES = "pc"

MESSAGES, PROMPT, TEXT = "messages", "prompt+completion", "text"
_COLUMNS = {MESSAGES: ("messages",), PROMPT: ("prompt", "completion"), TEXT: ("text",)}


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its parts in order, and one role letter a part.

    roles: "" plain text (one part); "pc" prompt and completion; else s, u or a (system, user, assistant) a message.
    """

    origin: str
    texts: tuple[str, ...]
    roles: str = ""
    continues: bool = False
    """Whether it is a piece of a long text, and not the first."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: where it stands (file:line), why, and how it begins.

    Reason and excerpt may be made of anything that stood in the row: they are cut, and what UTF-8 cannot hold escaped.
    """

    origin: str
    reason: str
    excerpt: object = ""
    """Becomes a string."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", _written(self.reason, 500))
        object.__setattr__(self, "excerpt", _written(self.excerpt, 200))


def infer_columns(names: Iterable[str]) -> str | None:
    """MESSAGES, PROMPT or TEXT, in this order when several are there; None when none is."""
    names = set(names)
    for kind, columns in _COLUMNS.items():
        if names.issuperset(columns):
            return kind
    return None


def columns_of(kind: str) -> tuple[str, ...]:
    """The column names of a kind."""
    return _COLUMNS[kind]


def document_from_row(row: Mapping[str, Any], kind: str, origin: str) -> Document | BadRow:
    """Check one row of the given kind and make a document of it."""
    try:
        if kind == MESSAGES:
            texts, roles = _chat(row.get("messages"))
        else:
            texts, roles = tuple(_string(row, name) for name in _COLUMNS[kind]), PROMPT_ROLES if kind == PROMPT else ""
        if roles and not texts[-1]:
            raise ValueError(
                f"the last {'message' if kind == MESSAGES else 'completion'} is empty: nothing to train on"
            )
        for text in texts:
            if not text.isascii():  # JSON can spell lone surrogates, which UTF-8 and the tokenizer cannot hold
                text.encode("utf-8")
    except UnicodeEncodeError as error:
        return BadRow(origin, f"lone surrogate U+{ord(error.object[error.start]):04X}", row)
    except ValueError as error:
        return BadRow(origin, str(error), row)
    return Document(origin, texts, roles)


def _written(value: object, limit: int) -> str:
    """The first characters of a string, or of a value as Python writes it, safe to write as UTF-8."""
    text = value if isinstance(value, str) else _brief.repr(value)
    return text[:limit].encode("utf-8", "backslashreplace").decode("utf-8")


_brief = reprlib.Repr()  # neither deep nesting nor a million values make it slow
_brief.maxstring = _brief.maxother = 200


def _string(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise ValueError(f"no `{name}`; has {', '.join(map(str, list(row)[:12])) or 'nothing'}")
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is {type(value).__name__}, not a string")
    return value


def _chat(messages: Any) -> tuple[tuple[str, ...], str]:
    if not isinstance(messages, list) or not messages:
        raise ValueError("`messages` is not a list of {role, content}")
    texts, roles = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} is {type(message).__name__}, not {{role, content}}")
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLE_CODE:
            raise ValueError(f"message {number}: role {_brief.repr(role)} is none of {', '.join(ROLES)}")
        texts.append(_string(message, "content"))
        roles.append(_ROLE_CODE[role])
    if roles[-1] != "a":
        raise ValueError("the last message is not the assistant's: nothing to train on")
    return tuple(texts), "".join(roles)
