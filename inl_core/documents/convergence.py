"""How far states have come towards an equilibrium: the documents' five metrics, vectorised."""

import torch
from torch import Tensor


@torch.no_grad()
def compute_convergence_metrics(
    x_trajectory: Tensor, target_value: float | Tensor, epsilon: float = 0.1
) -> dict[str, float]:
    """Five figures of a trajectory (docs/model.md, "Convergence metrics"); an element is one dimension of one state.

    Args:
        x_trajectory: (..., T+1, D), iterations next to last: (B, T+1, D), or a language model layer's (B, S, T+1, D).
        target_value: the equilibrium: a number, (D,) values, or anything that broadcasts to (..., D).
        epsilon: an element has converged when it is closer to its target than this.

    Returns:
        time_to_converge: mean over elements of the first iteration from which the element stays within epsilon to the
            end; 0 when it starts there, T when it does not end there.
        final_rmse: root mean square of the final states' distance to the target.
        final_mean, final_std: mean and standard deviation (not Bessel's) of the final states over all elements.
        fraction_converged: share of elements that end within epsilon.

    Raises:
        ValueError: shapes that do not fit, or an epsilon that is not positive.
    """
    if x_trajectory.dim() < 2 or not x_trajectory.numel():
        raise ValueError(f"x_trajectory {tuple(x_trajectory.shape)}: expected (..., T+1, D) with at least one state")
    if not epsilon > 0:
        raise ValueError(f"epsilon {epsilon}: must be above 0")
    x = x_trajectory.double()
    final = x[..., -1, :]  # (..., D)
    target = torch.as_tensor(target_value, dtype=x.dtype, device=x.device)
    try:
        target = target.expand_as(final)
    except RuntimeError:
        raise ValueError(f"target_value {tuple(target.shape)} does not broadcast to {tuple(final.shape)}") from None
    inside = (x - target.unsqueeze(-2)).abs() < epsilon  # (..., T+1, D)
    # Read backwards, the running product counts the iterations an element has been inside without a break.
    settled = inside.flip(-2).int().cumprod(-2).sum(-2)
    num_iterations = x.shape[-2] - 1
    return {
        "time_to_converge": (num_iterations + 1 - settled).clamp(max=num_iterations).double().mean().item(),
        "final_rmse": (final - target).square().mean().sqrt().item(),
        "final_mean": final.mean().item(),
        "final_std": final.std(correction=0).item(),
        "fraction_converged": inside[..., -1, :].double().mean().item(),
    }
