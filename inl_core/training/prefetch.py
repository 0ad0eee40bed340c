"""The next step's batch, loaded in another thread while this step computes."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch

from inl_core.corpus.loader import Batch, BatchLoader
from inl_core.training.loss_module import MicroBatch, micro_batches


class Prefetcher:
    """Batches by step, as arrays and as micro-batches on the device.

    A batch is a function of its step, so a step that does not follow its predecessor costs time and nothing else.
    """

    def __init__(self, loader: BatchLoader, micro_batch: int, device: torch.device) -> None:
        self.loader, self.micro_batch, self.device = loader, micro_batch, device
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._next: tuple[int, Future[tuple[Batch, list[MicroBatch]]]] | None = None

    def get(self, step: int) -> tuple[Batch, list[MicroBatch]]:
        """The batch of `step`; the one after it is started."""
        ready = self._next[1].result() if self._next and self._next[0] == step else self.load(step)
        self._next = (step + 1, self._pool.submit(self.load, step + 1))
        return ready

    def close(self) -> None:
        """End the thread; a batch that nobody will ask for is waited for, so that its files can be closed."""
        self._pool.shutdown()

    def load(self, step: int) -> tuple[Batch, list[MicroBatch]]:
        """The batch of `step`, without starting another."""
        batch = self.loader.batch(step)
        return batch, micro_batches(batch, self.micro_batch, self.device)
