"""What a model knows of held-out Python, beyond bits per byte: the next identifier, and which of two tokens is right.

The rules, applied to every validation document that Python's own tokenizer reads to its end:

- identifiers: names in the code, not keywords, nor anything in comments and strings. One counts as right when each of
  its tokens is the model's most probable one, given the true text before.
- Pairs are two tokens at one place, the true one and a wrong one, after the same true text in the same window of the
  same document. The model is right where the true one is more probable.
    - names: a name of one token that the window has already, against one that it has not; the wrong one is drawn from
      all such names of the split that begin with a space, or do not, as the true one does. So a frequent name is
      wrong as often as it is frequent.
    - attributes: X in `self.X`, which the window has already as `self.X`, against a name that the window has, too, but
      that does not follow `self.` anywhere in the document.
    - brackets: a closing bracket that is a token of its own, against one of another kind.
- What counts as a name inside an f-string differs between versions of Python: compare numbers of one version.
"""

import io
import keyword
import random
import tokenize
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from inl_core.corpus.dataset import TokenDataset
from inl_core.corpus.loader import evaluation_batches
from inl_core.corpus.tokenizer import Tokenizer

PAIRS = ("names", "attributes", "brackets")
_CLOSING = (b")", b"]", b"}")
_DRAWS = 20
"""How often another wrong name is drawn when the window has one already."""


@dataclass(frozen=True)
class Name:
    """An identifier: its first token's place in the stream, the place after its last, whether it follows `self.`."""

    text: str
    begin: int
    end: int
    is_own: bool

    @property
    def is_single(self) -> bool:
        """Whether it is one token."""
        return self.end - self.begin == 1


@dataclass(frozen=True)
class Document:
    """Where a document's tokens begin and end in the stream, and its identifiers in order."""

    begin: int
    end: int
    names: list[Name]


@torch.no_grad()
def score(model: Any, directory: Path, *, sequence_length: int, batch_size: int) -> dict[str, float | int]:
    """Shares of right answers on the validation split of a data set, and how many questions there were."""
    questions, split = Questions.of(directory, sequence_length), TokenDataset.open(directory, "validation")
    device, size = model.embedding.table.weight.device, split.num_tokens
    wrong_id = torch.full((size,), -1)
    for kind in PAIRS:
        for place, token in questions.pairs[kind]:
            wrong_id[place] = token
    right, prefers = torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.bool)
    was_training, start = model.training, 1
    model.eval()
    for batch in evaluation_batches(split, sequence_length=sequence_length, batch_size=batch_size):
        arrays = (batch.tokens, batch.targets, batch.positions, batch.document_ids)
        ids, targets, positions, documents = (None if a is None else torch.from_numpy(a).to(device) for a in arrays)
        assert targets is not None
        inside = targets.flatten() != -100
        places = torch.arange(start, start + targets.numel())[inside.cpu()]
        start += targets.numel()
        hidden = model(ids, positions=positions, document_ids=documents).hidden.flatten(0, 1)
        logits, true, wrong = model.logits(hidden[inside]), targets.flatten()[inside], wrong_id[places].to(device)
        of_true, of_wrong = (logits.gather(1, token.clamp(min=0)[:, None])[:, 0] for token in (true, wrong))
        right[places], prefers[places] = (logits.argmax(-1) == true).cpu(), (of_true > of_wrong).cpu()
    model.train(was_training)
    answers = {"identifiers": [bool(right[begin:end].all()) for begin, end in questions.identifiers]}
    answers |= {kind: [bool(prefers[place]) for place, _ in questions.pairs[kind]] for kind in PAIRS}
    shares = {kind: round(sum(given) / max(1, len(given)), 5) for kind, given in answers.items()}
    return shares | {f"num_{kind}": len(given) for kind, given in answers.items()}


class Questions:
    """The questions about the validation split of a data set.

    Attributes:
        identifiers: (place of the first token in the stream, place after the last) of each.
        pairs: kind -> (place, wrong token) of each.
    """

    def __init__(self, directory: Path, sequence_length: int) -> None:
        self.tokenizer, self.sequence_length = Tokenizer.load(directory / "tokenizer.json"), sequence_length
        split, self.generator = TokenDataset.open(directory, "validation"), random.Random(0)
        self.stream = np.concatenate(split.segments).astype(np.int64)
        self.pieces = self.tokenizer.token_bytes
        starts = [*np.flatnonzero(self.stream == split.bos_id).tolist(), split.num_tokens]
        places = [(begin + 1, end - 1) for begin, end in pairwise(starts)]  # without the first and last token
        documents = [Document(begin, end, list(self._names(begin, end))) for begin, end in places]
        documents = [document for document in documents if document.names]
        self.identifiers = [(name.begin, name.end) for document in documents for name in document.names]
        self.pairs: dict[str, list[tuple[int, int]]] = {kind: [] for kind in PAIRS}
        self.single: dict[bool, list[Name]] = {True: [], False: []}
        for name in (name for document in documents for name in document.names if name.is_single):
            self.single[self._has_space(name)].append(name)
        for document in documents:
            self._add_names(document)
            self._add_brackets(document)

    @classmethod
    @cache
    def of(cls, directory: Path, sequence_length: int) -> "Questions":
        """Made once in a process."""
        return cls(directory, sequence_length)

    def _add_names(self, document: Document) -> None:
        begins = [name.begin for name in document.names]
        own = {"self"} | {name.text for name in document.names if name.is_own}
        for index, name in enumerate(document.names):
            first = (name.begin - 1) // self.sequence_length * self.sequence_length  # of what the model sees
            seen = document.names[bisect_left(begins, first) : index]
            if not name.is_single or all((o.text, o.is_own) != (name.text, name.is_own) for o in seen):
                continue
            if name.is_own:
                others = [o for o in seen if o.is_single and o.text not in own and not self._has_space(o)]
                kind, wrong = "attributes", self.generator.choice(others) if others else None
            else:
                kind, wrong = "names", self._draw({other.text for other in seen}, self._has_space(name))
            if wrong is not None:
                self.pairs[kind].append((name.begin, int(self.stream[wrong.begin])))

    def _draw(self, known: set[str], has_space: bool) -> Name | None:
        """A name that is not known; None where chance gives none."""
        drawn = (self.generator.choice(self.single[has_space]) for _ in range(_DRAWS))
        return next((name for name in drawn if name.text not in known), None)

    def _add_brackets(self, document: Document) -> None:
        for place in range(document.begin, document.end):
            piece = self.pieces[self.stream[place]]
            if piece in _CLOSING:
                wrong = self.generator.choice([other for other in _CLOSING if other != piece])
                self.pairs["brackets"].append((place, self.pieces.index(wrong)))

    def _has_space(self, name: Name) -> bool:
        return self.pieces[self.stream[name.begin]].startswith(b" ")

    def _names(self, begin: int, end: int) -> Iterator[Name]:
        """The identifiers of the document between these places; none when it is not Python to its end."""
        pieces = [self.pieces[token] for token in self.stream[begin:end]]
        ends, code = np.cumsum([len(piece) for piece in pieces]), b"".join(pieces)
        try:
            text = code.decode()
            tokens = list(tokenize.generate_tokens(io.StringIO(text, newline="\n").readline))
        except (tokenize.TokenError, SyntaxError, UnicodeDecodeError):
            return
        lines = text.split("\n")
        starts = np.cumsum([0, *(len(line.encode()) + 1 for line in lines)])
        for base, dot, token in zip([None, None, *tokens], [None, *tokens], tokens, strict=False):
            if token.type != tokenize.NAME or keyword.iskeyword(token.string):
                continue
            row, column = token.start
            first = int(starts[row - 1]) + len(lines[row - 1][:column].encode())
            last = first + len(token.string.encode())
            assert code[first:last].decode() == token.string
            is_own = bool(base and dot and dot.string == "." and base.string == "self")
            places = np.searchsorted(ends, first, side="right"), np.searchsorted(ends, last, side="left")
            yield Name(token.string, begin + int(places[0]), begin + int(places[1]) + 1, is_own)
