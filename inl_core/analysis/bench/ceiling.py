"""The ceiling: what one large matrix product reaches on the same cores, and the FLOPs that are held against it.

- A product of n x n matrices is 2 n^3 FLOPs: in float32, or bfloat16 where the models run under it.
- Models' FLOPs are those of `inl plan` (model/flops.py): the matrix products, and three times as many in
  training. Llama's are those of the Transformer of its dimensions.
"""

import torch
from torch import nn

from inl_core.analysis.bench.settings import BenchSettings, Candidate
from inl_core.analysis.bench.work import Work
from inl_core.model.flops import flops_by_part, training_flops


def build_ceiling(candidate: None, settings: BenchSettings, *, compiled: bool) -> Work:
    """One product of two n x n matrices as the work of a candidate; it needs no candidate and is never compiled."""
    generator = torch.Generator().manual_seed(settings.seed)
    dtype, shape = torch.bfloat16 if settings.bf16 else torch.float32, (settings.gemm_size, settings.gemm_size)
    left, right = (torch.randn(shape, generator=generator).to(settings.device, dtype) for _ in range(2))
    out = torch.empty_like(left)

    def run() -> None:
        torch.mm(left, right, out=out)

    return Work(run, nn.Module(), [])


def ceiling_flops(settings: BenchSettings) -> int:
    """FLOPs of one such product."""
    return 2 * settings.gemm_size**3


def flops_per_token(candidate: Candidate, settings: BenchSettings) -> float | None:
    """FLOPs of one token that counts; None for decoding, which is bounded by reading memory, not by arithmetic."""
    config, length = candidate.config, settings.sequence_length
    if settings.task == "train":
        return float(training_flops(config, length))
    if settings.task == "prefill":  # only the last position goes through the head
        parts = flops_by_part(config, length)
        return sum(parts.values()) - parts["head"] * (1 - 1 / length)
    return None
