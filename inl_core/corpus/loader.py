"""Token stream -> batches, which depend on seed, step, rank and world size and on nothing else.

    windows of S + 1 tokens, one every S -> shuffled anew each epoch, in blocks of 2^20 -> sliced [rank::world_size]

- There is no state: any step can be asked for at any time, by any number of workers, in any order.
- The shuffle sorts the raw output of Philox, which numpy promises never to change; of `permutation` it does not.

Shapes: b rows of this rank, S tokens in each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from inl_core.corpus.dataset import TokenDataset, TokenStream
from inl_core.errors import ArtefactError, RecipeError

IGNORED = -100
"""A target that no loss counts."""
BLOCK_WINDOWS = 1 << 20


@dataclass(frozen=True)
class Batch:
    """Inputs, and the tokens that follow them.

    tokens: (b, S) int64.
    targets: (b, S) int64, the next token of each; IGNORED where that belongs to a prompt, begins another document, or
        is padding.
    document_ids: (b, S) int32, which number the documents of a window from 0; None when every window lies inside one
        document, and where documents are not told apart (`TokenStream.document_mask`).
    positions: (b, S) int64, which count from 0 at the start of the window and of each document in it; None when
        document_ids is None.
    """

    tokens: np.ndarray
    targets: np.ndarray
    document_ids: np.ndarray | None = None
    positions: np.ndarray | None = None

    @property
    def num_targets(self) -> int:
        """How many targets count."""
        return int(np.count_nonzero(self.targets != IGNORED))


class BatchLoader:
    """Training batches: step k takes samples [k G, (k+1) G) of the shuffled windows, and a rank every world_size-th.

    `batch_size` is G, the number of sequences in one step over all ranks. An epoch is one pass over all windows; a
    batch may span two epochs.

    Raises:
        ArtefactError: the split has fewer tokens than one window, or no token to train on.
        RecipeError: the batch cannot be divided equally among the ranks.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size % world_size:
            raise RecipeError(f"a batch of {batch_size} sequences does not divide by {world_size} processes")
        if not 0 <= rank < world_size:
            raise RecipeError(f"rank {rank} is not one of {world_size} processes")
        self.num_windows = (dataset.num_tokens - 1) // sequence_length
        if self.num_windows < 1:
            raise ArtefactError(
                f"{dataset.directory}: its {dataset.split} split has {dataset.num_tokens:,} tokens, a window needs "
                f"{sequence_length + 1:,}; prepare more text or lower the sequence length"
            )
        if not _has_targets(dataset, self.num_windows * sequence_length):
            raise ArtefactError(
                f"{dataset.directory}: its {dataset.split} split has no target token, all of its text is prompts; "
                "give the rows of data.sources completions"
            )
        self.dataset, self.sequence_length, self.batch_size = dataset, sequence_length, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size

    def batch(self, step: int) -> Batch:
        """The batch of a step, counted from 0; the same whenever it is asked for."""
        return make_batch(self.dataset, self.windows_of(step) * self.sequence_length, self.sequence_length)

    def windows_of(self, step: int) -> np.ndarray:
        """(b,) the numbers of the windows in the batch of a step."""
        samples = np.arange(step * self.batch_size, (step + 1) * self.batch_size)[self.rank :: self.world_size]
        return self.windows(samples)

    def windows(self, samples: np.ndarray) -> np.ndarray:
        """(n,) the number of the window for each of (n,) sample numbers, which must ascend."""
        windows = np.empty_like(samples)
        done = 0
        while done < len(samples):  # one turn for each block that the samples come from, nearly always one
            epoch, place = divmod(int(samples[done]), self.num_windows)
            blocks, ends = _block_order(self.seed, epoch, self.num_windows)
            index = int(np.searchsorted(ends, place, side="right"))
            block = int(blocks[index])
            size = _block_size(block, self.num_windows)
            first = epoch * self.num_windows + int(ends[index]) - size
            until = int(np.searchsorted(samples, first + size))
            shuffled = _shuffled(self.seed, epoch, block, size)
            windows[done:until] = block * BLOCK_WINDOWS + shuffled[samples[done:until] - first]
            done = until
        return windows


def _has_targets(stream: TokenStream, end: int) -> bool:
    """Whether any of the tokens 1 ... end is to be predicted. Looking stops at the first document with a completion."""
    starts, prompts = stream.document_starts, stream.prompt_lengths
    if starts is None or prompts is None:
        return True
    size = 1 << 16
    for first in range(0, len(starts), size):
        begins = starts[first : first + size] + np.maximum(prompts[first : first + size], 1)
        ends = np.append(starts[first + 1 : first + size + 1], stream.num_tokens)[: len(begins)]
        if (begins < np.minimum(ends, end + 1)).any():
            return True
    return False


def make_batch(stream: TokenStream, starts: np.ndarray, sequence_length: int) -> Batch:
    """The windows that begin at `starts`, (b,) positions in the stream."""
    window = stream.read(starts, sequence_length + 1)
    tokens, targets = window[:, :-1], window[:, 1:].copy()
    is_start = stream.starts_in(window)
    prompt = stream.prompt_mask(starts, window, is_start)
    if prompt is not None:
        targets[prompt[:, 1:]] = IGNORED
    inner = is_start[:, 1:]
    if not inner.any():
        return Batch(np.ascontiguousarray(tokens), targets)
    targets[inner] = IGNORED
    if not stream.document_mask or not inner[:, :-1].any():
        return Batch(np.ascontiguousarray(tokens), targets)
    is_start[:, 0] = False
    begins = is_start[:, :-1]
    places = np.arange(sequence_length)
    document_ids = np.zeros(tokens.shape, dtype=np.int32)
    positions = np.broadcast_to(places, tokens.shape).copy()
    rows = np.flatnonzero(begins.any(axis=1))  # the other rows lie inside one document
    document_ids[rows] = np.cumsum(begins[rows], axis=1, dtype=np.int32)
    positions[rows] -= np.maximum.accumulate(np.where(begins[rows], places, 0), axis=1)
    return Batch(np.ascontiguousarray(tokens), targets, document_ids, positions)


def evaluation_batches(
    stream: TokenStream,
    *,
    sequence_length: int,
    stride: int | None = None,
    batch_size: int,
    max_tokens: int | None = None,
) -> Iterator[Batch]:
    """Windows in order, in which each target of the stream (or of its first `max_tokens`) is scored exactly once.

    With a `stride` below S the windows overlap, and each after the first scores only its last `stride` targets, so that
    these have a context of at least S - stride tokens. The last window is padded; the last batch may have fewer rows.

    Raises:
        RecipeError: the stride is not between 1 and S.
    """
    stride = stride or sequence_length
    if not 0 < stride <= sequence_length:
        raise RecipeError(f"a stride of {stride} is not between 1 and the sequence length {sequence_length}")
    num_targets = min(stream.num_tokens - 1, max_tokens or stream.num_tokens)
    num_windows = 1 + max(0, -(-(num_targets - sequence_length) // stride))
    places = np.arange(sequence_length)
    for first in range(0, num_windows, batch_size):
        starts = np.arange(first, min(first + batch_size, num_windows)) * stride
        batch = make_batch(stream, starts, sequence_length)
        scored = (places >= sequence_length - stride) | (starts[:, None] == 0)
        scored &= starts[:, None] + places < num_targets
        batch.targets[~scored] = IGNORED
        yield batch


def _block_size(block: int, num_windows: int) -> int:
    return min(BLOCK_WINDOWS, num_windows - block * BLOCK_WINDOWS)


@lru_cache(maxsize=4)
def _block_order(seed: int, epoch: int, num_windows: int) -> tuple[np.ndarray, np.ndarray]:
    """(the blocks in the order of this epoch, the number of samples up to the end of each)."""
    num_blocks = -(-num_windows // BLOCK_WINDOWS)
    blocks = _permutation((seed, epoch, 0), num_blocks)
    return blocks, np.cumsum([_block_size(block, num_windows) for block in blocks.tolist()])


@lru_cache(maxsize=3)  # a batch may span two blocks; the third is for evaluation between steps
def _shuffled(seed: int, epoch: int, block: int, size: int) -> np.ndarray:
    return _permutation((seed, epoch, block + 1), size)


def _permutation(key: tuple[int, ...], size: int) -> np.ndarray:
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(size)
    return np.argsort(raw, kind="stable")
