"""A file that is one JSON array of objects, as those of Alpaca and ShareGPT are -> its items, one after the other.

It is read in blocks, so that memory holds a block and an item, whatever the size of the file.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from inl_core.corpus.reading.compression import opened
from inl_core.corpus.reading.jsonl import MAX_LINE, has_too_many_values
from inl_core.corpus.reading.rows import BadRow
from inl_core.errors import ArtefactError
from inl_core.files import RepeatedKey, without_repeated_keys

_BLOCK = 1 << 20  # characters
_NO_END = "the array does not end"
_SPACE = re.compile(r"\s*")
_LONGEST_TOKEN = 32  # characters: an error this near the end may be a token that goes on behind what is held
_STRICT, _LENIENT = json.JSONDecoder(object_pairs_hook=without_repeated_keys), json.JSONDecoder(parse_int=str)


def begins_array(head: bytes) -> bool:
    """Whether the first bytes of a file are those of an array of objects."""
    return re.match(rb'(?:\xef\xbb\xbf)?\s*\[\s*\{\s*["}]', head) is not None


def array_values(path: Path, name: str, compression: str | None) -> Iterator[tuple[str, Any]]:
    """("file[index]", the JSON value, or a BadRow) for every item of the array.

    Raises:
        ArtefactError: the array is broken somewhere, so that nobody can say where the next item begins.
    """
    with opened(path, compression, name) as file:
        text = io.TextIOWrapper(file, encoding="utf-8-sig")
        held, number = _more(text, name), 0
        place, is_separated = held.find("[") + 1, True
        while True:
            place = _SPACE.match(held, place).end()  # pyright: ignore[reportOptionalMemberAccess]  matches anything
            origin = f"{name}[{number}]"
            if not is_separated and held.startswith(",", place):
                place, is_separated = place + 1, True
                continue
            if held.startswith("]", place) and not (number and is_separated):
                if (held[place + 1 :] + _more(text, name)).strip():
                    raise ArtefactError(f"{name}: goes on after the end of its array; keep the array alone")
                return
            if not is_separated and place < len(held):
                raise ArtefactError(f"{origin}: no comma before it; mend the file, or fetch it again")
            found, problem = _item(held, place, origin)
            if found is None:
                held, place = held[place:], 0
                if len(held) > MAX_LINE or has_too_many_values(held):
                    raise ArtefactError(f"{origin}: too long for one row")
                if not (more := _more(text, name, max(_BLOCK, len(held)))):
                    raise ArtefactError(f"{origin}: {problem}; mend the file, or fetch it again")
                held += more
                continue
            value, place = found
            yield origin, value
            number, is_separated = number + 1, False


def _item(held: str, place: int, origin: str) -> tuple[tuple[Any, int] | None, str]:
    """((value, its end), "") of the item at `place`; (None, why) where it is broken, or goes on behind what is held."""
    try:
        try:
            value, end = _STRICT.raw_decode(held, place)
        except json.JSONDecodeError:
            raise
        except RepeatedKey as error:
            value, end = BadRow(origin, str(error)), _LENIENT.raw_decode(held, place)[1]
        except ValueError as error:  # a number of more digits than Python reads
            value, end = BadRow(origin, f"not JSON: {error}"), _LENIENT.raw_decode(held, place)[1]
    except json.JSONDecodeError as error:
        problem = f"not JSON: {error.msg.removesuffix(' at')}"  # some of Python's messages go on with the place
        if error.pos < len(held) - _LONGEST_TOKEN and not error.msg.startswith("Unterminated string"):
            raise ArtefactError(f"{origin}: {problem}; mend the file, or fetch it again") from None
        return None, _NO_END if place == len(held) else problem
    except RecursionError:
        raise ArtefactError(f"{origin}: not JSON: nested too deeply") from None
    # A number at the end of what is held may have more digits behind it.
    return ((value, end), "") if end < len(held) else (None, _NO_END)


def _more(text: io.TextIOWrapper, name: str, size: int = _BLOCK) -> str:
    try:
        return text.read(size)
    except UnicodeDecodeError as error:
        raise ArtefactError(f"{name}: not UTF-8: {error.reason}; save it as UTF-8") from None
