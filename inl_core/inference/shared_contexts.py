"""Continuations of one context, such as the answers of a multiple choice: the context is computed once.

    groups = shared_contexts(pairs, longest, most)

- The contexts of a batch are run in one pass, padded on the left, and their keys and values kept in a cache. Each row
  of it is then repeated for its continuations, which are run in a second pass, padded on the right.
- Legend: G contexts, B continuations, D d_model, V vocabulary.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inl_core.model import IntegratorLanguageModel, Options

Ids = Sequence[int]
_WORTH_IT = 4
"""The context is shared where this saves at least one token in so many."""


@dataclass(frozen=True)
class Group:
    """A context, and the continuations after it with the numbers of their pairs."""

    context: tuple[int, ...]
    members: list[tuple[int, Ids]]


def shared_contexts(pairs: Sequence[tuple[Ids, Ids]], longest: int, most: int) -> list[Group]:
    """The contexts that are worth computing once, the longest first.

    Args:
        longest: tokens that the model sees at once; a pair that is longer is in no group.
        most: continuations of a group; there may be several groups of one context.
    """
    found = defaultdict(list)
    for index, (context, continuation) in enumerate(pairs):
        if context and continuation and len(context) + len(continuation) - 1 <= longest:
            found[tuple(context)].append((index, continuation))
    groups = []
    for context, members in found.items():
        rows = {tuple(continuation[:-1]) for _, continuation in members}
        saved = (len(rows) - 1) * len(context)
        if most > 1 and saved * _WORTH_IT >= len(rows) * len(context) + sum(map(len, rows)):
            groups += [Group(context, members[first : first + most]) for first in range(0, len(members), most)]
    return sorted(groups, key=lambda group: -len(group.context))


def batches(groups: Sequence[Group], most: int) -> Iterator[list[Group]]:
    """The groups in batches of at most `most` continuations, which no group has more of."""
    batch: list[Group] = []
    for group in groups:
        if batch and sum(len(one.members) for one in (*batch, group)) > most:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def hidden_states(
    model: IntegratorLanguageModel, groups: Sequence[Group], options: Options
) -> Iterator[tuple[tuple[int, int], Ids, Tensor]]:
    """((number of the pair, 0), its continuation of N tokens, the states (N, D) from which these are predicted)."""
    device = model.embedding.table.weight.device
    width = max(len(group.context) for group in groups)
    ids = [[*[0] * (width - len(group.context)), *group.context] for group in groups]
    padding = torch.tensor([width - len(group.context) for group in groups], device=device)
    members = [(row, index, continuation) for row, group in enumerate(groups) for index, continuation in group.members]
    most = max(len(continuation) for _, _, continuation in members) - 1
    cache = model.new_cache(len(groups), width + most)
    cache.padding = padding if bool(padding.any()) else None
    last = model(torch.tensor(ids, device=device), cache=cache, options=options).hidden[:, -1:]  # (G, 1, D)
    owners = torch.tensor([row for row, _, _ in members], device=device)
    cache.select(owners)
    states = last[owners]  # (B, 1, D)
    if most:
        tails = [[*continuation[:-1], *[0] * (most + 1 - len(continuation))] for _, _, continuation in members]
        output = model(torch.tensor(tails, device=device), cache=cache, options=options)
        states = torch.cat((states, output.hidden), dim=1)
    for (_, index, continuation), own in zip(members, states, strict=True):
        yield (index, 0), continuation, own[: len(continuation)]
