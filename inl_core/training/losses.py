"""The auxiliary losses: mean, speed, energy and load balancing; all are means over the global batch's target tokens.

- A micro-batch contributes its share of each loss. So 8 sequences at once, 2 x 4 accumulated, and 4 on each of 2 ranks
  give the same gradient.
- Speed and energy are sums over tokens, whose shares add up. The mean loss is not such a sum: it needs the mean and the
  variance of the final states over the whole batch. `mean_loss_share` takes these from a pass without gradients when
  the batch is split, and gives each part exactly its share of the gradient. Load balancing needs such a pass too,
  because the experts' loads are counted over the whole batch.
- The equations are those of docs/model.md, "Losses", averaged over layers and dimensions.
- Legend: B batch, S sequence, D d_model, L layers, E experts, k experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from inl_core.model import IntegratorOutput


@dataclass(frozen=True)
class AuxiliaryWeights:
    """Weights of the auxiliary losses at one step."""

    mean: float = 0.0
    speed: float = 0.0
    energy: float = 0.0
    balance: float = 0.0
    energy_power: float = 2.0
    variance_weighted: bool = True
    adapts_mu: bool = False
    """The moments of the states are needed for the moving average of mu, even if no loss needs them."""

    @property
    def needs_whole_batch(self) -> bool:
        """Whether a part's gradient depends on sums over the whole batch."""
        return self.mean > 0 or self.balance > 0

    @property
    def needs_terms(self) -> bool:
        """Whether the integrator must return its per-token terms."""
        return self.speed > 0 or self.energy > 0


def state_moments(layers: list[IntegratorOutput], mask: Tensor) -> Tensor:
    """Sums over target tokens of the final states and their squares, (2, L, D); mask (B, S) is 1 on target tokens."""
    weight = mask[..., None].to(torch.float32)
    states = [layer.state.float() for layer in layers]
    first = torch.stack([(state * weight).sum((0, 1)) for state in states])
    second = torch.stack([(state.square() * weight).sum((0, 1)) for state in states])
    return torch.stack((first, second))


def mean_loss_share(
    local: Tensor, total: Tensor, local_count: Tensor, count: Tensor, mu: Tensor, variance_weighted: bool
) -> Tensor:
    """This part's share of the mean over layers l and dimensions i of w_i (xbar_i - mu_i)^2, w_i = 1 / (1 + Var_i).

    Its value is the loss times local_count / count, so that the shares add up to the loss. Its gradient is exactly this
    part's term of the gradient of the whole loss, with respect to its states and to mu.

    Args:
        local: moments (2, L, D) of this part, with gradient.
        total: moments (2, L, D) of the whole batch, without gradient.
        mu: (L, D).
    """
    moments = (total + local - local.detach()) / count
    part = local_count / count
    # mu belongs to every part: each takes its share of mu's gradient.
    mu = mu.detach() + (mu - mu.detach()) * part
    mean, square = moments[0], moments[1]
    weight = 1 / (1 + (square - mean.square()).clamp(min=0)) if variance_weighted else 1.0
    loss = (weight * (mean - mu).square()).mean()
    return loss - loss.detach() * (1 - part)


def token_term(layers: list[IntegratorOutput], name: str, mask: Tensor, count: Tensor) -> Tensor:
    """This part's share of a per-token term (`speed` or `energy`), averaged over layers and target tokens."""
    terms = torch.stack([getattr(layer, name).float() for layer in layers]).mean(0)  # (B, S)
    return (terms * mask).sum() / count


def expert_loads(layers: list[IntegratorOutput], mask: Tensor) -> Tensor:
    """For how many target tokens each expert was one of the k that were chosen, (L, E), without gradient."""
    return torch.stack([(layer.routing.chosen * mask[..., None]).sum((0, 1)) for layer in layers if layer.routing])


def balance_share(layers: list[IntegratorOutput], loads: Tensor, mask: Tensor, count: Tensor) -> Tensor:
    """This part's share of mean_l E sum_e f_e P_e (Switch Transformer, arXiv 2101.03961), 1 when perfectly balanced.

    f_e: share of all choices that fell on expert e, from `loads` (L, E) of the whole batch; P_e: mean probability of e.
    """
    probabilities = torch.stack(
        [(layer.routing.probabilities * mask[..., None]).sum((0, 1)) / count for layer in layers if layer.routing]
    )
    shares = loads / loads.sum(-1, keepdim=True)
    return loads.shape[-1] * (shares * probabilities).sum(-1).mean()
