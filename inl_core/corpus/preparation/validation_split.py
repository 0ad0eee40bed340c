"""Which documents are for training and which are held out for validation, and the other choices made by their hash.

A document's hash is that of its normalised text (text_chunks.py), so the choice depends on nothing but the text: it is
the same in every run and for every order of the sources.
"""

from dataclasses import dataclass

import numpy as np

from inl_core.corpus.reading.rows import Document


@dataclass(frozen=True)
class Split:
    """Held out are the documents whose hash is below the threshold, or, in a tiny corpus, the one with hash `held_out`.

    cut: the corpus is a single document, and the end of its text is held out, as a document with the hash `held_out`.
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
        """The split of these documents, (N,) hashes and sizes, that holds out about a `fraction` of them.

        A threshold for the hashes; but when that would hold out none or all of them, or is to hold out less than one
        document, the one document whose size is nearest to what is wanted. `can_cut` says whether a single document is
        plain text, which can be cut in two.
        """
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
        """Mask of the documents that are held out."""
        if self.held_out is not None:
            return hashes == np.uint64(self.held_out)
        return hashes < np.uint64(self.threshold)

    def cut_in_two(self, document: Document) -> list[Document]:
        """The only document (`cut`) as two, one for training and one for validation, cut at a line end."""
        (text,) = document.texts
        middle = max(1, int(len(text) * (1 - self.fraction)))
        middle = text.rfind("\n", 1, middle) + 1 or middle
        return [Document(document.origin, (text[:middle],)), Document(document.origin, (text[middle:],))]


def shard_of(hashes: np.ndarray, num_shards: int) -> np.ndarray:
    """The training shard of each document. It is taken from the low bits; the split depends on the high ones."""
    return ((hashes & np.uint64(0xFFFFFFFF)) % np.uint64(num_shards)).astype(np.int64)


def in_sample(hashes: np.ndarray, share: float) -> np.ndarray:
    """Mask of an even sample of the documents, for the tokenizer; hashes are mixed to be independent of the above."""
    mixed = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed >> np.uint64(32)).astype(np.float64) < share * 2**32
