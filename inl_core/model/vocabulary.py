"""The cross-entropy over the vocabulary, a few rows at a time: no (B, S, V) tensor exists, in training or evaluation.

- The library's chunked loss computes the gradients inside the forward pass. Its backward pass then makes zeros as large
  as the head's matrix for an output that nobody uses, while every activation is still held. `ChunkedCrossEntropy` does
  not, and goes over the logits four times where the library goes eight (docs/performance.md, "The head"). It is for one
  precision on a CPU; mixed precisions and GPUs are the library's.
- Legend: N tokens, n rows of a chunk, V vocabulary size, R width of the head's factors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inl_core.model.by_rows import matrix_dtype
from inl_core.model.derivatives import OwnOperation, is_plain
from inl_core.model.native import head, rows

IGNORED = -100
"""The target of a token that does not count."""

_CHUNK_BYTES = {"cpu": 32 * 2**20}
_OTHER_CHUNK_BYTES = 256 * 2**20
_FEWEST_ROWS = 256
"""Each chunk reads the whole head matrix three times: below this, reading it takes longer than the arithmetic
(docs/performance.md, "The head")."""


def logit_rows(vocab_size: int, device: torch.device) -> int:
    """Tokens whose float32 logits are held at once: 32 MiB on a CPU, 256 MiB elsewhere, and never fewer than 256."""
    room = _CHUNK_BYTES.get(device.type, _OTHER_CHUNK_BYTES)
    return max(_FEWEST_ROWS, room // (4 * vocab_size))


def cross_entropy_sum(z: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over targets other than -100 of the cross-entropy in nats of logits z W^T.

    Args:
        z: (N, R).  weight: W (V, R).  targets: (N,).

    Raises:
        ValueError: there is not one target of int64 for each row of z.
    """
    if targets.shape != z.shape[:1] or targets.dtype != torch.int64:
        found, wanted = f"{targets.dtype} {tuple(targets.shape)}", f"torch.int64 {tuple(z.shape[:1])}"
        raise ValueError(f"targets are {found}, and must be {wanted}: one for each row")
    if is_plain():
        logits = F.linear(z, weight)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return F.cross_entropy(logits, targets, reduction="sum", ignore_index=IGNORED)
    most = logit_rows(weight.shape[0], z.device)
    if z.device.type == "cpu" and z.dtype == weight.dtype == matrix_dtype(z) and z.dtype.itemsize >= 4:
        return ChunkedCrossEntropy.apply(z, weight, targets, most, torch.is_grad_enabled())
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=most)
    return F.linear_cross_entropy(z, weight, targets, reduction="sum", ignore_index=IGNORED, options=options)


class ChunkedCrossEntropy(OwnOperation):
    """(z (N, R), W (V, R), targets (N,), n, whether to differentiate) -> the sum of the cross-entropies in nats.

    The gradients are computed with the loss and handed out as they lie: only a graph that is retained hands out copies.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, weight: Tensor, targets: Tensor, most: int, differentiate: bool) -> Tensor:
        """The loss; keeps the gradients, (N, R) and (V, R), where they are asked for."""
        wants_z, wants_weight = (differentiate and wanted for wanted in ctx.needs_input_grad[:2])
        z, weight = z.contiguous(), weight.contiguous()
        grad_z = torch.empty_like(z) if wants_z else None
        grad_weight = torch.zeros_like(weight) if wants_weight else None
        ctx.grad_z, ctx.grad_weight = grad_z, grad_weight
        if head.supports(z, weight):
            return head.losses(z, weight, targets, grad_z, grad_weight).sum()
        buffer = z.new_empty(min(most, len(z)), len(weight))
        loss = z.new_zeros(())
        targets, is_native = targets.contiguous(), rows.supports(z, weight)
        for start in range(0, len(z), most):
            where = slice(start, start + most)
            target = targets[where]
            logits = torch.mm(z[where], weight.T, out=buffer[: len(target)])
            loss += (rows.entropy(logits, target) if is_native else _entropy(logits, target)).sum()
            if grad_z is not None:
                torch.mm(logits, weight, out=grad_z[where])
            if grad_weight is not None:
                grad_weight.addmm_(logits.T, z[where])
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """The kept gradients times the loss's."""
        if not hasattr(ctx, "grad_z"):
            raise RuntimeError("the loss hands its gradients out once, unless it was by backward(retain_graph=True)")
        kept = (ctx.grad_z, ctx.grad_weight)
        is_retained = torch._C._autograd._get_current_graph_task_keep_graph()  # type: ignore[attr-defined]
        if not is_retained:
            del ctx.grad_z, ctx.grad_weight
        multiply = torch.mul if is_retained else torch.Tensor.mul_
        of_z, of_weight = (None if gradient is None else multiply(gradient, grad) for gradient in kept)
        return of_z, of_weight, None, None, None


def _entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """`rows.entropy` without C++: the cross-entropy of targets (n,); logits (n, V) become its gradient.

    log sum exp is the largest logit less the logarithm of its probability, which is never below 1/V: a target's own
    probability may be zero in this precision, and its logarithm infinite.
    """
    counted, target = (targets >= 0).unsqueeze(1), targets.clamp(min=0).unsqueeze(1)
    largest = logits.amax(-1, keepdim=True)
    of_target = logits.gather(1, target)
    torch.softmax(logits, -1, out=logits)
    losses = largest - logits.amax(-1, keepdim=True).log_() - of_target
    logits.scatter_add_(1, target, logits.new_full((1, 1), -1.0).expand(len(target), 1)).mul_(counted)
    return (losses * counted).squeeze(1)
