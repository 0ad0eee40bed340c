"""Which documents are duplicates, and which are held out: both from a 64-bit hash of the normalised text.

- The hash comes before everything else, so copies that differ in case, spacing or Unicode form share one fate.
- 64 bits: among a hundred million documents the odds that two different ones collide are 1 in 4,000, and the price
  is one document dropped.
"""

import unicodedata
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from inl_core.corpus.rows import Document


def document_hash(document: Document) -> int:
    """64-bit hash of the normalised text: NFKC, case folded, runs of white space as one space."""
    digest = blake2b(digest_size=8)
    for text in document.texts:
        # For ASCII, lower() is casefold(NFKC()) at a tenth of the cost.
        folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold()
        digest.update(" ".join(folded.split()).encode("utf-8"))
        digest.update(b"\x00")
    digest.update(document.roles.encode())
    return int.from_bytes(digest.digest(), "little")


class SeenHashes:
    """A set of 64-bit hashes at 8 bytes each: sorted runs, merged when they reach equal size."""

    def __init__(self) -> None:
        self._runs: list[np.ndarray] = []

    def add(self, hashes: np.ndarray) -> np.ndarray:
        """Add a block of uint64 hashes; returns a mask of those that were new (the first of equals)."""
        new = np.zeros(len(hashes), dtype=bool)
        new[np.unique(hashes, return_index=True)[1]] = True
        for run in self._runs:
            places = np.minimum(np.searchsorted(run, hashes), len(run) - 1)
            new &= run[places] != hashes
        fresh = np.sort(hashes[new])
        while self._runs and len(fresh) and len(self._runs[-1]) <= 2 * len(fresh):
            fresh = np.sort(np.concatenate([self._runs.pop(), fresh]), kind="stable")
        if len(fresh):
            self._runs.append(fresh)
        return new

    def __len__(self) -> int:
        return sum(map(len, self._runs))


@dataclass(frozen=True)
class Split:
    """Held out: documents whose hash is below the threshold, or, in a tiny corpus, the one document `held_out`.

    cut: the corpus is one document, whose tail is held out; the tail takes the hash `held_out`.
    """

    threshold: int
    held_out: int | None = None
    cut: bool = False
    fraction: float = 0.0

    @property
    def note(self) -> str | None:
        """What the user should know about an unusual split."""
        if self.cut:
            return f"one document only: its last {self.fraction:.0%} is held out for validation"
        if self.held_out is not None:
            return "too few documents for a split by hash: one of them is held out for validation"
        if self.threshold == 0:
            return "one document only, and it cannot be divided: there is no validation split"
        return None

    @classmethod
    def choose(cls, hashes: np.ndarray, num_bytes: np.ndarray, fraction: float, *, can_cut: bool) -> "Split":
        """The hash threshold; or one chosen document when hashing would hold out none, all, or less than one."""
        threshold = int(fraction * 2**64)
        below = hashes < np.uint64(threshold)
        if len(hashes) == 1:
            held_out = (int(hashes[0]) + 1) % 2**64 if can_cut else None
            return cls(0, held_out, cut=can_cut, fraction=fraction)
        if len(hashes) >= 1 / fraction and below.any() and not below.all():
            return cls(threshold, fraction=fraction)
        nearest = np.abs(num_bytes - fraction * num_bytes.sum()).argmin()
        return cls(0, int(hashes[nearest]), fraction=fraction)

    def is_validation(self, hashes: np.ndarray) -> np.ndarray:
        """Mask of the held-out documents."""
        if self.held_out is not None:
            return hashes == np.uint64(self.held_out)
        return hashes < np.uint64(self.threshold)

    def apply_cut(self, documents: list[tuple[Document, int]]) -> list[tuple[Document, int]]:
        """Cut the only document in two at a line end (`cut`); otherwise the documents as they are."""
        if not self.cut or not documents:
            return documents
        ((document, hash),) = documents
        (text,) = document.texts
        middle = max(1, int(len(text) * (1 - self.fraction)))
        middle = text.rfind("\n", 1, middle) + 1 or middle
        head = Document(document.origin, (text[:middle],))
        tail = Document(document.origin, (text[middle:],))
        assert self.held_out is not None
        return [(head, hash), (tail, self.held_out)]


def shard_of(hashes: np.ndarray, num_shards: int) -> np.ndarray:
    """The training shard of each document: low bits, independent of the threshold, which reads the high ones."""
    return ((hashes & np.uint64(0xFFFFFFFF)) % np.uint64(num_shards)).astype(np.int64)


def in_sample(hashes: np.ndarray, share: float) -> np.ndarray:
    """An even sample of the documents for the tokenizer; mixed first, so that it follows neither split nor shard."""
    mixed = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(32)).astype(np.float64) < share * 2**32
