"""One model in the processes of a run: all of it in one, a copy in each (DDP), or a part in each (FSDP2, HSDP).

    parallel = parallelize(LossModule(model, autocast), Layout("fsdp", 8), world, seed=0, bf16=True)

- Gradients are averaged over the processes; the losses are shares of a global sum, so whoever differentiates them
  multiplies by their number.
- Of a divided model each matrix (optimizers.py, `is_matrix`) is a DTensor, which torch gathers a block at a time. The
  table, a shared controller and an untied head belong to all blocks: they are gathered for the whole pass.
- Vectors and tables of scales are not divided. They are less than a thousandth of a large model, need not divide by the
  number of processes, and what reads or moves them from outside (records, the moving average of mu, budgets) finds them
  whole in every process. Their gradients are averaged by one sum after the backward pass.
- A model gets memory and starting weights after it is divided, so that no process ever has all of it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from inl_core.model import IntegratorLanguageModel
from inl_core.model.stream import StreamBlock
from inl_core.training.distributed import World
from inl_core.training.layout import Layout
from inl_core.training.loss_module import LossModule
from inl_core.training.optimizers import is_matrix

Result = TypeVar("Result")

# Reducers and meshes are kept until the process ends. Freeing one frees its process group, which waits for gloo's
# worker threads while it holds Python's lock. A worker thread that has yet to free its last tensor waits for that lock,
# and neither ever continues (torch 2.13: about one two-rank run in fifty on a busy machine).
_KEPT: list[Any] = []


class Parallel:
    """The model of one process, which has all of it. The subclasses are for several processes."""

    def __init__(self, losses: LossModule, world: World) -> None:
        self.losses, self.world = losses, world
        self.trained: nn.Module = losses
        """What a training pass calls in the place of `losses`."""

    @property
    def model(self) -> IntegratorLanguageModel:
        """The model itself. What it computes outside of a training pass, it computes inside `run`."""
        return self.losses.model

    def run(self, work: Callable[[IntegratorLanguageModel], Result]) -> Result:
        """What `work` makes of the model, without gradients. Every process must call it at the same time, and let the
        model do equally many forward passes.
        """
        with torch.no_grad():
            return work(self.model)

    @contextmanager
    def accumulating(self, *, is_last: bool) -> Iterator[None]:
        """The context of one micro-batch's passes; gradients are averaged over the processes in the last one's."""
        yield

    def gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, (); every process must ask for it."""
        kinds = self._kinds()
        norms = [get_total_norm([p.grad for p in kind if p.grad is not None]) for kind in kinds]
        return get_total_norm([whole_tensor(norm) for norm in norms]) if len(kinds) > 1 else norms[0]

    def clip_gradient(self, limit: float) -> Tensor:
        """Scale the gradient down to the norm `limit` where it is larger; the norm before comes back."""
        norm = self.gradient_norm()
        for kind in self._kinds():
            clip_grads_with_norm_(kind, limit, norm)
        return norm

    def _kinds(self) -> list[list[nn.Parameter]]:
        """The parameters that have a gradient, the divided ones apart: torch does not reckon with both at once."""
        found = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        kinds = ([p for p in found if isinstance(p, DTensor) == divided] for divided in (True, False))
        return [kind for kind in kinds if kind]


class Copies(Parallel):
    """A copy of the model in each process."""

    def __init__(self, losses: LossModule, world: World) -> None:
        super().__init__(losses, world)
        device_ids = [world.device.index] if world.device.type == "cuda" else None
        self.trained = DistributedDataParallel(
            losses, device_ids=device_ids, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
        _KEPT.append(self.trained.reducer)

    @contextmanager
    def accumulating(self, *, is_last: bool) -> Iterator[None]:
        """As `Parallel.accumulating`."""
        assert isinstance(self.trained, DistributedDataParallel)
        with nullcontext() if is_last else self.trained.no_sync():
            yield


class Shards(Parallel):
    """A part of each matrix in each process of a group, which together have one copy: what `divide` has made."""

    def run(self, work: Callable[[IntegratorLanguageModel], Result]) -> Result:
        """As `Parallel.run`."""
        assert isinstance(self.losses, FSDPModule)
        with torch.no_grad():
            try:
                return self.losses.on_model(work)
            except Exception:
                self.losses.reset_iter_state()
                raise
            finally:
                self.losses.reshard()

    @contextmanager
    def accumulating(self, *, is_last: bool) -> Iterator[None]:
        """As `Parallel.accumulating`."""
        assert isinstance(self.losses, FSDPModule)
        self.losses.set_requires_gradient_sync(is_last)
        yield
        if is_last:
            self._average_whole()

    def _average_whole(self) -> None:
        """Average the gradients of what is not divided, all in one sum."""
        found = [p.grad for p in self.model.parameters() if p.grad is not None and not isinstance(p, DTensor)]
        flat = torch.cat([gradient.flatten() for gradient in found])
        self.world.sum(flat).div_(self.world.size)
        for gradient, mean in zip(found, flat.split([gradient.numel() for gradient in found]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def parallelize(losses: LossModule, layout: Layout, world: World, *, seed: int = 0, bf16: bool = False) -> Parallel:
    """The model as the processes of `world` share it.

    Args:
        losses: with its weights, or on the meta device: then it gets memory, and the starting weights of `seed`.
        bf16: its passes run under bfloat16 autocast.
    """
    is_empty = losses.model.embedding.table.weight.is_meta
    if layout.is_sharded:
        divide(losses, layout, world, bf16=bf16)
    if is_empty:
        losses.to_empty(device=world.device)
        losses.model.initialise(seed, _take_part)
    else:
        losses.to(world.device)
    kind = Shards if layout.is_sharded else Parallel if world.size == 1 else Copies
    return kind(losses, world)


def divide(losses: LossModule, layout: Layout, world: World, *, bf16: bool) -> None:
    """Divide a model's matrices among groups of `layout.shard_size` processes, each block's by itself."""
    shape = (world.size // layout.shard_size, layout.shard_size)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))
    _KEPT.append(mesh.get_all_groups())
    own, model = mesh if layout.strategy == "hsdp" else mesh["shard"], losses.model
    whole = {parameter for name, parameter in model.named_parameters() if not is_matrix(name, parameter)}
    for block in model.blocks:
        fully_shard(block, mesh=own, mp_policy=_precision(model, bf16=bf16), ignored_params=whole)
        if isinstance(block, StreamBlock):
            register_fsdp_forward_method(block, "trace")
    # Not in low precision: the stream starts from rows of the table.
    fully_shard(losses, mesh=own, ignored_params=whole)
    register_fsdp_forward_method(losses, "on_model")


def _take_part(parameter: Tensor, whole: Tensor) -> None:
    """Write this process's part of a tensor that every process has drawn: none of it where rows are too few for all."""
    if isinstance(parameter, DTensor):
        whole = whole.to(parameter.device)
        whole = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
    own_part(parameter).copy_(whole)


def own_part(tensor: Tensor) -> Tensor:
    """What this process has of a tensor: its part of a divided one, all of any other."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; each must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _precision(model: IntegratorLanguageModel, *, bf16: bool) -> MixedPrecisionPolicy:
    """Under autocast a block's matrices are gathered as the bfloat16 that they would be converted to; sums of gradients
    are float32. A router's choices are too fine for that, so the blocks of a mixture are gathered as they are.
    """
    integrator = model.config.integrator
    has_router = integrator is not None and integrator.controller.experts > 1
    if not bf16 or has_router:
        return MixedPrecisionPolicy()
    # Activations keep the types that autocast gives them: the stream is float32.
    return MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
