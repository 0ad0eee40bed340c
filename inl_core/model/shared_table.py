"""One table for the embedding and the head, whose two gradients become one tensor without a third.

Autograd gives the lookup a dense gradient (V, R), nearly all zeros, and adds it to the head's into another: at
V = 50,304, D = 512 98 MB at the very peak of a training step. Here the lookup's gradient is sparse, one row for each
token, and is added to the head's where that lies. Legend: V vocabulary size, R width of the table.
"""

from typing import Any

import torch
from torch import Tensor

from inl_core.model.derivatives import OwnOperation, is_plain


def share(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """The table (V, R) for a sparse lookup and for the head's loss, or None where the plain way is as good.

    A GPU adds rows in no fixed order; without gradients there is nothing to add; a compiler traces the plain lookup.
    """
    differentiated = weight.requires_grad and torch.is_grad_enabled()
    if weight.device.type != "cpu" or not differentiated or torch.compiler.is_compiling() or is_plain():
        return None
    return SharedTable.apply(weight)


class SharedTable(OwnOperation):
    """W (V, R) -> W for `F.embedding(..., sparse=True)`, W for a loss whose gradient nobody else holds."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Two views of the table."""
        ctx.set_materialize_grads(False)
        return weight.view_as(weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, lookup: Tensor | None, head: Tensor | None) -> Tensor | None:
        """The sum of both gradients, dense, in the head's memory."""
        if head is None or lookup is None:
            return head if lookup is None else lookup.to_dense()
        return head.add_(lookup)
