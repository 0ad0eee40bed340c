"""The terms of the speed and energy losses, one number a token, added up as the iterations go by.

Source: doc 002, speed and energy loss (inl_core/training/losses.py). Legend: B batch, S sequence, D d_model.
"""

from torch import Tensor

from inl_core.model.backends.rule import speed_weights


class LossTerms:
    """Running terms of the speed and energy losses, (B, S) each."""

    def __init__(self, num_iterations: int, power: float) -> None:
        self.weights, self.power = speed_weights(num_iterations), power
        self.speed: Tensor | None = None
        self.energy: Tensor | None = None

    def add(self, t: int, error: Tensor, v: Tensor) -> None:
        """Those of iteration t, from x - mu and v after it, both (B, S, D)."""
        speed = self.weights[t] * error.abs().mean(-1)
        size = v.square() if self.power == 2.0 else v.abs().pow(self.power)
        energy = size.mean(-1) / len(self.weights)
        self.speed = speed if self.speed is None else self.speed + speed
        self.energy = energy if self.energy is None else self.energy + energy
