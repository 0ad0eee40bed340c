"""The operations in C++ (inl_core/model/native), forward and backward, against what runs without them.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/operations.py            # --repeats --only

- `library`: the same module on a machine without a compiler, which is torch's own kernels and the hand-written passes
  around them. `MKL`, `oneDNN`: the operation in C++ with its products by one and by the other.
- The three alternate call by call in one process, so that a busy machine slows all alike; between two calls, 16 MB are
  written, so that no tensor waits in a core's own cache. Medians, and least times behind them, ms.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from inl_core.model.native import build
from inl_core.model.normed_linear import normed_linear
from inl_core.model.norms import RMSNorm
from inl_core.model.vocabulary import cross_entropy_sum
from torch import Tensor, nn

from inl_core.model.attention import Attention, first_of_document, plan_attention, rotary_tables
from inl_core.model.feed_forward import FeedForward
from inl_core.recipe import ModelConfig

WAYS = ("library", "MKL", "oneDNN")
Run = Callable[[], Tensor]


@contextmanager
def way(name: str) -> Iterator[None]:
    """One of WAYS inside."""
    with (
        patch.object(build, "_mkl", (lambda: None) if name == "library" else build._mkl),
        torch.backends.mkldnn.flags(enabled=name != "MKL"),
    ):
        build.library.cache_clear()
        if name != "library" and (found := build.library()) is not None:
            assert found.has_brgemm(torch.float32) == (name == "oneDNN"), "torch has no such product here"
        yield


def attention(batch: int, length: int, dim: int, heads: int, key_heads: int, *, documents: float = 0.0) -> Run:
    """Rotation and attention of what the projection wrote; a document begins at each token with these odds."""
    keys = {"d_model": dim, "num_heads": heads, "num_kv_heads": key_heads, "max_seq_len": length}
    config = ModelConfig.model_validate({"preset": "transformer", **keys})
    module, size = Attention(config), dim // heads
    packed = torch.randn(batch, length, (heads + 2 * key_heads) * size, requires_grad=True)
    ids = torch.zeros(batch, length, dtype=torch.int64)
    runs = (torch.rand(batch, length) < documents).cumsum(1) if documents else None
    positions = None if runs is None else torch.arange(length) - first_of_document(runs)
    cos, sin = rotary_tables(length, size, 10_000.0)

    def run() -> Tensor:
        plan = plan_attention(ids, torch.float32, positions=positions, document_ids=runs, cache=None)
        rotary = cos[plan.positions].unsqueeze(-2), sin[plan.positions].unsqueeze(-2)
        if plan.is_native:
            return module._attend_native(packed, plan, rotary)
        return module._attend(packed, plan, rotary, None, 0)

    return run


def feed_forward(tokens: int, dim: int, hidden: int) -> Run:
    """Norm and gated feed-forward."""
    config = ModelConfig.model_validate({"preset": "v4", "d_model": dim, "num_heads": 4, "feedforward_hidden": hidden})
    module, norm, x = FeedForward(config), RMSNorm(dim, eps=1e-6), torch.randn(tokens, dim, requires_grad=True)
    return lambda: module(x, norm)[0]


def projection(tokens: int, dim: int, outputs: int) -> Run:
    """Norm and linear layer."""
    linear, norm, x = nn.Linear(dim, outputs, bias=False), RMSNorm(dim, eps=1e-6), torch.randn(tokens, dim)
    x.requires_grad_()
    return lambda: normed_linear(norm, linear, x)


def head(tokens: int, dim: int, vocabulary: int) -> Run:
    """The loss over the vocabulary."""
    z, weight = torch.randn(tokens, dim, requires_grad=True), torch.randn(vocabulary, dim, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,))
    return lambda: cross_entropy_sum(z, weight, targets)


OPERATIONS = {
    "attention, 16 x 128, 4 heads of 32, documents": lambda: attention(16, 128, 128, 4, 2, documents=0.01),
    "attention, 16 x 128, 4 heads of 32": lambda: attention(16, 128, 128, 4, 2),
    "attention, 4 x 256, 8 heads of 64": lambda: attention(4, 256, 512, 8, 2),
    "attention, 2 x 1,024, 8 heads of 64": lambda: attention(2, 1024, 512, 8, 2),
    "feed-forward, 2,048 x 128, H = 320": lambda: feed_forward(2048, 128, 320),
    "feed-forward, 1,024 x 512, H = 1,344": lambda: feed_forward(1024, 512, 1344),
    "projection, 2,048 x 128 to 256": lambda: projection(2048, 128, 256),
    "projection, 1,024 x 512 to 768": lambda: projection(1024, 512, 768),
    "loss, 2,048 x 128, V = 2,048": lambda: head(2048, 128, 2048),
    "loss, 1,024 x 512, V = 16,384": lambda: head(1024, 512, 16384),
}


def measure(run: Run, repeats: int) -> dict[str, list[float]]:
    """Seconds of a forward and backward pass, by way."""
    cold, found = torch.zeros(4_000_000), {name: [] for name in WAYS}
    for turn in range(repeats + 3):
        for name in WAYS:
            with way(name):
                cold.add_(1)
                start = time.perf_counter()
                run().sum().backward()
                seconds = time.perf_counter() - start
            if turn >= 3:  # kernels are made in the first calls
                found[name].append(seconds)
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=25)
    parser.add_argument("--only", nargs="+", default=[""], help="operations whose names begin with one of these")
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(f"| forward and backward | {' | '.join(WAYS)} | library / oneDNN |\n|---|---|---|---|---|")
    for name, make in OPERATIONS.items():
        if not name.startswith(tuple(arguments.only)):
            continue
        torch.manual_seed(0)
        found = measure(make(), arguments.repeats)
        medians = {way: statistics.median(times) for way, times in found.items()}
        cells = [f"{1e3 * medians[way]:.2f} ({1e3 * min(times):.2f})" for way, times in found.items()]
        print(f"| {name} | {' | '.join(cells)} | {medians['library'] / medians['oneDNN']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
