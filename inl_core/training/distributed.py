"""The processes of a run: one is world size 1, torchrun or srun give more, and the code above sees no difference.

- Gloo on CPUs, NCCL on GPUs. What the processes do with one model is in parallel.py.
- The default group carries tensors of a step, and a second one what the hosts tell each other in every step. Both have
  a timeout, which finds a rank that hangs or whose machine was lost. Everything else goes over a third group, in which
  a rank may wait as long as another prepares data or saves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from inl_core.errors import InlError, RecipeError
from inl_core.launcher import Place, read_place

Result = TypeVar("Result")

STEP_WAIT = timedelta(minutes=10)
"""For another rank in the middle of a step; it is NCCL's own."""
LONGEST_WAIT = timedelta(days=7)
"""For what one rank does while the others wait: preparing data, saving, reading a checkpoint back."""


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device
    control: Any = None
    """The gloo group of messages between hosts, which no GPU is waited for in; None where this process is alone."""
    steps: Any = None
    """The gloo group of what the hosts exchange in every step, in which nobody is waited for longer than STEP_WAIT."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files and talks to the user."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_numbers(self, *values: float) -> list[float]:
        """Sums over ranks of numbers that the hosts know, so that no GPU is waited for.

        Raises:
            ConnectionError: another rank is gone, or has not come here within STEP_WAIT.
        """
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with _peers():
            dist.all_reduce(total, group=self.steps or self.control)
        return total.tolist()

    def on_each(self, work: Callable[[], Result]) -> list[Result]:
        """Run `work` on every rank; each gets what all returned, by rank, or raises what the first of them raised."""
        found: Any = None
        try:
            found = work()
        except Exception as error:
            found = error
        results = self.gather(found)
        for error in results:
            if isinstance(error, Exception):
                if not self.is_main and isinstance(error, InlError):
                    error.is_shared = True
                raise error
        return results

    def gather(self, value: Result) -> list[Result]:
        """Every rank's value, by rank, on every rank; the hosts exchange them."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _peers():
            dist.all_gather_object(values, value, group=self.control)
        return values

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value on every rank; an InlError is marked as shared on the other ranks."""
        if self.size == 1:
            return value
        box = [value]
        with _peers():
            dist.broadcast_object_list(box, group=self.control, device=torch.device("cpu"))
        if not self.is_main and isinstance(box[0], InlError):
            box[0].is_shared = True
        return box[0]

    def on_main(self, work: Callable[[], Result]) -> Result:
        """Run `work` on rank 0 alone; every rank gets what it returns, or raises what it raised."""
        found: Any = None
        if self.is_main:
            try:
                found = work()
            except Exception as error:
                found = error
        found = self.broadcast(found)
        if isinstance(found, Exception):
            raise found
        return found


@contextmanager
def _peers() -> Iterator[None]:
    """In this context gloo's error for a rank that is gone, or silent for too long, is a ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ConnectionError(f"another process of this run is gone, or does not answer: {reason}") from error


ALONE = World(0, 1, torch.device("cpu"))
"""The world of a model that no other process trains."""


def choose_device(setting: str, local_rank: int = 0) -> torch.device:
    """The device a setting means on this machine; RecipeError when it is not there."""
    if setting == "cuda" and not torch.cuda.is_available():
        raise RecipeError("training.device: cuda asked for, but torch sees no GPU here; use auto or cpu")
    use_cuda = setting == "cuda" or (setting == "auto" and torch.cuda.is_available())
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise RecipeError(f"LOCAL_RANK={local_rank}: this machine has {torch.cuda.device_count()} GPUs; start fewer")
    return torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")


@contextmanager
def start_world(device: str) -> Iterator[World]:
    """Join the process group that torchrun or srun describes in the environment, if any; leave it at the end.

    Raises:
        RecipeError: the environment makes no sense, or the device is not there.
        ConnectionError: the processes did not find each other.
    """
    place = read_place()
    size, rank = place.size, place.rank
    chosen = choose_device(device, place.local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    control: Any = None
    steps: Any = None
    if size > 1:
        _meet(chosen, place)
        control = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
        steps = dist.new_group(backend="gloo", timeout=STEP_WAIT)
    try:
        yield World(rank, size, chosen, control, steps)
        if size > 1:
            with _peers():
                dist.barrier(group=control)  # nobody takes the group down while another rank still uses it
    finally:
        if size > 1:
            dist.destroy_process_group()


def _meet(device: torch.device, place: Place) -> None:
    # Told its device, NCCL connects at once, and an error shows here; else it would guess from the rank.
    own = device if device.type == "cuda" else None
    backend = "nccl" if own else "gloo"
    try:
        dist.init_process_group(
            backend, init_method=place.meeting, rank=place.rank, world_size=place.size, device_id=own
        )
    except dist.DistError as error:
        reason = str(error).partition("\n")[0]
        raise ConnectionError(f"rank {place.rank} of {place.size} did not find the others: {reason}") from error
