"""A split as one long stream of tokens, read by position, with the boundaries of its documents.

- The shards are mapped into memory, not loaded: a window copies the tokens that it needs.
- Where documents begin is seen from the tokens themselves (bos), so no index grows with the data. Only data with
  prompts has one, of 12 bytes for each document. Where the earlier answers of a conversation are is seen from the
  tokens, too: text never becomes one of the special tokens around them.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from inl_core.corpus.manifest import TOKENIZER, load_manifest
from inl_core.corpus.shard_check import check_shards, prepare_again
from inl_core.corpus.tokenizer import Tokenizer, Turns
from inl_core.errors import ArtefactError
from inl_core.recipe.data import LossOn

_LOOK_BACK = 512
"""Tokens that are read at once to find out in whose message a window begins."""


class TokenStream:
    """Arrays of token ids, one after the other, read as one array.

    Args:
        bos_id, eos_id: the tokens with which a document begins and ends.
        document_starts, prompt_lengths: (N,) where each document begins, and how many of its first tokens are not
            trained on; None when no document has a prompt, or all is trained on.
        turns: counts the earlier answers of a conversation, too, by the special tokens around them; None does not.
        document_mask: whether batches tell the documents apart (`Batch.document_ids`).
    """

    def __init__(
        self,
        segments: Sequence[np.ndarray],
        *,
        bos_id: int,
        eos_id: int,
        document_starts: np.ndarray | None = None,
        prompt_lengths: np.ndarray | None = None,
        turns: Turns | None = None,
        document_mask: bool = False,
    ) -> None:
        self.segments = [segment for segment in segments if len(segment)]
        self.bos_id, self.eos_id = bos_id, eos_id
        self.document_starts, self.prompt_lengths = document_starts, prompt_lengths
        self.turns, self.document_mask = turns, document_mask
        self._ends = np.cumsum([len(segment) for segment in self.segments], dtype=np.int64)
        self._begins = [0, *self._ends.tolist()]
        self.num_tokens = self._begins[-1]

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """(n, length) int64: the tokens from each of (n,) starts on; eos beyond the end of the stream."""
        out = np.empty((len(starts), length), dtype=np.int64)
        segments, begins = self.segments, self._begins
        indices = np.searchsorted(self._ends, starts, side="right").tolist()
        for row, (start, index) in enumerate(zip(starts.tolist(), indices, strict=True)):
            part = (
                segments[index][start - begins[index] : start - begins[index] + length] if index < len(segments) else ()
            )
            if len(part) == length:
                out[row] = part
            else:
                self._read_across(out[row], start, index)
        return out

    def _read_across(self, row: np.ndarray, start: int, index: int) -> None:
        filled = 0
        while filled < len(row) and index < len(self.segments):
            offset = start + filled - self._begins[index]
            part = self.segments[index][offset : offset + len(row) - filled]
            row[filled : filled + len(part)] = part
            filled, index = filled + len(part), index + 1
        row[filled:] = self.eos_id

    def starts_in(self, tokens: np.ndarray) -> np.ndarray:
        """(n, L) bool: which of these (n, L) tokens begin a document."""
        is_start = tokens == self.bos_id
        if self.bos_id == self.eos_id:
            # One token marks both ends. Since no document is empty, of two such tokens in a row the second begins a
            # document. At the first place of a window, where the token before is not seen, it begins a document unless
            # the next token makes it the first of such a pair.
            pair = is_start[:, 1:] & is_start[:, :-1]
            first = is_start[:, 0] & ~pair[:, 0] if tokens.shape[1] > 1 else is_start[:, 0]
            is_start = np.concatenate([first[:, None], pair], axis=1)
        return is_start

    def prompt_mask(self, starts: np.ndarray, tokens: np.ndarray, is_start: np.ndarray) -> np.ndarray | None:
        """(n, L) bool: which tokens belong to a prompt, bos included; None when no document has a prompt.

        `starts`, (n,), is where the windows begin; `is_start`, (n, L), is `starts_in` of their `tokens`.
        """
        if self.document_starts is None or self.prompt_lengths is None:
            return None
        positions = starts[:, None] + np.arange(is_start.shape[1])
        # The first token's document is looked up; each start after it is one document further.
        first = np.searchsorted(self.document_starts, starts, side="right")[:, None] - 1
        later = np.minimum(first + np.cumsum(is_start[:, 1:], axis=1), len(self.document_starts) - 1)
        documents = np.concatenate([first, later], axis=1)
        is_prompt = positions - self.document_starts[documents] < self.prompt_lengths[documents]
        if self.turns is None:
            return is_prompt
        begins = self.document_starts[documents[:, 0]].tolist()
        continues = [
            bool(is_prompt[row, 0]) and self._is_in_answer(begin, start)
            for row, (begin, start) in enumerate(zip(begins, starts.tolist(), strict=True))
        ]
        return is_prompt & ~self._answers(self.turns, tokens, is_start, np.array(continues))

    def _answers(self, turns: Turns, tokens: np.ndarray, is_start: np.ndarray, continues: np.ndarray) -> np.ndarray:
        """(n, L) bool: which tokens belong to an answer, with the token that ends it, without the one that begins it.

        `continues`, (n,), is whether the window's first token does so unless it is itself a begin.
        """
        marked = np.where(is_start | np.isin(tokens, turns.all), np.arange(tokens.shape[1]), -1)
        before = np.full_like(marked, -1)  # the place of the last such token before each
        before[:, 1:] = np.maximum.accumulate(marked, axis=1)[:, :-1]
        is_answer = np.take_along_axis(tokens, np.maximum(before, 0), axis=1) == turns.answer
        return np.where(before < 0, continues[:, None], is_answer)

    def _is_in_answer(self, begin: int, place: int) -> bool:
        """Whether the message in which a token stands is an answer; its document begins at `begin`."""
        assert self.turns is not None
        while place > begin:
            first = max(begin, place - _LOOK_BACK)
            tokens = self.read(np.array([first]), place - first)[0]
            if len(found := np.flatnonzero(np.isin(tokens, self.turns.all))):
                return int(tokens[found[-1]]) == self.turns.answer
            place = first
        return False


class TokenDataset(TokenStream):
    """One split of a prepared data set.

    Attributes:
        num_tokens, num_documents, num_bytes: totals; bytes are those of the text, without special tokens.
        fingerprint: that of the whole data set (`Manifest`).
        has_conversations: whether any of its documents are chats.
    """

    def __init__(self, directory: Path, split: str, *, document_mask: bool, loss_on: LossOn) -> None:
        manifest = load_manifest(directory)
        info = manifest.splits.get(split)
        if info is None or not info.documents:
            raise ArtefactError(f"{directory}: holds no {split} documents; prepare it from more text")
        check_shards(directory, manifest, info.shards)
        self._tables = [_open(directory / shard.file) for shard in info.shards]
        batches = [batch for table in self._tables for batch in table]
        segments = [batch["tokens"].values.to_numpy(zero_copy_only=True) for batch in batches]
        turns = Tokenizer.load(directory / TOKENIZER).turns if manifest.has_prompts else None
        index = _document_index(batches) if manifest.has_prompts and loss_on != "all" else (None, None)
        super().__init__(
            segments,
            bos_id=manifest.bos_id,
            eos_id=manifest.eos_id,
            document_starts=index[0],
            prompt_lengths=index[1],
            turns=turns if loss_on == "answers" else None,
            document_mask=document_mask,
        )
        self.directory, self.split = directory, split
        self.num_documents, self.num_bytes = info.documents, info.bytes
        self.vocab_size, self.fingerprint = manifest.vocab_size, manifest.fingerprint
        self.has_conversations = turns is not None and any(
            _hold_conversations(table[0], turns) for table in self._tables
        )

    @classmethod
    def open(
        cls,
        directory: str | os.PathLike[str],
        split: str = "train",
        *,
        document_mask: bool = True,
        loss_on: LossOn = "answers",
    ) -> "TokenDataset":
        """Open the split `train` or `validation`; ArtefactError when a shard is missing or damaged."""
        return cls(Path(directory), split, document_mask=document_mask, loss_on=loss_on)


def _open(path: Path) -> list[pa.RecordBatch]:
    try:
        reader = pa.ipc.open_file(pa.memory_map(os.fsencode(path)))
        return [reader.get_batch(index) for index in range(reader.num_record_batches)]
    except (pa.ArrowException, OSError) as error:  # it was whole a moment ago, and is not any more
        raise ArtefactError(f"{path}: not a readable Arrow file ({error}); {prepare_again(path.parent)}") from None


def _hold_conversations(batch: pa.RecordBatch, turns: Turns) -> bool:
    """Whether any of the documents begins with a role. Hashes dealt them to the shards, so a batch is a fair sample."""
    tokens, starts = batch["tokens"].values.to_numpy(), batch["tokens"].offsets.to_numpy()[:-1]
    return bool(np.isin(tokens[starts + 1], turns.all).any())


def _document_index(batches: list[pa.RecordBatch]) -> tuple[np.ndarray, np.ndarray]:
    """(N,) int64 where each document begins in the stream, and (N,) int32 the length of its prompt."""
    starts, prompts, base = [], [], 0
    for batch in batches:
        offsets = batch["tokens"].offsets.to_numpy()
        starts.append(offsets[:-1] + base)
        prompts.append(batch["prompt_length"].to_numpy())
        base += int(offsets[-1])
    return np.concatenate(starts), np.concatenate(prompts)
