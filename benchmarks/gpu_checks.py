"""What benchmarks/gpu.py asks of single parts: is it right in bfloat16, is it fast, and does the host wait for it?"""

import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gpu_scale import Figures, Rows, Scale
from torch import Tensor

from inl_core.analysis.bench.inl_work import bench_tokenizer, build_model
from inl_core.analysis.bench.measuring import PeakMemory, synchronize
from inl_core.analysis.bench.settings import Candidate
from inl_core.analysis.bench.work import autocast
from inl_core.corpus.loader import Batch
from inl_core.kernels import loss as losses
from inl_core.kernels.apply import FLEX, TORCH, Choice, put
from inl_core.model import IntegratorLanguageModel
from inl_core.training.cycles import regime
from inl_core.training.distributed import ALONE, World
from inl_core.training.execution import prepare_model
from inl_core.training.gradients import Gradients
from inl_core.training.interruption import StopSignal
from inl_core.training.loss_module import LossModule, micro_batches
from inl_core.training.observer import Observer
from inl_core.training.optimizers import build_optimizers
from inl_core.training.parallel import Parallel
from inl_core.training.run import RunFiles
from inl_core.training.step import Stepper


def random_parts(scale: Scale, candidate: Candidate, rows: int, *, documents: int = 0) -> tuple[list[Any], int]:
    """One batch of random tokens on the device, and its targets; with about `documents` in each row."""
    draw = np.random.default_rng(0)
    ids = draw.integers(0, candidate.config.vocab_size or 0, (rows, scale.length + 1))
    numbers = places = None
    if documents:
        starts = draw.random((rows, scale.length)) < documents / scale.length
        starts[:, 0] = False
        numbers = np.cumsum(starts, 1, dtype=np.int32)
        first = np.maximum.accumulate(np.where(starts, np.arange(scale.length), 0), 1)
        places = np.arange(scale.length) - first
    batch = Batch(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]), numbers, places)
    return micro_batches(batch, rows, scale.device), batch.num_targets


def differentiator(scale: Scale, candidate: Candidate, model: IntegratorLanguageModel, *, bf16: bool, **batch: Any):
    """A function that leaves the gradients of one fixed batch in the parameters and gives its losses."""
    recipe, rows = candidate.recipe.training, 2 if scale.quick else 8
    context = autocast(replace(scale.settings("train"), bf16=bf16))
    gradients = Gradients(Parallel(LossModule(model, context), World(0, 1, scale.device)), recipe)
    parts, count = random_parts(scale, candidate, rows, **batch)
    now = regime(recipe.losses, recipe.cycle, 0, recipe.num_steps)

    def differentiate() -> dict[str, Tensor]:
        model.zero_grad()
        return gradients.backward(parts, now, 0, count)

    return differentiate


def precision(scale: Scale) -> Rows:
    """The loss and the gradient of one batch in float32, in bfloat16, and compiled in bfloat16."""
    exact: dict[str, dict[str, Tensor]] = {}

    def measure(preset: str, bf16: bool, compiled: bool) -> Figures:
        candidate, key = scale.candidate(preset), preset
        model = build_model(candidate, scale.settings("train"))
        with torch.no_grad():  # away from the start, at which half of the matrices write almost nothing
            generator = torch.Generator(scale.device).manual_seed(0)
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator, device=scale.device)
        training = candidate.recipe.training.model_copy(update={"compile": compiled})
        prepare_model(model, training, ALONE, bf16=bf16)
        loss = differentiator(scale, candidate, model, bf16=bf16)()["task"].item()
        found = {name: parameter.grad.float() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
        before = exact.setdefault(key, found)
        errors = {name: ((found[name] - before[name]).norm() / before[name].norm()).item() for name in found}
        worst = max(errors, key=lambda name: errors[name])
        norm = torch.stack([gradient.norm() for gradient in found.values()]).norm().item()
        return {"loss": loss, "gradient norm": norm, "worst error": errors[worst], "of": worst}

    for preset in ("v5", "v4"):
        yield f"{preset}, float32", partial(measure, preset, False, False)
        yield f"{preset}, bfloat16", partial(measure, preset, True, False)
        if not scale.quick:
            yield f"{preset}, bfloat16, compiled", partial(measure, preset, True, True)


def loss(scale: Scale) -> Rows:
    """Forward and backward of the loss over the vocabulary alone, in each way and size of chunk."""
    tokens, width, vocab = (64, 16, 320) if scale.quick else (16 * 1024, 1024, 50304)
    generator = torch.Generator(scale.device).manual_seed(0)
    z, weight = (
        torch.randn(size, width, generator=generator, device=scale.device).mul_(width**-0.25).requires_grad_()
        for size in (tokens, vocab)
    )
    targets = torch.randint(vocab, (tokens,), generator=generator, device=scale.device)
    exact: list[Tensor] = []

    def in_float32() -> Tensor:
        return losses.CrossEntropy.apply(z, weight, targets, 2048, True, torch.float32)

    def in_bfloat16(rows: int) -> Tensor:
        return losses.CrossEntropy.apply(z, weight, targets, rows, True, torch.bfloat16)

    def in_one_piece() -> Tensor:
        return F.cross_entropy(F.linear(z.bfloat16(), weight.bfloat16()).float(), targets, reduction="sum")

    def of_torch() -> Tensor:
        with torch.autocast(scale.device.type, torch.bfloat16):
            return losses.ChunkedLoss()(z, weight, targets)

    def measure(function: Callable[[], Tensor]) -> Figures:
        def both() -> Tensor:
            z.grad = weight.grad = None
            value = function()
            value.backward()
            return value.detach()

        memory = PeakMemory(scale.device)
        value, base = both(), 0 if scale.quick else torch.cuda.memory_allocated()
        found = [value, z.grad.float(), weight.grad.float()]  # type: ignore[union-attr]
        exact[:] = exact or found
        errors = [((one - other).norm() / other.norm()).item() for one, other in zip(found, exact, strict=True)]
        names = ("error of the loss", "of z's gradient", "of W's gradient")
        peak = (memory.read() - base) / 1e9
        return {"ms": 1000 * scale.seconds(both), "peak GB": peak} | dict(zip(names, errors, strict=True))

    yield "ours, float32", lambda: measure(in_float32)
    for rows in (16,) if scale.quick else (1334, 2048, 4096, 8192):
        yield f"ours, bfloat16, {rows} rows", partial(measure, partial(in_bfloat16, rows))
    if not scale.quick:
        yield "ours, added by the product", lambda: measure(partial(with_addition, partial(in_bfloat16, 4096)))
    yield "all logits at once, bfloat16", lambda: measure(in_one_piece)
    if hasattr(F, "linear_cross_entropy"):
        yield "torch's chunks under autocast", lambda: measure(of_torch)


def with_addition(run: Callable[[], Tensor]) -> Tensor:
    """The loss with sum and product of the weight's gradient in one call, to see whether that is worth having."""
    before = losses._add_product
    losses._add_product = lambda total, a, b: torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    try:
        return run()
    finally:
        losses._add_product = before


def documents(scale: Scale) -> Rows:
    """A forward and backward pass with about 8 documents in each row, by a dense mask and by blocks."""
    candidate = scale.candidate("v5")

    def measure(way: str, count: int, compiled: bool) -> Figures:
        model = build_model(candidate, scale.settings("train"))
        training = candidate.recipe.training.model_copy(update={"compile": compiled})
        chosen = prepare_model(model, training, ALONE, bf16=True)
        if way == TORCH:  # the C++ attention of a CPU, too, gives way to torch's
            put(model, chosen | {"attention": Choice(way, "measured")})
        run = differentiator(scale, candidate, model, bf16=True, documents=count)
        value = run()["task"].item()
        memory = PeakMemory(scale.device)
        milliseconds = 1000 * scale.seconds(run)
        return {"attention": chosen["attention"].way, "loss": value, "ms": milliseconds, "peak GB": memory.read() / 1e9}

    for compiled in (False,) if scale.quick else (False, True):
        mode = "compiled" if compiled else "eager"
        yield f"dense mask, {mode}", partial(measure, TORCH, 8, compiled)
        if not scale.quick:  # on a CPU flex_attention has no backward pass
            yield f"blocks, {mode}", partial(measure, FLEX, 8, compiled)
        yield f"no documents, {mode}", partial(measure, FLEX, 0, compiled)


WAITING = {
    "v5": ("v5",),
    "v5, Muon": ("v5", "training.optimizer.name=muon"),
    "v4, moving mu, every loss": (
        "v4",
        "model.integrator.mu.adaptation_rate=0.01",
        "training.losses.lambda_mean=0.5",
        "training.losses.lambda_speed=0.1",
    ),
    "v4, dynamic budget": ("v4", "model.integrator.budget.strategy=dynamic"),
    "v4, learned budget": ("v4", "model.integrator.budget.strategy=learned"),
    "v4, four experts": ("v4", "model.integrator.controller.experts=4", "model.integrator.controller.top_k=2"),
}


class RandomLoader:
    """Batches of random tokens, a few documents in each row."""

    def __init__(self, scale: Scale, vocab_size: int, rows: int) -> None:
        self.scale, self.vocab_size, self.rows = scale, vocab_size, rows

    def batch(self, step: int) -> Batch:
        """The batch of a step."""
        draw, length = np.random.default_rng(step), self.scale.length
        ids = draw.integers(0, self.vocab_size, (self.rows, length + 1))
        numbers = np.repeat(np.arange(length, dtype=np.int32)[None] // (length // 4), self.rows, 0)
        places = np.repeat(np.arange(length)[None] % (length // 4), self.rows, 0)
        return Batch(np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]), numbers, places)


def waits(scale: Scale) -> Rows:
    """How often the host waits for the GPU in a step after which nothing is written, and how long such a step takes."""
    for name, (preset, *overrides) in WAITING.items():
        yield name, partial(count_waits, scale, preset, overrides)


def count_waits(scale: Scale, preset: str, overrides: list[str]) -> Figures:
    """Five steps of the trainer's own `Stepper`, and where torch says that they wait."""
    more = ["training.steps=100", "training.logging.every=90", "training.evaluation.every=0", *overrides]
    candidate = scale.candidate(preset, *more, "training.checkpoint.every=0", "training.logging.dynamics_every=0")
    recipe = candidate.recipe
    model = build_model(candidate, scale.settings("train"))
    chosen = prepare_model(model, recipe.training, ALONE, bf16=True)
    vocab_size = candidate.config.vocab_size or 0
    optimizers = build_optimizers(model, recipe.training.optimizer, scale.device)
    found: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        run = RunFiles(Path(directory), recipe, bench_tokenizer(vocab_size), Path(directory), operations=chosen)
        loader: Any = RandomLoader(scale, vocab_size, recipe.training.batch_size)
        parallel = Parallel(LossModule(model, autocast(scale.settings("train"))), World(0, 1, scale.device))
        stepper = Stepper(parallel, loader, optimizers, run, Observer())
        stop = StopSignal()
        for step in range(1, 4):
            stepper.take(step, stop)
        synchronize(scale.device)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            _report_waits("warn", scale)
            for step in range(4, 9):
                stepper.take(step, stop)
            _report_waits("default", scale)
            found = [f"{Path(one.filename).name}:{one.lineno}" for one in caught if "synchronizing" in str(one.message)]
        synchronize(scale.device)
        start = time.perf_counter()
        for step in range(9, 14):
            stepper.take(step, stop)
        synchronize(scale.device)
        seconds = (time.perf_counter() - start) / 5
        stepper.close()
    where = ", ".join(f"{place} x {count}" for place, count in Counter(found).most_common(4))
    return {"waits a step": len(found) / 5, "where": where, "ms": 1000 * seconds, "deferred": stepper.watch.deferred}


def _report_waits(mode: str, scale: Scale) -> None:
    if not scale.quick:
        torch.cuda.set_sync_debug_mode(mode)
