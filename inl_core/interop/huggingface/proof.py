"""Whether an exported model computes what the checkpoint does: in one pass, token by token, and with padding.

Legend: B rows, S tokens, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from inl_core.errors import InlError
from inl_core.model import IntegratorLanguageModel, Options

_ROWS, _MOST_TOKENS = 2, 64
TOLERANCE = 1e-4
"""Of the largest logit. Float32 rounds the sums of a large model by this much when they are added in another order."""


@dataclass(frozen=True)
class Differences:
    """The largest difference of two logits, in each way of computing them."""

    full: float
    """All tokens in one pass."""
    cached: float
    """One token after another, with the cache."""
    padded: float
    """Rows of different length in one batch, padded on the left."""
    largest_logit: float
    """The largest logit itself, as the scale of these."""
    tokens: int

    @property
    def relative(self) -> float:
        """The largest of all ways, over the largest logit."""
        return max(self.full, self.cached, self.padded) / max(self.largest_logit, 1e-30)

    def check(self, name: str, tolerance: float = TOLERANCE) -> None:
        """Raise an InlError where one of them is too large, or is not a number."""
        for way in ("full", "cached", "padded"):
            found, limit = getattr(self, way), tolerance * max(1.0, self.largest_logit)
            if not found <= limit:
                raise InlError(
                    f"{name}: its logits differ from the checkpoint's by {found:.3g} ({way}), more than {limit:.3g}; "
                    "nothing was kept. This is a bug: please report it with the checkpoint's config.json"
                )


@torch.inference_mode()
def compare_logits(own: IntegratorLanguageModel, exported: Any) -> Differences:
    """Compare the two models on random tokens; both on one device, in evaluation mode.

    Tokens do not stop early here: where a state's change is within rounding of the threshold, another order of the
    sums decides it, and the same model can differ from itself.
    """
    device, options = own.embedding.table.weight.device, Options(early_stopping=False)
    if hasattr(exported, "options"):
        exported.options = options
    length = min(_MOST_TOKENS, own.config.max_seq_len)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(own.vocab_size, (_ROWS, length), generator=generator).to(device)
    short = max(1, length * 2 // 3)

    def logits(rows: Tensor) -> Tensor:
        return own.logits(own(rows, options=options).hidden)

    def difference(found: Tensor, wanted: Tensor) -> float:
        return float((found.float() - wanted).abs().max())

    wanted, wanted_short = logits(ids), logits(ids[1:, :short])
    cache, steps = None, []
    for token in ids.split(1, dim=1):
        output = exported(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    padded, mask = ids.clone(), torch.ones_like(ids)
    padded[1] = padded[1].roll(length - short)
    mask[1, : length - short] = 0
    both = exported(input_ids=padded, attention_mask=mask).logits
    return Differences(
        full=difference(exported(input_ids=ids).logits, wanted),
        cached=difference(torch.cat(steps, dim=1), wanted),
        padded=max(difference(both[:1], wanted[:1]), difference(both[1:, length - short :], wanted_short)),
        largest_logit=float(wanted.abs().max()),
        tokens=length,
    )
