"""What is read from a file: documents (plain text, prompt + completion, or a conversation) and bad rows."""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from inl_core.corpus.tokenizer import ROLES

_LETTER_OF_ROLE = {role: role[0] for role in ROLES}  # s, u, a
ROLE_OF_LETTER = {letter: role for role, letter in _LETTER_OF_ROLE.items()}
PROMPT_ROLES = "pc"

MESSAGES, PROMPT, TEXT = "messages", "prompt+completion", "text"
COLUMNS = {MESSAGES: ("messages",), PROMPT: ("prompt", "completion"), TEXT: ("text",)}
"""The columns of each kind of row."""


@dataclass(frozen=True, slots=True)
class Document:
    """One document: its parts in order, with one role letter for each.

    roles: "" for plain text, which has one part; "pc" for prompt and completion; for a conversation one letter a
        message: s(ystem), u(ser) or a(ssistant).
    """

    origin: str
    texts: tuple[str, ...]
    roles: str = ""
    continues: bool = False
    """Whether it is a piece of a long text, and not the first piece."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used: where it stands (file:line), why, and how it begins.

    Reason and excerpt may quote anything that stood in the row, so both are cut, and characters that UTF-8 cannot hold
    are escaped.
    """

    origin: str
    reason: str
    excerpt: object = ""
    """Given as any value; kept as a string."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "reason", _printable(self.reason, 500))
        object.__setattr__(self, "excerpt", _printable(self.excerpt, 200))


Item = Document | BadRow
"""What a reader gives for a row."""
Note = Callable[[str], None]
"""Is told, in words, what a reader found or guessed."""


def infer_columns(names: Iterable[str]) -> str | None:
    """MESSAGES, PROMPT or TEXT: the first of these whose columns are all there; None when there is none."""
    names = set(names)
    return next((kind for kind, columns in COLUMNS.items() if names.issuperset(columns)), None)


def document_from_row(row: Mapping[str, Any], kind: str, origin: str) -> Item:
    """Check a row of this kind and make a document of it, or a BadRow that says what is wrong."""
    try:
        if kind == MESSAGES:
            texts, roles = _conversation(row.get("messages"))
        else:
            texts, roles = tuple(_string(row, name) for name in COLUMNS[kind]), PROMPT_ROLES if kind == PROMPT else ""
        if roles and not texts[-1]:
            last = "message" if kind == MESSAGES else "completion"
            raise ValueError(f"the last {last} is empty: nothing to train on")
        for text in texts:
            if not text.isascii():  # JSON can spell lone surrogates, which neither UTF-8 nor the tokenizer can hold
                text.encode("utf-8")
    except UnicodeEncodeError as error:
        return BadRow(origin, f"lone surrogate U+{ord(error.object[error.start]):04X}", row)
    except ValueError as error:
        return BadRow(origin, str(error), row)
    return Document(origin, texts, roles)


_brief = reprlib.Repr()  # takes little time, however deep or large the value is
_brief.maxstring = _brief.maxother = 200


def _printable(value: object, limit: int) -> str:
    """The first `limit` characters of a string, or of the repr of another value, in a form that UTF-8 can hold."""
    text = value if isinstance(value, str) else _brief.repr(value)
    return text[:limit].encode("utf-8", "backslashreplace").decode("utf-8")


def _string(row: Mapping[str, Any], name: str) -> str:
    if name not in row:
        raise ValueError(f"no `{name}`; has {', '.join(map(str, list(row)[:12])) or 'nothing'}")
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(f"`{name}` is {type(value).__name__}, not a string")
    return value


def _conversation(messages: Any) -> tuple[tuple[str, ...], str]:
    """(texts, role letters) of a list of messages; ValueError says what is wrong with it."""
    if not isinstance(messages, list) or not messages:
        raise ValueError("`messages` is not a list of {role, content}")
    texts, roles = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} is {type(message).__name__}, not {{role, content}}")
        role = message.get("role")
        if not isinstance(role, str) or role not in _LETTER_OF_ROLE:
            raise ValueError(f"message {number}: role {_brief.repr(role)} is none of {', '.join(ROLES)}")
        texts.append(_string(message, "content"))
        roles.append(_LETTER_OF_ROLE[role])
    if roles[-1] != "a":
        raise ValueError("the last message is not the assistant's: nothing to train on")
    return tuple(texts), "".join(roles)
