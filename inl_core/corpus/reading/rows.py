"""What is read from a file: documents (plain text, prompt + completion, or a conversation) and bad rows."""

import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from inl_core.corpus.tokenizer import ROLES
from inl_core.recipe.data import ColumnSettings

ROLE_OF_LETTER = {role[0]: role for role in ROLES}  # s, u, a
PROMPT_ROLES = "pc"

MESSAGES, PROMPT, TEXT, INSTRUCTION = "messages", "prompt+completion", "text", "instruction"
_NO_FORM = "has none of"
_ROLE_NAMES = {**{role: role[0] for role in ROLES}, "human": "u", "gpt": "a", "chatgpt": "a", "bing": "a", "bard": "a"}
"""How the role of a message is called: as everywhere, or as in ShareGPT."""


@dataclass(frozen=True)
class Form:
    """What the rows of a file hold, and in which columns."""

    kind: str
    """MESSAGES, PROMPT, TEXT or INSTRUCTION."""
    columns: tuple[str, ...]
    """Columns that are needed, in the order prompt, completion."""
    optional: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What it is called in messages: its columns."""
        return "+".join(self.columns)


FORMS = (
    Form(MESSAGES, ("messages",)),
    Form(PROMPT, ("prompt", "completion")),
    Form(TEXT, ("text",)),
    Form(MESSAGES, ("conversations",)),  # ShareGPT
    Form(INSTRUCTION, ("instruction", "output"), optional=("input",)),  # Alpaca
)
"""The forms that are recognised by their columns; the first one whose columns are all there is taken."""


def named_forms(columns: ColumnSettings) -> tuple[Form, ...]:
    """The forms in whose columns text is looked for: those that are named, or else FORMS."""
    forms = []
    if columns.messages:
        forms.append(Form(MESSAGES, (columns.messages,)))
    if columns.prompt or columns.completion:
        forms.append(Form(PROMPT, (columns.prompt or "prompt", columns.completion or "completion")))
    if columns.text:
        forms.append(Form(TEXT, (columns.text,)))
    return tuple(forms) or FORMS


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


def infer_form(names: Iterable[str], forms: Iterable[Form]) -> Form | None:
    """The first of these forms whose columns are all there; None when there is none."""
    names = set(names)
    return next((form for form in forms if names.issuperset(form.columns)), None)


def missing_columns(forms: Iterable[Form]) -> str:
    """What a file lacks that has none of these forms."""
    return ", ".join(form.label for form in sorted(forms, key=lambda form: form.kind != TEXT))


def without_form(forms: Iterable[Form], names: Iterable[str]) -> str:
    """What is wrong with a row that has none of these forms."""
    return f"{_NO_FORM} {missing_columns(forms)}; has {', '.join(list(names)[:12]) or 'no columns'}"


def name_columns(rows: Iterable[BadRow]) -> str:
    """The end of a message about bad rows: the advice to name the columns, where one has no form that is known."""
    is_unknown = any(row.reason.startswith(_NO_FORM) for row in rows)
    return "; name the columns: --text-column, --prompt-column, ..., or data.columns" if is_unknown else ""


def document_from_row(row: Mapping[str, Any], form: Form, origin: str) -> Item:
    """Check a row of this form and make a document of it, or a BadRow that says what is wrong."""
    try:
        if form.kind == MESSAGES:
            texts, roles = _conversation(row.get(form.columns[0]), form.columns[0])
        elif form.kind == INSTRUCTION:
            texts, roles = _instruction(row), "ua"
        else:
            texts = tuple(_string(row, name) for name in form.columns)
            roles = PROMPT_ROLES if form.kind == PROMPT else ""
        if roles and not texts[-1]:
            last = "message" if form.kind == MESSAGES else "completion"
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


def _instruction(row: Mapping[str, Any]) -> tuple[str, str]:
    """(user's message, assistant's) of a row of Alpaca, whose input may be missing or empty."""
    asked = _string(row, "instruction")
    given = _string(row, "input") if row.get("input") is not None else ""
    return f"{asked}\n\n{given}" if given else asked, _string(row, "output")


def _conversation(messages: Any, column: str) -> tuple[tuple[str, ...], str]:
    """(texts, role letters) of a list of messages; ValueError says what is wrong with it."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"`{column}` is not a list of {{role, content}} or {{from, value}}")
    texts, roles = [], []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number} is {type(message).__name__}, not {{role, content}}")
        role_name, text_name = ("from", "value") if "from" in message and "role" not in message else ("role", "content")
        role = message.get(role_name)
        if not isinstance(role, str) or role not in _ROLE_NAMES:
            raise ValueError(f"message {number}: {role_name} {_brief.repr(role)} is none of {', '.join(_ROLE_NAMES)}")
        texts.append(_string(message, text_name))
        roles.append(_ROLE_NAMES[role])
    if roles[-1] != "a":
        raise ValueError("the last message is not the assistant's: nothing to train on")
    return tuple(texts), "".join(roles)
