"""The report a run leaves when its loss or gradient stops being finite."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from inl_core.corpus.loader import Batch
from inl_core.corpus.tokenizer import Tokenizer


def write_nonfinite_report(
    path: Path, model: nn.Module, step: int, terms: dict[str, Tensor], norm: Tensor, batch: Batch, tokenizer: Tokenizer
) -> None:
    """The step, the losses, every parameter whose value or gradient is not finite, and this rank's batch as text."""
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
        "gradient_norm": repr(norm.item()),
        "not_finite": parameters,
        "batch": [{"tokens": row.tolist(), "text": tokenizer.decode(row.tolist())} for row in batch.tokens],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1))
