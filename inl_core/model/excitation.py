"""The deterministic harmonic excitation A sin(gamma t + phi), dense or sparse.

- Source: docs/model.md, "The excitation".
- A is state of the run: the cycle sets it, the checkpoint stores it, so it comes in as a tensor.
- The start draws no random numbers: the fractional parts of i * (powers of the plastic and golden ratios) spread
  gamma and phi evenly over their ranges for any D.
"""

import math

import torch
from torch import Tensor, nn

from inl_core.recipe import ExcitationConfig


def excited_dims(dim: int, sparsity: float) -> Tensor:
    """Indices of the max(1, floor(D * sparsity)) evenly spaced excited dimensions."""
    count = max(1, int(dim * sparsity))
    return torch.arange(count) * dim // count


class Excitation(nn.Module):
    """gamma and phi of one layer, each (number of excited dims,); gamma in radians per iteration, phi in radians."""

    excited: Tensor

    def __init__(self, config: ExcitationConfig, dim: int) -> None:
        super().__init__()
        self.dim, self.sparsity = dim, config.sparsity
        count = max(1, int(dim * config.sparsity))
        self.dense = count == dim
        self.gamma = nn.Parameter(torch.empty(count))
        self.phi = nn.Parameter(torch.empty(count))
        self.register_buffer("excited", torch.empty(count, dtype=torch.long), persistent=False)

    def start(self) -> tuple[Tensor, Tensor]:
        """gamma_i = 1 + 0.2 (frac(0.7548776662 i) - 0.5), phi_i = 2 pi frac(0.6180339887 i), in float64 on the CPU."""
        i = torch.arange(self.gamma.numel(), dtype=torch.float64, device="cpu")
        return 1 + 0.2 * ((i * 0.7548776662).frac() - 0.5), 2 * math.pi * (i * 0.6180339887).frac()

    @torch.no_grad()
    def initialise(self) -> None:
        """gamma and phi as at the start of every run."""
        gamma, phi = self.start()
        self.gamma.copy_(gamma)
        self.phi.copy_(phi)

    def reset_buffers(self) -> None:
        """Fill what is derived from the configuration and not saved."""
        self.excited.copy_(excited_dims(self.dim, self.sparsity))

    def forward(self, num_iterations: int, amplitude: Tensor) -> Tensor:
        """The forcing of every iteration, (T, D), zero on dimensions that are not excited.

        Sines are evaluated on the excited dimensions only; the step adds a row of this inside an operation it needs
        anyway, so the other dimensions cost nothing.
        """
        return self.at(torch.arange(num_iterations, device=self.gamma.device, dtype=self.gamma.dtype), amplitude)

    def at(self, t: Tensor, amplitude: Tensor) -> Tensor:
        """The forcing at the times t (T,), as (T, D)."""
        wave = amplitude * torch.sin(torch.outer(t, self.gamma) + self.phi)
        if self.dense:
            return wave
        return wave.new_zeros(len(t), self.dim).index_copy(1, self.excited, wave)
