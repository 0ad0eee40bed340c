"""A decoding step recorded as a CUDA graph: one call launches all kernels, where Python would take longer than they do.

A step reads its tokens from one tensor and its keys and values from one cache, nothing changes shape from token to
token, and nothing asks the GPU for a number. So what was recorded once can be replayed for every token after it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class RecordedStep:
    """Steps on one cache. The first runs as it is, which compiles what is to be compiled and sets libraries up."""

    def __init__(self, step: Callable[[Tensor, Any], tuple[Tensor, ...]], cache: Any) -> None:
        self.step, self.cache = step, cache
        self.tokens: Tensor | None = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.found: tuple[Tensor, ...] = ()

    def __call__(self, tokens: Tensor) -> tuple[Tensor, ...]:
        """What the step gives for these tokens (B,), in tensors that the next step does not write to."""
        if self.tokens is None:
            self.tokens = tokens.clone()
            return self.step(self.tokens, self.cache)
        self.tokens.copy_(tokens)
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # records and computes nothing
                self.found = self.step(self.tokens, self.cache)
        self.graph.replay()
        return tuple(tensor.clone() for tensor in self.found)
