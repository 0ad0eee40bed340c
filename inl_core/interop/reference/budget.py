"""Each layer's iterations, as the reference's budget allocator computes them from what lies in a released file.

For layer l of L, with T iterations on average, w the allocator's weights, s its convergence speeds, g its gradients'
magnitudes and e the layers' losses of speed, all in float32:

    b = L T softmax(w)_l                                                     what was learned
    b = b (1 / (s_l + 0.1)) / mean_k(1 / (s_k + 0.1))                        after 10 updates: slower layers get more
    b = 0.8 b position_l                                                     0.8, 1.2, 1.0 in the three thirds of L
    b = b clip(g_l / mean(g), 0.8, 1.3) clip(0.8 + 0.2 e_l / mean(e), 0.9, 1.2)           after 10 updates
    iterations = clip(floor(b), max(2, T // 2), 2 T)

- This is the allocator's strategy `hybrid`, which the reference's models are built with; no file says another.
- It runs the layers in evaluation; the early stopping that follows it in the reference is left out, as everywhere here.
"""

from collections.abc import Callable, Collection

import torch
from torch import Tensor

_WEIGHTS = "budget_weights"
_WARM_UP = 10
"""Updates of the statistics after which they count."""
_EQUILIBRIUM = 0.8
"""The factor of the phase that a loaded model is in."""
_LEAST = 1e-8
"""A mean below this is none."""


def find_allocator(names: Collection[str]) -> str | None:
    """What the names of the allocator's tensors begin with; None where the file has none."""
    found = [name for name in names if name.endswith(f"budget_allocator.{_WEIGHTS}")]
    return min(found, key=len).removesuffix(_WEIGHTS) if found else None


def layer_iterations(average: int, num_layers: int, read: Callable[[str], Tensor | None]) -> tuple[int, ...]:
    """The iterations of each layer.

    Args:
        average: T, the `num_iterations_per_layer` that the model was built with.
        read: an allocator's tensor by its own name, as float32; None where the file has not got it.
    """
    weights = read(_WEIGHTS)
    assert weights is not None
    learned = torch.softmax(weights, dim=0) * (num_layers * average)
    updates = read("update_count")
    has_statistics = updates is not None and float(updates.max()) > _WARM_UP
    speeds = read("layer_convergence_speed") if has_statistics else None
    magnitudes = read("layer_grad_magnitude") if has_statistics else None
    losses = read("layer_L_speed") if has_statistics else None
    if speeds is not None:
        slowness = [1.0 / (speed + 0.1) for speed in speeds.tolist()]
        learned = learned * torch.tensor([value / (sum(slowness) / num_layers) for value in slowness])
    found = []
    for layer, budget in enumerate(learned.tolist()):
        budget *= _EQUILIBRIUM
        budget *= _position_factor(layer, num_layers)
        if magnitudes is not None and (mean := float(magnitudes.mean())) > _LEAST:
            budget *= _clip(float(magnitudes[layer]) / mean, 0.8, 1.3)
        if losses is not None and (mean := float(losses.mean())) > _LEAST:
            budget *= _clip(1.0 + 0.2 * (float(losses[layer]) / mean - 1.0), 0.9, 1.2)
        found.append(int(_clip(int(budget), max(2, average // 2), 2 * average)))
    return tuple(found)


def _position_factor(layer: int, num_layers: int) -> float:
    third = num_layers // 3
    factor = 0.8 if layer < third else 1.2 if layer < 2 * third else 1.0
    return float(torch.tensor(factor))  # a float32, whose rounding can decide a whole iteration


def _clip(value: float, least: float, most: float) -> float:
    return max(least, min(most, value))
