"""Whether tensors hold NaN or infinity: what a checkpoint must not, neither when it is written nor when it is read."""

from collections.abc import Mapping

import torch
from torch import Tensor


def first_nonfinite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds NaN or infinity, or None.

    One number is brought to the host when all is well: a sum over everything, which no NaN and no infinity passes.
    """
    floating = {name: tensor.detach() for name, tensor in tensors.items() if tensor.is_floating_point()}
    if not floating:
        return None
    device = next(iter(floating.values())).device
    sums = [tensor.sum(dtype=torch.float32).to(device, non_blocking=True) for tensor in floating.values()]
    if torch.isfinite(torch.stack(sums).sum()):
        return None
    # Large values may also add up to infinity, so every tensor is now looked at by itself.
    return next((name for name, tensor in floating.items() if not torch.isfinite(tensor).all()), None)
