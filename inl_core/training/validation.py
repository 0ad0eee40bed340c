"""The validation split as a run scores it: a part of it periodically, and by default all of it at the end."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from itertools import islice

import numpy as np

from inl_core.corpus.dataset import TokenDataset
from inl_core.corpus.loader import IGNORED, Batch, evaluation_batches
from inl_core.inference.evaluate import ByteCounts, Evaluation, NothingToScore, byte_counts, evaluate
from inl_core.model import IntegratorLanguageModel
from inl_core.training.distributed import World
from inl_core.training.interruption import StopSignal
from inl_core.training.precision import autocast_of
from inl_core.training.run import RunFiles


class Validation:
    """Scores a model on windows of the recipe's sequence length, a micro-batch at once on each rank."""

    def __init__(self, split: TokenDataset, run: RunFiles, world: World) -> None:
        settings = run.recipe.training
        self.split, self.world = split, world
        self.sequence_length, self.batch_size = settings.sequence_length, settings.micro_batch(world.size)
        self.autocast = autocast_of(run.recipe, world.device)

        @cache
        def count(is_whole: bool) -> ByteCounts:
            return byte_counts(run.tokenizer, split, split.num_bytes, is_whole=is_whole)

        self._byte_counts = count

    def name(self, tokens: int | None) -> str:
        """What an evaluation of `tokens` (None is all) scores: only scores of the same name can be compared."""
        end = min(tokens or self.split.num_tokens, self.split.num_tokens - 1)
        context = "documents" if self.split.document_mask else "windows"
        return f"{self.split.fingerprint[:12]}/{self.sequence_length}/{context}/{end}"

    def score(
        self, model: IntegratorLanguageModel, tokens: int | None, stop: StopSignal | None = None
    ) -> Evaluation | None:
        """The scores, the same on every rank; None when no target token was met.

        A signal that `stop` hears ends it early, and its scores are then of no use.
        """
        batches = evaluation_batches(
            self.split, sequence_length=self.sequence_length, batch_size=self.batch_size, max_tokens=tokens
        )
        own = _until(stop, self._share(batches), self.world)
        counts = self._byte_counts(tokens is None or tokens >= self.split.num_tokens - 1)
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

    def _share(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """This rank's batches, as many as any other's: where there is none left, another's without its targets."""
        rank, size = self.world.rank, self.world.size
        while dealt := list(islice(batches, size)):
            idle = replace(dealt[0], targets=np.full_like(dealt[0].targets, IGNORED))
            yield dealt[rank] if rank < len(dealt) else idle


def _until(stop: StopSignal | None, batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """The batches up to the one during which any rank heard a signal; at least one, so that there is a sum."""
    for batch in batches:
        yield batch
        if stop is not None and world.sum_numbers(float(stop.is_asking()))[0]:
            return
