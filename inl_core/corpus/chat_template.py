"""Conversations -> tokens by a chat template in jinja2, the form in which transformers keeps it with a tokenizer.

    ids = encode_chat(tokenizer, CHAT_TEMPLATE, [{"role": "user", "content": "Hello"}])

- A checkpoint that was trained on conversations has the template in its tokenizer_config.json.
- The template alone makes special tokens. Messages are put in after it has been read, so what they spell stays text.
- A template may come from a stranger, so any but our own is filled in by a process with limits (fill_template.py).
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from inl_core.corpus import fill_template
from inl_core.corpus.tokenizer import ROLES, Tokenizer
from inl_core.errors import ArtefactError
from inl_core.files import read_json

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('a role must be system, user or assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
)
"""How `inl prepare-data` writes a conversation (encoding.py)."""

Message = Mapping[str, str]
"""{"role": ..., "content": ...}"""

_PLACE = "\ue000{}\ue001"
"""What stands for the content of a message while the template is filled in: characters that hardly a template has. One
that writes them itself only says a message once more."""

_SECONDS = 20
"""How long the process that fills in a template may take, its start included."""


def tokenizer_config(tokenizer: Tokenizer, template: str) -> str:
    """The text of a tokenizer_config.json, with which transformers loads the tokenizer and the template beside it."""
    names = {id: name for name, id in tokenizer.special_ids.items()}
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "clean_up_tokenization_spaces": False,
        "chat_template": template,
    }
    return json.dumps(values, indent=1)


def read_chat_template(path: Path) -> str | None:
    """The chat template in a tokenizer_config.json; None where there is no such file, or none in it."""
    if not path.is_file():
        return None
    template = read_json(path).get("chat_template")
    if template is None or isinstance(template, str):
        return template
    raise ArtefactError(f"{path}: chat_template is not a text; keep the template named default alone")


def encode_chat(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    origin: Path | None = None,
) -> list[int]:
    """The ids of a conversation.

    Args:
        add_generation_prompt: whether the assistant speaks next; otherwise the conversation is over.
        origin: the file that has the template, for errors.

    Raises:
        ArtefactError: the template cannot be used, refuses the messages, or leaves the content of one out.
    """
    for role in {message["role"] for message in messages}.difference(ROLES):
        # A template may write `<|` and the role and `|>`, so a role of the user's choice could be any special token.
        if f"'{role}'" not in template and f'"{role}"' not in template:
            problem = f"a role must be system, user or assistant, not {role}, which the template does not name"
            raise _error(problem, origin)
    parts = _parts(_fill(tokenizer, template, messages, add_generation_prompt=add_generation_prompt, origin=origin))
    places = {place for place, _ in parts if place is not None}
    if missing := set(range(len(messages))) - places:
        role = messages[min(missing)]["role"]
        raise _error(f"it leaves out what message {min(missing) + 1} (of the {role}) says", origin)
    if places - set(range(len(messages))):
        raise _error(f"it asks for message {max(places) + 1} of {len(messages)}", origin)
    special = _special_ids(tokenizer)
    ids: list[int] = []
    text = ""  # since the last special token: what the template and the messages say there is one text
    for place, said in parts:
        if place is not None:
            content = messages[place]["content"]
            # An answer generated after a role begins with the space that the template has there: it stands once.
            text += content[text.endswith(" ") and content.startswith(" ") :]
            continue
        for piece in _divided(said, special):
            if piece in special:
                ids += [*tokenizer.encode(text), special[piece]]
                text = ""
            else:
                text += piece
    return ids + tokenizer.encode(text)


def end_of_answer(tokenizer: Tokenizer, template: str, *, origin: Path | None = None) -> int:
    """The special token that a template has after an answer and before the next message, or else the end of text."""
    messages = [{"role": role, "content": ""} for role in ("user", "assistant", "user")]
    filled = _fill(tokenizer, template, messages, add_generation_prompt=False, origin=origin)
    after = next((text for place, text in _parts(filled.partition(_PLACE.format(1))[2]) if place is None), "")
    special = _special_ids(tokenizer)
    return next((special[piece] for piece in _divided(after, special) if piece in special), tokenizer.eos_id)


def _fill(
    tokenizer: Tokenizer,
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
    origin: Path | None,
) -> str:
    """The text of the template, with a mark in the place of each message's content."""
    names = {id: name for name, id in tokenizer.special_ids.items()}
    values = {
        "messages": [dict(message) | {"content": _PLACE.format(number)} for number, message in enumerate(messages)],
        "bos_token": names[tokenizer.bos_id],
        "eos_token": names[tokenizer.eos_id],
        "add_generation_prompt": add_generation_prompt,
    }
    if template == CHAT_TEMPLATE:
        return fill_template.fill_template(template, values)
    answer = _filled_apart(json.dumps({"template": template, "values": values}))
    if "text" not in answer:
        raise _error(" ".join(answer["error"].split())[:500], origin)
    return answer["text"]


@lru_cache(maxsize=16)
def _filled_apart(request: str) -> dict[str, str]:
    """The answer of fill_template.py to a request, by a process that cannot take this one with it."""
    command = [sys.executable, "-P", fill_template.__file__]
    try:
        done = subprocess.run(command, input=request.encode(), capture_output=True, timeout=_SECONDS, check=True)
        return json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        return {"error": f"it is not filled in after {_SECONDS} seconds"}
    except (subprocess.CalledProcessError, ValueError):
        return {"error": "it takes too long, or too much memory"}


def _error(problem: str, origin: Path | None) -> ArtefactError:
    prefix = "" if origin is None else f"{origin}: "
    return ArtefactError(f"{prefix}the chat template cannot be used for these messages: {problem}")


def _parts(filled: str) -> list[tuple[int | None, str]]:
    """(None, text of the template) and (number of a message, "") in their order."""
    parts = re.split(_PLACE.format("([0-9]{1,9})"), filled)
    return [(int(part), "") if index % 2 else (None, part) for index, part in enumerate(parts)]


def _divided(text: str, special: Mapping[str, int]) -> list[str]:
    """The text of a template, divided into special tokens and what is between them."""
    pattern = "|".join(re.escape(name) for name in sorted(special, key=len, reverse=True))
    return re.split(f"({pattern})", text)


def _special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Special tokens by name, and those of the roles, which a foreign tokenizer may hold as ordinary ones."""
    roles = {f"<|{role}|>": tokenizer.token_id(f"<|{role}|>") for role in (*ROLES, "end")}
    return tokenizer.special_ids | {name: id for name, id in roles.items() if id is not None}
