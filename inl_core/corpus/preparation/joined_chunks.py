"""The chunks of all parts of a preparation as those of one that was made as a whole."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from inl_core.corpus.preparation.chunks import ChunkInfo, Chunks, HashedDocuments
from inl_core.corpus.preparation.text_chunks import SeenHashes


class JoinedChunks(Chunks):
    """The chunks of all parts, numbered through, without the documents of which a copy stands in an earlier part.

    Copies that a source's weight asks for stand in one chunk together, and are kept. Chunks that are encoded now are
    written into `work`; the files of the parts stay as they are.
    """

    def __init__(self, work: Path, parts: Sequence[tuple[int, Chunks]]) -> None:
        """`parts`: of each part, how many files the parts before it have, and its chunks."""
        super().__init__(work)
        self._places = [(first, chunks, number) for first, chunks in parts for number in range(chunks.count())]
        self._is_new, self._num_copies = [], []
        seen = SeenHashes()
        for _, chunks, number in self._places:
            hashes = chunks.hashes(number)[0]
            once = np.unique(hashes)
            new = once[seen.add(once)]
            self._is_new.append(np.isin(hashes, new))
            self._num_copies.append(len(once) - len(new))

    def count(self) -> int:
        """How many chunks there are."""
        return len(self._places)

    def is_encoded(self, number: int) -> bool:
        """Whether the tokens of a chunk are complete."""
        _, chunks, own_number = self._places[number]
        return self._is_encoded_here(number) or chunks.is_encoded(own_number)

    def info(self, number: int) -> ChunkInfo:
        """What happened to the rows of a chunk, with the numbers that files have among those of all parts."""
        first, chunks, own_number = self._places[number]
        info, num_copies = chunks.info(own_number), self._num_copies[number]
        found = {str(first + int(index)): format for index, format in info.found.items()}
        return info.model_copy(update={"found": found, "num_duplicates": info.num_duplicates + num_copies})

    def hashes(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(hashes, num_bytes) of the documents of a chunk."""
        if self._is_encoded_here(number):
            return super().hashes(number)
        _, chunks, own_number = self._places[number]
        hashes, num_bytes = chunks.hashes(own_number)
        return hashes[self._is_new[number]], num_bytes[self._is_new[number]]

    def read_text(self, number: int) -> HashedDocuments:
        """The documents of a chunk that is not encoded."""
        _, chunks, own_number = self._places[number]
        chunk, is_new = chunks.read_text(own_number), self._is_new[number]
        documents = [document for document, is_kept in zip(chunk.documents, is_new.tolist(), strict=True) if is_kept]
        return HashedDocuments(documents, chunk.hashes[is_new], chunk.num_bytes[is_new])

    def read_tokens(self, number: int) -> pa.RecordBatch:
        """The documents of a chunk that is encoded."""
        if self._is_encoded_here(number):
            return super().read_tokens(number)
        _, chunks, own_number = self._places[number]
        batch = chunks.read_tokens(own_number)
        return batch if self._is_new[number].all() else batch.filter(pa.array(self._is_new[number]))

    def _is_encoded_here(self, number: int) -> bool:
        return super().is_encoded(number)
