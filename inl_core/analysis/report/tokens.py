"""What the model does by kind of token, by position and by loss, and the text itself, coloured."""

import math
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from inl_core.analysis.report.charts import grouped_map
from inl_core.analysis.report.parts import Part
from inl_core.analysis.report.probe import Probe
from inl_core.corpus.tokenizer import Tokenizer

SHOWN_TOKENS = 400
KINDS = ("special", "line end", "space", "number", "punctuation", "word begins", "word goes on", "other")


def token_kind(text: str, *, is_special: bool = False) -> str:
    """Which of KINDS a token is, by its text."""
    if is_special:
        return "special"
    if not text.strip():
        return "line end" if "\n" in text else "space"
    body = text.strip()
    if re.fullmatch(r"[\d.,_]*\d[\d.,_]*", body):
        return "number"
    if not any(letter.isalnum() for letter in body):
        return "punctuation"
    if body[0].isalpha():
        return "word begins" if text[0].isspace() or body[0].isupper() else "word goes on"
    return "other"


def token_names(tokenizer: Tokenizer, ids: Sequence[int]) -> dict[int, str]:
    """The text of each token, special ones by their name."""
    specials = {identity: name for name, identity in tokenizer.special_ids.items()}
    return {int(token): specials.get(int(token)) or tokenizer.decode([int(token)]) for token in set(ids)}


def grouped_parts(name: str, found: Probe, tokenizer: Tokenizer) -> list[Part]:
    """Means over the tokens of a kind, at a position, of a loss."""
    texts, special = token_names(tokenizer, found.token_ids.tolist()), set(tokenizer.special_ids.values())
    kind_of = {token: token_kind(text, is_special=token in special) for token, text in texts.items()}
    kinds = np.array([KINDS.index(kind_of[int(token)]) for token in found.token_ids])
    places = np.where(found.positions > 0, np.log2(np.maximum(found.positions, 1)).astype(int) + 1, 0)
    edges = np.quantile(found.loss, [0.2, 0.4, 0.6, 0.8])
    fifths = np.searchsorted(edges, found.loss, side="right")
    bounds = [0, *edges.tolist(), float(found.loss.max())]
    return [
        _grouped(name, "kind", "By kind of token", found, kinds, list(KINDS)),
        _grouped(
            name, "position", "By position in the text", found, places, [_span(n) for n in range(places.max() + 1)]
        ),
        _grouped(
            name,
            "loss_range",
            "By how hard the next token is to predict",
            found,
            fifths,
            [f"{low:.2g} to {high:.2g} nats" for low, high in pairwise(bounds)],
        ),
    ]


def _span(power: int) -> str:
    low, high = (0, 0) if power == 0 else (2 ** (power - 1), 2**power - 1)
    return str(low) if low == high else f"{low} to {high}"


def _grouped(name: str, key: str, title: str, found: Probe, groups: np.ndarray, labels: list[str]) -> Part:
    measures = {**found.gains, **{f"share of {term}": values for term, values in found.terms.items()}}
    rows: list[tuple[Any, ...]] = []
    for number, label in enumerate(labels):
        chosen = groups == number
        if not chosen.any():
            continue
        loss = float(found.loss[chosen].mean())
        for place, where in enumerate(found.places):
            means = (_mean(values[place, chosen]) for values in measures.values())
            rows.append((label, where, int(chosen.sum()), loss, *means))
    see = (
        "A measure that is the same in every column does not react to the token. The loss is the next token's, in nats."
    )
    columns = (key, "place", "tokens", "loss", *measures)
    return Part(
        f"{name}-by-{key}", title, see, columns, rows, (grouped_map(key, len(found.places), [*measures, "loss"]),)
    )


def text_part(name: str, found: Probe, tokenizer: Tokenizer) -> Part:
    """The first tokens of the text, each with its loss and what happens at every place."""
    count = min(SHOWN_TOKENS, len(found.token_ids))
    texts = token_names(tokenizer, [*found.token_ids[:count].tolist(), *found.target_ids[:count].tolist()])
    measures = {**{f"share of {term}": values for term, values in found.terms.items()}, **found.gains}
    columns = ["token", "next", "loss", "bits"]
    reading: dict[str, dict[str, str]] = {"loss of the next token, nats": {"": "loss"}}
    series = []
    for measure, values in measures.items():
        for place, where in enumerate(found.places):
            if not np.isnan(values[place]).all():
                columns.append(f"{measure}, {where}")
                reading.setdefault(measure, {})[where] = columns[-1]
                series.append(values[place])
    rows = []
    for n in range(count):
        token, following = texts[int(found.token_ids[n])], texts[int(found.target_ids[n])]
        loss = float(found.loss[n])
        rows.append((token, following, loss, loss / math.log(2), *(round(float(values[n]), 4) for values in series)))
    see = "The darker, the larger. Point at a token, or touch it, for its numbers; choose a measure and a layer."
    return Part(f"{name}-text", "The text, coloured", see, tuple(columns), rows, (), reading)


def _mean(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else None
