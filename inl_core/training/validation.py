"""The validation split as a run scores it: a part periodically, all of it at the end unless told otherwise."""

from collections.abc import Iterable, Iterator
from itertools import islice

import torch

from inl_core.corpus.loader import Batch, TokenDataset, evaluation_batches
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.inference.evaluate import ByteCounts, Evaluation, NothingToScore, byte_counts, evaluate
from inl_core.model import IntegratorLanguageModel
from inl_core.training.distributed import World
from inl_core.training.interruption import StopSignal


class Validation:
    """Scores a model on windows of `sequence_length` tokens of a split, `batch_size` at once on each rank."""

    def __init__(
        self,
        split: TokenDataset,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        batch_size: int,
        autocast: torch.autocast,
        world: World,
    ) -> None:
        self.split, self.tokenizer = split, tokenizer
        self.sequence_length, self.batch_size = sequence_length, batch_size
        self.autocast, self.world = autocast, world
        self._counted: dict[bool, ByteCounts] = {}

    def name(self, tokens: int | None) -> str:
        """What an evaluation of `tokens` (None is all) scores: only scores of the same name can be compared."""
        end = min(tokens or self.split.num_tokens, self.split.num_tokens - 1)
        context = "documents" if self.split.document_mask else "windows"
        return f"{self.split.fingerprint[:12]}/{self.sequence_length}/{context}/{end}"

    def score(
        self, model: IntegratorLanguageModel, tokens: int | None, stop: StopSignal | None = None
    ) -> Evaluation | None:
        """The scores on every rank; None when no target token was met.

        A signal that `stop` hears ends it early, and its scores are then of no use.
        """
        batches: Iterable[Batch] = evaluation_batches(
            self.split,
            sequence_length=self.sequence_length,
            stride=self.sequence_length,
            batch_size=self.batch_size,
            max_tokens=tokens,
        )
        own = _until(stop, islice(batches, self.world.rank, None, self.world.size))
        counts = self._byte_counts(is_whole=tokens is None or tokens >= self.split.num_tokens - 1)
        try:
            return evaluate(
                model,
                own,
                counts.token_num_bytes,
                num_bytes=counts.num_bytes,
                autocast=self.autocast,
                reduce=self.world.sum,
            )
        except NothingToScore:  # on every rank: the sums are of all ranks
            return None

    def _byte_counts(self, *, is_whole: bool) -> ByteCounts:
        if is_whole not in self._counted:
            self._counted[is_whole] = byte_counts(self.tokenizer, self.split, self.split.num_bytes, is_whole=is_whole)
        return self._counted[is_whole]


def _until(stop: StopSignal | None, batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches up to the one during which a signal came; one at least, so that there is something to sum."""
    for batch in batches:
        yield batch
        if stop is not None and stop.requested:
            return
