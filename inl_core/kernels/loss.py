"""The loss over the vocabulary without a tensor of all logits, and the one gradient of a table that is used twice.

- `ChunkedLoss` is torch's own chunked cross-entropy, for any device and precision.
- `OwnLoss` is for a CPU in one precision, and for GPUs. torch's computes the gradients inside the forward pass, and its
  backward pass makes zeros as large as the head's matrix for an output that nobody uses, while every activation is
  still held. This one does not, and goes over the logits four times where torch's goes eight (docs/performance.md).
  Under autocast torch's multiplies in float32; this one multiplies in bfloat16 and adds up in float32.
- `SharedLookup` gives the embedding's gradient to the loss's, row by row, where autograd would make a tensor (V, R) of
  nearly all zeros and add it into a third: 98 MB at V = 50,304, R = 512, at the very peak of a training step.
- Both of ours are autograd functions, not registered operations: the one hands out a view of what it is given, which a
  registered operation may not, and the other hands its gradients out as they lie. Neither is inside a compiled block.
- Legend: N tokens, n rows of a chunk, V vocabulary size, R width of the head's factors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inl_core.model.derivatives import needs_plain_operations
from inl_core.model.embedding import IGNORED, Lookup, VocabularyLoss

_CHUNK_BYTES = {"cpu": 32 * 2**20}
_OTHER_CHUNK_BYTES = 256 * 2**20
_FEWEST_ROWS = 256
"""Each chunk reads the whole head matrix three times: below this, reading it takes longer than the arithmetic
(docs/performance.md)."""


def logit_rows(vocab_size: int, device: torch.device) -> int:
    """Tokens whose float32 logits are held at once: 32 MiB on a CPU, 256 MiB elsewhere, and never fewer than 256."""
    room = _CHUNK_BYTES.get(device.type, _OTHER_CHUNK_BYTES)
    return max(_FEWEST_ROWS, room // (4 * vocab_size))


class ChunkedLoss(VocabularyLoss):
    """The model's loss by torch's chunked cross-entropy."""

    most_rows: int | None = None
    """Tokens whose logits may be held at once; None is what `logit_rows` says."""

    def forward(self, z: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Sum over targets other than -100 of the cross-entropy in nats: z (N, R), W (V, R), targets (N,)."""
        if needs_plain_operations():
            return super().forward(z, weight, targets)
        return self.in_chunks(z, weight, targets, self.most_rows or logit_rows(weight.shape[0], z.device))

    def in_chunks(self, z: Tensor, weight: Tensor, targets: Tensor, most: int) -> Tensor:
        """The same, at most so many rows of logits at a time."""
        if z.dtype.itemsize < 4 and not torch.is_autocast_enabled(z.device.type):  # a sum in low precision is no sum
            z, weight = z.float(), weight.float()
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=most)
        return F.linear_cross_entropy(z, weight, targets, reduction="sum", ignore_index=IGNORED, options=options)


class OwnLoss(ChunkedLoss):
    """The model's loss by `CrossEntropy`: on a GPU always, on a CPU where all is in one precision without autocast."""

    def in_chunks(self, z: Tensor, weight: Tensor, targets: Tensor, most: int) -> Tensor:
        """The same, at most so many rows of logits at a time."""
        device = z.device.type
        is_autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device)
        is_alike = z.dtype == weight.dtype and z.dtype.itemsize >= 4 and not is_autocast
        if not (device == "cuda" or (device == "cpu" and is_alike)):
            return super().in_chunks(z, weight, targets, most)
        factors = torch.get_autocast_dtype(device) if is_autocast else z.dtype
        with torch.autocast(device, enabled=False):  # each operation is given the precision it is meant to have
            return CrossEntropy.apply(z, weight, targets, most, torch.is_grad_enabled(), factors)  # type: ignore[return-value]


class CrossEntropy(torch.autograd.Function):
    """(z (N, R), W (V, R), targets (N,), n, whether to differentiate, F) -> the sum of the cross-entropies in nats.

    F is the precision of the factors of each matrix product. Logits and sums are in the precision of z and W, or in
    float32 where that is lower. The gradients are computed with the loss and handed out as they lie: only a graph that
    is retained hands out copies.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, weight: Tensor, targets: Tensor, most: int, differentiate: bool, factors: torch.dtype
    ) -> Tensor:
        """The loss; keeps the gradients, (N, R) and (V, R), where they are asked for."""
        wants_z, wants_weight = (differentiate and wanted for wanted in ctx.needs_input_grad[:2])
        sums = torch.promote_types(z.dtype, torch.float32)
        z, weight = z.to(factors).contiguous(), weight.to(factors).contiguous()
        ctx.grad_z = grad_z = torch.empty_like(z, dtype=sums) if wants_z else None
        ctx.grad_weight = grad_weight = torch.zeros_like(weight, dtype=sums) if wants_weight else None
        buffer, loss = z.new_empty(min(most, len(z)), len(weight), dtype=sums), z.new_zeros((), dtype=sums)
        for start in range(0, len(z), most):
            where = slice(start, start + most)
            logits = _multiply(z[where], weight.T, buffer[: len(z[where])])
            loss += _losses(logits, targets[where]).sum()
            slopes = logits.to(factors)
            if grad_z is not None:
                _multiply(slopes, weight, grad_z[where])
            if grad_weight is not None:
                _add_product(grad_weight, slopes.T, z[where])
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        """The kept gradients times the loss's."""
        _refuse_second_derivatives("the loss")
        if not hasattr(ctx, "grad_z"):
            raise RuntimeError("the loss hands its gradients out once, unless it was by backward(retain_graph=True)")
        kept = (ctx.grad_z, ctx.grad_weight)
        is_retained = torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
        if not is_retained:
            del ctx.grad_z, ctx.grad_weight
        multiply = torch.mul if is_retained else torch.Tensor.mul_
        of_z, of_weight = (None if gradient is None else multiply(gradient, grad) for gradient in kept)
        return of_z, of_weight, None, None, None, None


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """a b, summed and written in the precision of `out`, which may be higher than that of the factors."""
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type == "cuda":
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a b to `total`, whose precision may be higher than that of the factors."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(_multiply(a, b, torch.empty_like(total)))


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each of the targets (n,), 0 for an ignored one; logits (n, V) become its gradient.

    log sum exp is the largest logit less the logarithm of its probability, which is never below 1/V: a target's own
    probability may be zero in this precision, and its logarithm infinite.
    """
    counted = (targets != IGNORED).unsqueeze(1)
    target = targets.unsqueeze(1).masked_fill(~counted, 0)  # another negative one is out of bounds
    largest = logits.amax(-1, keepdim=True)
    of_target = logits.gather(1, target)
    torch.softmax(logits, -1, out=logits)
    losses = largest - logits.amax(-1, keepdim=True).log_() - of_target
    logits.scatter_add_(1, target, logits.new_full((1, 1), -1.0).expand(len(target), 1)).mul_(counted)
    return (losses * counted).squeeze(1)


class SharedLookup(Lookup):
    """The model's lookup by `TableLookup`, on a CPU: a GPU would add rows in no fixed order."""

    def forward(self, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """ids (B, S), table (V, R) -> its rows (B, S, R), and the table for the loss of the same pass."""
        is_differentiated = table.requires_grad and torch.is_grad_enabled()
        if table.device.type != "cpu" or not is_differentiated or needs_plain_operations():
            return super().forward(ids, table)
        return TableLookup.apply(ids, table)  # type: ignore[return-value]


class TableLookup(torch.autograd.Function):
    """(ids (B, S), W (V, R)) -> rows of W (B, S, R), and W for a loss whose gradient nobody else holds."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """The rows, and a view of the table."""
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(ids)
        ctx.shape = table.shape
        return F.embedding(ids, table), table.view_as(table)

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor | None, of_table: Tensor | None) -> tuple[None, Tensor | None]:
        """The sum of both gradients, in the memory of the loss's."""
        _refuse_second_derivatives("the embedding")
        if of_rows is None:
            return None, of_table
        (ids,) = ctx.saved_tensors
        total = of_rows.new_zeros(ctx.shape) if of_table is None else of_table
        return None, total.index_add_(0, ids.flatten(), of_rows.flatten(0, -2))


def _refuse_second_derivatives(what: str) -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"{what} has first derivatives by backward() alone: for second ones (create_graph=True) run the forward "
            "pass inside `with inl_core.model.plain_operations():`"
        )
