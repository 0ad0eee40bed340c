"""The operations of our own (inl_core/kernels), forward and backward, against torch's in the same module.

    OMP_NUM_THREADS=2 .venv/bin/python benchmarks/operations.py            # --repeats --only

- `torch`: what `training.operations: plain` computes with. `C++ with MKL`, `C++ with oneDNN`: ours, by the product of
  the one library and of the other. `inl's chunks`: the loss. `torch in place`: the stream's step, against term by term.
- The ways take turns call by call in one process, so that a busy moment slows all of them; between two calls, 16 MB are
  written, so that no tensor waits in a core's own cache. Medians, and least times behind them, ms; and the megabytes
  that autograd keeps between the passes.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from inl_core.kernels.apply import TORCH, build_attention, build_dynamics
from inl_core.kernels.cpu.library import library
from inl_core.kernels.loss import ChunkedLoss, OwnLoss
from inl_core.kernels.stream import MotionInPlace
from inl_core.model.attention import first_of_document, rotary_tables
from inl_core.model.dynamics import Drive
from inl_core.model.stream import Coefficients, Motion, Shared
from inl_core.recipe import ModelConfig

Run = Callable[[], Tensor]


def attention(batch: int, length: int, heads: int, key_heads: int, size: int, *, documents: bool = False) -> Callable:
    """A call of the inner attention for each way; documents as `training.data.document_mask` has them."""

    def build(way: str) -> Run:
        values = {"d_model": heads * size, "num_heads": heads, "num_kv_heads": key_heads}
        config = ModelConfig.model_validate(values)
        inner = build_attention(config, way)
        packed = torch.randn(batch, length, (heads + 2 * key_heads) * size, requires_grad=True)
        cos, sin = (table[:, None] for table in rotary_tables(length, size, 10_000.0))
        ids = (torch.arange(length) // max(1, length // 3)).expand(batch, -1)
        first = first_of_document(ids)
        slots = torch.arange(length)
        mask = ((first[:, :, None] <= slots) & (slots <= slots[:, None]))[:, None] if way == TORCH else first
        return lambda: inner(packed, (cos, sin), mask if documents else None, None)

    return build


def integrator(tokens: int, dim: int, iterations: int) -> Callable:
    """A call of the dynamics for each way, as v4 has them."""

    def build(way: str) -> Run:
        config = ModelConfig.model_validate({"preset": "v4", "d_model": dim}).integrator
        assert config is not None
        dynamics, width = build_dynamics(config, way), config.controller.width
        x, v, candidate = (torch.randn(1, tokens, dim, requires_grad=True) for _ in range(3))
        hoisted = torch.randn(1, tokens, width, requires_grad=True)
        inner = (torch.randn(width, 2 * dim) * 0.05).requires_grad_()
        outer = (torch.randn(3 * dim, width) * 0.05).requires_grad_()
        drive = Drive(hoisted, inner, outer, torch.randn(3 * dim).requires_grad_(), candidate, torch.zeros(dim))
        forcing = torch.randn(iterations, dim).mul(0.03).requires_grad_()
        return lambda: dynamics(drive, x, v, forcing).state

    return build


def loss(tokens: int, dim: int, vocabulary: int) -> Callable:
    """A call of the loss over the vocabulary."""

    def build(way: str) -> Run:
        module = ChunkedLoss() if way == TORCH else OwnLoss()
        z, weight = torch.randn(tokens, dim, requires_grad=True), torch.randn(vocabulary, dim, requires_grad=True)
        targets = torch.randint(vocabulary, (tokens,))
        return lambda: module(z, weight, targets)

    return build


def stream(batch: int, length: int, dim: int) -> Callable:
    """A call of the stream's step with all terms, as v5 has them."""

    def build(way: str) -> Run:
        motion = Motion() if way == TORCH else MotionInPlace()
        x, v, candidate, start = (torch.randn(batch, length, dim, requires_grad=True) for _ in range(4))
        shared = Shared(start, torch.zeros(()), None, None, None)
        coefficients = Coefficients(*(torch.randn(dim).mul(0.1).requires_grad_() for _ in Coefficients._fields))

        def run() -> Tensor:
            # Both go on into the next step, so the gradient comes back by both.
            return torch.stack([part.sum() for part in motion(coefficients, x, v, candidate, shared, None)])

        return run

    return build


CASES: dict[str, Callable] = {
    "attention, tiny: 16 x 128, 4 heads of 32": attention(16, 128, 4, 4, 32),
    "attention, tiny, documents": attention(16, 128, 4, 4, 32, documents=True),
    "attention, d = 512: 4 x 256, 8 heads of 64, 2 for keys": attention(4, 256, 8, 2, 64),
    "attention, d = 512, documents": attention(4, 256, 8, 2, 64, documents=True),
    "attention, d = 768: 4 x 256, 12 heads of 64": attention(4, 256, 12, 12, 64),
    "attention, d = 512, long: 2 x 1,024, 8 heads of 64": attention(2, 1024, 8, 8, 64),
    "integrator, tiny: 2,048 x 128, T = 2": integrator(2048, 128, 2),
    "integrator, tiny, T = 5": integrator(2048, 128, 5),
    "integrator, d = 512: 1,024 x 512, T = 2": integrator(1024, 512, 2),
    "integrator, d = 512, T = 5": integrator(1024, 512, 5),
    "integrator, d = 768: 1,024 x 768, T = 2": integrator(1024, 768, 2),
    "stream, tiny: 16 x 128 x 128": stream(16, 128, 128),
    "stream, d = 512: 4 x 256 x 512": stream(4, 256, 512),
    "loss, tiny: 2,048 x 128, V = 2,048": loss(2048, 128, 2048),
    "loss, d = 512: 1,024 x 512, V = 16,384": loss(1024, 512, 16_384),
    "loss, d = 768: 1,024 x 768, V = 50,304": loss(1024, 768, 50_304),
}


OTHER_WAYS = {"loss": "inl's chunks", "stream": "torch in place"}
"""Of the operations that are not in C++: the first word of a row -> the way that stands against torch's."""


def measure(build: Callable[[str], Run], ways: list[str], repeats: int) -> dict[str, list[float]]:
    """way -> milliseconds of each forward and backward pass."""
    runs, flush = {way: build(way) for way in ways}, torch.empty(4 * 2**20)
    times: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats + 2):
        for way, run in runs.items():
            flush.fill_(float(turn))
            start = time.perf_counter()
            run().sum().backward()
            if turn > 1:
                times[way].append(1e3 * (time.perf_counter() - start))
    return times


def kept_megabytes(run: Run) -> float:
    """What autograd keeps between the passes, what the operation was given included."""
    kept: dict[int, int] = {}

    def save(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        held = run()
    assert held.requires_grad
    return sum(kept.values()) / 1e6


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", default="", help="a word that a row's name must hold")
    arguments = parser.parse_args()
    found = library()
    if found is None:
        raise SystemExit("there are no operations in C++ on this machine")
    in_cpp = [f"C++ with {product}" for product in found.products]
    print("| forward and backward | torch | " + " | ".join(in_cpp) + " | torch / best | MB kept: torch, ours |")
    print("|---|---|" + "---|" * len(in_cpp) + "---|---|")
    for name, build in CASES.items():
        if arguments.only not in name:
            continue
        torch.manual_seed(0)
        other = OTHER_WAYS.get(name.partition(",")[0])
        ways = [TORCH, other] if other else [TORCH, *in_cpp]
        times = measure(build, ways, arguments.repeats)
        medians = {way: statistics.median(values) for way, values in times.items()}
        cells = [f"{medians[way]:.2f} ({min(times[way]):.2f})" for way in ways]
        cells += [""] * (1 + len(in_cpp) - len(cells))
        best = min(medians[way] for way in ways[1:])
        kept = ", ".join(f"{kept_megabytes(build(way)):.1f}" for way in ways[:2])
        print(f"| {name} | {' | '.join(cells)} | {medians[TORCH] / best:.2f} | {kept} |", flush=True)


if __name__ == "__main__":
    main()
