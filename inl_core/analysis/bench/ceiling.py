"""The ceiling: what one large matrix product reaches on the same cores, and the FLOPs that are held against it.

- A product of n x n matrices is 2 n^3 FLOPs: in float32, or bfloat16 where the models run under it.
- Models' FLOPs are those of `inl plan` (analysis/planning/flops.py): the matrix products, and three times as many in
  training. Llama's are those of the Transformer of its dimensions.
"""

import time

import torch

from inl_core.analysis.bench.measuring import synchronize
from inl_core.analysis.bench.settings import BenchSettings, Candidate
from inl_core.analysis.planning.flops import flops_by_part, training_flops


class Gemm:
    """A product of two n x n matrices, run again and again."""

    def __init__(self, settings: BenchSettings) -> None:
        dtype = torch.bfloat16 if settings.bf16 else torch.float32
        self.device, self.size = torch.device(settings.device), settings.gemm_size
        generator = torch.Generator().manual_seed(settings.seed)
        shape = (self.size, self.size)
        left, right = (torch.randn(shape, generator=generator).to(self.device, dtype) for _ in range(2))
        self.left, self.right, self.out = left, right, torch.empty(shape, device=self.device, dtype=dtype)

    def run(self) -> None:
        """One product."""
        torch.mm(self.left, self.right, out=self.out)

    def rate(self, repetitions: int) -> float:
        """FLOPs a second, over `repetitions` products after one that is not counted."""
        self.run()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(repetitions):
            self.run()
        synchronize(self.device)
        return 2 * self.size**3 * repetitions / (time.perf_counter() - start)


def flops_per_token(candidate: Candidate, settings: BenchSettings) -> float | None:
    """FLOPs of one token that counts; None for decoding, which memory bounds and not arithmetic."""
    config, length = candidate.config, settings.sequence_length
    if settings.task == "train":
        return float(training_flops(config, length))
    if settings.task == "prefill":  # only the last position goes through the head
        parts = flops_by_part(config, length)
        return sum(parts.values()) - parts["head"] * (1 - 1 / length)
    return None
