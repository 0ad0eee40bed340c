"""The cross-entropy over the vocabulary, a few rows at a time: no (B, S, V) tensor exists, in training or evaluation.

- Legend: N tokens, V vocabulary size, R width of the head's factors.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CHUNK_BYTES = {"cpu": 8 * 2**20}
_OTHER_CHUNK_BYTES = 256 * 2**20
_FEWEST_ROWS = 256
"""Each chunk reads the whole head matrix three times: below this, reading it takes longer than the arithmetic
(docs/performance.md, "The head")."""


def logit_rows(vocab_size: int, device: torch.device) -> int:
    """Tokens whose float32 logits are held at once: 8 MiB on a CPU, 256 MiB elsewhere, and never fewer than 256."""
    room = _CHUNK_BYTES.get(device.type, _OTHER_CHUNK_BYTES)
    return max(_FEWEST_ROWS, room // (4 * vocab_size))


def cross_entropy_sum(z: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over targets other than -100 of the cross-entropy in nats of logits z W^T.

    The library computes the gradients inside the forward pass, chunk by chunk. Its own choice of chunk is smaller than
    a CPU wants: 16 rows where 256 take a third of the time.

    Args:
        z: (N, R).  weight: W (V, R).  targets: (N,).
    """
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=logit_rows(weight.shape[0], z.device))
    return F.linear_cross_entropy(z, weight, targets, reduction="sum", ignore_index=-100, options=options)
