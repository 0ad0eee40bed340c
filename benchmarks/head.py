"""The loss over the vocabulary, forward and backward, by rows a chunk; turns in one process, medians.

.venv/bin/python benchmarks/head.py
.venv/bin/python benchmarks/head.py --rows 2048 --width 512 --vocab-size 50304 --threads 2
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from inl_core.model.vocabulary import cross_entropy_sum, logit_rows
from torch import Tensor, nn

CHUNKS = (16, 32, 64, 128, 256, 512, 1024)


def main() -> None:
    """Print a line for each chunk of torch's loss, its own choice, the plain loss, and the loss `inl` trains with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024, help="tokens of a batch")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=16_384)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    hidden = torch.randn(arguments.rows, arguments.width, requires_grad=True)
    weight = (torch.randn(arguments.vocab_size, arguments.width) * 0.05).requires_grad_()
    targets = torch.randint(arguments.vocab_size, (arguments.rows,))

    def turn(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> float:
        start = time.perf_counter()
        loss(hidden, weight, targets).backward()
        hidden.grad = weight.grad = None
        return time.perf_counter() - start

    arms: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "torch, no chunks": _torch(None),
        "torch, its own choice": _torch(nn.LinearCrossEntropyOptions()),
    }
    for rows in CHUNKS:
        if rows <= arguments.rows:
            arms[f"torch, {rows} rows"] = _torch(nn.LinearCrossEntropyOptions(batch_chunk_size=rows))
    arms[f"inl, {logit_rows(arguments.vocab_size, torch.device('cpu'))} rows"] = cross_entropy_sum
    seconds = {name: [turn(loss)] for name, loss in arms.items()}  # the first turn warms up
    for _ in range(arguments.turns):
        for name, loss in arms.items():
            seconds[name].append(turn(loss))
    for name, found in seconds.items():
        print(f"{name:24} {1e3 * statistics.median(found[1:]):8.1f} ms")


def _torch(options: nn.LinearCrossEntropyOptions | None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    return partial(F.linear_cross_entropy, reduction="sum", options=options)


if __name__ == "__main__":
    main()
