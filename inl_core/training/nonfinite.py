"""The watch for a loss or a gradient that is NaN or infinite, and the report that such a step leaves.

- On a GPU the host would have to wait for the device at every step. There the device remembers instead: from the first
  bad step on, fused AdamW skips its updates (by `found_inf`, which torch's gradient scaler uses too), and the host
  looks at log points. The weights are then still those that the bad step met, as if the run had stopped at once.
"""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from inl_core.corpus.loader import Batch
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.files import write_whole
from inl_core.training.optimizers import Optimizers


class FiniteWatch:
    """Remembers the first step whose loss or gradient norm is not finite.

    deferred: the device skips every update from that step on, until the host asks by `first_bad`.
    """

    def __init__(self, optimizers: Optimizers, device: torch.device, *, deferred: bool) -> None:
        self.deferred = deferred
        # [step, loss, norm] of the first bad step; -1 as long as there is none.
        self._record = torch.tensor([-1.0, 0.0, 0.0], dtype=torch.float64, device=device)
        self._skip = torch.zeros((), device=device)
        if deferred:
            optimizers.skip_while(self._skip)

    def observe(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Look at one step before its update, without waiting for the device."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        found = torch.stack([torch.full_like(loss, step), loss, norm]).double()
        self._record.copy_(torch.where(bad & (self._record[0] < 0), found, self._record))
        self._skip.copy_((self._record[0] >= 0).float())

    def first_bad(self) -> tuple[int, float, float] | None:
        """(step, loss, gradient norm) of the first bad step, or None; this waits for the device."""
        step, loss, norm = self._record.tolist()
        return None if step < 0 else (int(step), loss, norm)


def write_nonfinite_report(
    path: Path, model: nn.Module, step: int, terms: dict[str, Tensor], norm: float, batch: Batch, tokenizer: Tokenizer
) -> None:
    """Write the step, its losses, every parameter whose value or gradient is not finite, and this rank's batch as text.

    Raises:
        OSError: it could not be written; no part of it is left.
    """
    parameters = {}
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        bad_gradient = 0 if gradient is None else int((~torch.isfinite(gradient)).sum())
        bad_values = int((~torch.isfinite(parameter)).sum())
        if bad_gradient or bad_values:
            parameters[name] = {"elements": parameter.numel(), "bad_values": bad_values, "bad_gradients": bad_gradient}
    report = {
        "step": step + 1,
        "losses": {name: repr(value.item()) for name, value in terms.items() if value.numel() == 1},
        "gradient_norm": repr(norm),
        "not_finite": parameters,
        "batch": [{"tokens": row.tolist(), "text": tokenizer.decode(row.tolist())} for row in batch.tokens],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(report, indent=1))
