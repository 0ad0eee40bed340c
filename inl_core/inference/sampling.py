"""Logits -> next tokens: repetition penalty (`penalise`), temperature, top-k, top-p, min-p (`candidates`), and `draw`.

- Each filter keeps the most probable tokens down to some place, so one sort serves all of them.
- A draw takes one uniform number a row and looks up where the cumulative distribution reaches it. Each row brings its
  own numbers, so its text does not depend on the other rows of the batch.
- Legend: B rows, V vocabulary, N candidates.
"""

import torch
from torch import Tensor

from inl_core.errors import NonFiniteError
from inl_core.inference.settings import GenerationSettings

_LARGEST = 1e20
"""Larger factors are cut to this one. In float32 they would become infinite, and their product with 0 NaN."""


class Sampler:
    """Chooses a token for each of B rows. For a repetition penalty it remembers which tokens each row holds.

    Args:
        banned: (n,) ids that are never chosen.
        prompts: (B, S) ids of the prompts, padded with a banned id.
    """

    def __init__(self, settings: GenerationSettings, *, banned: Tensor, prompts: Tensor, vocab_size: int) -> None:
        self.settings, self.banned = settings, banned
        self.is_finite: Tensor | None = None
        """Whether all logits were finite since the last `check`; on the device."""
        self.seen: Tensor | None = None
        if settings.repetition_penalty != 1.0:
            self.seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=prompts.device)
            self.seen.scatter_(1, prompts, True)

    def __call__(self, logits: Tensor, draws: Tensor) -> Tensor:
        """The next token of each row, (B,), from logits (B, V) and a uniform number in [0, 1) a row, (B,) float64.

        Tokens that were chosen since the last `check` are of use only if that raises nothing.
        """
        least, most = logits.aminmax()  # NaN if any logit is; isfinite().all() would take nine times as long
        is_finite = (most - least).isfinite()
        self.is_finite = is_finite if self.is_finite is None else self.is_finite & is_finite
        if self.seen is not None:
            logits = penalise(logits, self.seen, self.settings.repetition_penalty)
        logits = logits.index_fill(1, self.banned, -torch.inf)
        chosen = logits.argmax(-1) if self.settings.is_greedy else draw(*candidates(logits, self.settings), draws)
        if self.seen is not None:
            self.seen.scatter_(1, chosen[:, None], True)
        return chosen

    def check(self) -> None:
        """Wait for the device.

        Raises:
            NonFiniteError: a logit was NaN or infinite.
        """
        is_finite, self.is_finite = self.is_finite, None
        if is_finite is not None and not bool(is_finite):
            raise NonFiniteError(
                "the model's logits are not finite: its weights have diverged; use an earlier checkpoint"
            )

    def select(self, rows: Tensor) -> None:
        """Keep these rows only."""
        self.seen = None if self.seen is None else self.seen[rows]


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by the penalty and multiply negative ones, so that both become less likely.

    arXiv 1909.05858, section 4.1, divides whatever the sign, which would favour tokens with negative logits.
    """
    penalty = min(max(penalty, 1 / _LARGEST), _LARGEST)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def candidates(logits: Tensor, settings: GenerationSettings) -> tuple[Tensor, Tensor | None]:
    """Probabilities (B, N) after temperature and filters, and their tokens (B, N), or None for all tokens in order."""
    scaled = (logits - logits.max(-1, keepdim=True).values) / min(settings.temperature, _LARGEST)
    if settings.top_k is None and settings.top_p is None and not settings.min_p:
        return scaled.softmax(-1), None
    if settings.top_k is not None:
        values, ids = scaled.topk(min(settings.top_k, scaled.shape[-1]))
    else:
        values, ids = scaled.sort(descending=True, stable=True)
    probabilities = values.softmax(-1)
    keep = torch.ones_like(probabilities, dtype=torch.bool)
    if settings.top_p is not None:
        doubled = probabilities.double()
        keep = doubled.cumsum(-1) - doubled < settings.top_p  # the more probable tokens do not reach top_p yet
    if settings.min_p:
        keep &= probabilities >= settings.min_p * probabilities[:, :1]
    probabilities = probabilities.masked_fill(~keep, 0.0)
    return probabilities / probabilities.sum(-1, keepdim=True), ids


def draw(probabilities: Tensor, ids: Tensor | None, draws: Tensor) -> Tensor:
    """The token of each row at which the cumulative distribution exceeds the row's uniform number, (B,) float64."""
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    # `right` takes the first place strictly above, so a token without probability is never taken. Where probabilities
    # are NaN, which `check` finds later, there is no such place.
    index = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    index = index.clamp(max=probabilities.shape[1] - 1)
    return (index if ids is None else ids.gather(1, index)).squeeze(1)
