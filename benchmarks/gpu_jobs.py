"""The jobs of benchmarks/gpu.py, each in the process that calls this file; a line of JSON for each row.

python benchmarks/gpu_jobs.py train-medium [--quick]
"""

import gc
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_checks import documents, loss, precision, waits
from gpu_scale import Figures, Rows, Scale

from inl_core.analysis.bench.ceiling import build_ceiling, ceiling_flops, flops_per_token
from inl_core.analysis.bench.choosing import other_candidate
from inl_core.analysis.bench.inl_work import build_inl_work
from inl_core.analysis.bench.llama_work import build_llama_work
from inl_core.analysis.bench.measuring import PeakMemory, describe_machine, describe_versions, synchronize
from inl_core.analysis.bench.settings import BenchSettings, Candidate
from inl_core.analysis.bench.work import Work
from inl_core.errors import RecipeError


def machine(scale: Scale) -> Rows:
    """What it is, and what its arithmetic and its memory reach."""
    yield "machine", lambda: describe_machine(scale.device.type, torch.get_num_threads()) | describe_versions()
    yield "matrix product", lambda: {"TFLOP/s": ceiling(scale) / 1e12}

    def copy() -> Figures:
        source = torch.empty(2**20 if scale.quick else 2**31, dtype=torch.uint8, device=scale.device)
        target = torch.empty_like(source)
        return {"GB/s read and written": 2 * source.numel() / scale.seconds(lambda: target.copy_(source)) / 1e9}

    yield "copy in memory", copy


def ceiling(scale: Scale) -> float:
    """FLOPs a second of one large product in bfloat16."""
    settings = replace(scale.settings("train"), gemm_size=64 if scale.quick else 8192)
    return ceiling_flops(settings) / scale.seconds(build_ceiling(None, settings, compiled=False).run)


def train(scale: Scale, size: str, batch: int) -> Rows:
    """Whole optimizer steps of v5, our Transformer and the Llama of transformers, eager and compiled."""
    reached = ceiling(scale)
    settings = scale.settings("train", **({} if scale.quick else {"batch_size": batch}))
    for candidate, build in rivals(scale, size, batch):
        for mode in ("compiled",) if size == "large" else ("eager", "compiled"):
            work = partial(build, candidate, settings, compiled=mode == "compiled" and not scale.quick)
            yield f"{candidate.name}, {mode}", partial(step_figures, scale, candidate, settings, work, reached)


def rivals(scale: Scale, size: str = "medium", batch: int = 0) -> list[tuple[Candidate, Callable[..., Work]]]:
    """v5, our Transformer, and Llama where transformers is installed."""
    first = scale.candidate("v5", size=size, batch=batch)
    found: list[tuple[Candidate, Callable[..., Work]]] = [(first, build_inl_work)]
    found.append((other_candidate("transformer", first), build_inl_work))
    try:
        found.append((other_candidate("llama", first), build_llama_work))
    except RecipeError as error:
        print(error, file=sys.stderr)
    return found


def step_figures(
    scale: Scale, candidate: Candidate, settings: BenchSettings, build: Callable[[], Work], reached: float
) -> Figures:
    """Time, memory and utilisation of one step."""
    start = time.perf_counter()
    work = build()
    work.run()
    synchronize(scale.device)
    ready = time.perf_counter() - start
    memory = PeakMemory(scale.device)
    seconds = scale.seconds(work.run)
    flops = (flops_per_token(candidate, settings) or 0) * settings.tokens
    return {
        "parameters": work.num_parameters,
        "ms": 1000 * seconds,
        "tokens/s": settings.tokens / seconds,
        "model TFLOP/s": flops / seconds / 1e12,
        "of the product's": flops / seconds / reached,
        "peak GB": memory.read() / 1e9,
        "s until ready": ready,
    }


def decode(scale: Scale) -> Rows:
    """Greedy generation of 1 and 32 rows, a prompt of 32 tokens and 256 new ones."""
    new = 4 if scale.quick else 256
    for rows in (1, 32):
        settings = scale.settings("decode", batch_size=rows, prompt_tokens=8, new_tokens=new)
        for candidate, build in rivals(scale):
            modes = ("eager",) if scale.quick or rows == 32 or candidate.kind == "llama" else ("eager", "compiled")
            for mode in modes:
                work = partial(build, candidate, settings, compiled=mode == "compiled")
                yield f"{candidate.name}, {mode}, {rows} rows", partial(decode_figures, scale, settings, work)


def decode_figures(scale: Scale, settings: BenchSettings, build: Callable[[], Work]) -> Figures:
    """Time of one whole generation."""
    start = time.perf_counter()
    work = build()
    work.run()
    ready = time.perf_counter() - start
    memory = PeakMemory(scale.device)
    seconds = scale.seconds(work.run, warmup=0, repetitions=1)
    steps = settings.new_tokens
    figures = {"tokens/s": settings.tokens / seconds, "ms a step": 1000 * seconds / steps}
    return figures | {"peak GB": memory.read() / 1e9, "s until ready": ready}


def command(scale: Scale) -> Rows:
    """The commands themselves: a short run, resumed; its evaluation; its generation."""
    from typer.testing import CliRunner

    from inl_cli.app import app

    place = tempfile.mkdtemp(prefix="inl-gpu-")
    size = [f"training.steps={4 if scale.quick else 60}", "training.compile=false", "data.sources=[builtin:python]"]
    size += ["training.checkpoint.every=0", f"training.device={scale.device.type}", f"data.directory={place}/data"]
    size += [] if not scale.quick else ["training.batch_tokens=512", "training.evaluation.final_tokens=1024"]
    changes = [word for one in size for word in ("--set", one)]
    source = str(Path(__file__).parent.parent / "recipes" / "tiny.yaml")
    if scale.quick:  # a text of its own is prepared in a second
        text = Path(place) / "text.txt"
        text.write_text("".join(f"line {number} of some text\n" for number in range(4000)), encoding="utf-8")
        changes += ["--set", f"data.sources=[{text}]", "--set", "data.tokenizer.vocab_size=320"]
    device = ["--device", scale.device.type]
    run, words = f"{place}/run", ["--max-new-tokens", "8" if scale.quick else "64"]
    lines = {
        "train": ["train", source, "--run-dir", run, *changes],
        "eval": ["eval", run, *device, *(["--max-tokens", "512"] if scale.quick else [])],
        "generate": ["generate", run, "--prompt", "def ", *words, *device],
    }

    def measure(arguments: list[str]) -> Figures:
        start = time.perf_counter()
        result = CliRunner().invoke(app, [*arguments, "--json"])
        if result.exit_code:
            raise RuntimeError(f"exit code {result.exit_code}: {result.stderr.strip().splitlines()[-1:]}")
        return {"seconds": time.perf_counter() - start, "printed": result.stdout.strip()[-250:]}

    for name, arguments in lines.items():
        yield name, partial(measure, arguments)


def kernels_of_a_step(scale: Scale) -> Rows:
    """Where the time of a compiled step of v5 goes, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    candidate = scale.candidate("v5")
    work = build_inl_work(candidate, scale.settings("train"), compiled=not scale.quick)
    for _ in range(3):
        work.run()
    synchronize(scale.device)
    activities = [ProfilerActivity.CPU if scale.quick else ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        work.run()
        synchronize(scale.device)
    own = "self_cpu_time_total" if scale.quick else "self_device_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, own))
    total = sum(getattr(event, own) for event in events) or 1
    for event in events[:18]:
        spent = getattr(event, own)
        figures = {"ms": spent / 1000, "share": spent / total, "calls": event.count}
        yield event.key[:70].replace("|", "/"), lambda figures=figures: figures


JOBS: dict[str, Callable[[Scale], Rows]] = {
    "machine": machine,
    "precision": precision,
    "loss": loss,
    "waits": waits,
    "train-medium": partial(train, size="medium", batch=16),
    "decode": decode,
    "documents": documents,
    "train-large": partial(train, size="large", batch=8),
    "command": command,
    "kernels": kernels_of_a_step,
}


def accept_older_torch() -> None:
    """Let torch before 2.13 compile, which counts the compilations of all parts together; `inl` is made for 2.13."""
    if torch.__version__ >= "2.13":
        return
    compile_as_it_is = torch.compile

    def compile_without(*args: Any, isolate_recompiles: bool = False, **options: Any) -> Any:
        return compile_as_it_is(*args, **options)

    torch.compile = compile_without  # type: ignore[assignment]


def main() -> None:
    """Measure the rows of one job; one that fails is told of, and the next one measured."""
    job, scale = sys.argv[1], Scale(quick="--quick" in sys.argv[2:])
    accept_older_torch()
    for name, measure in JOBS[job](scale):
        try:
            figures = measure()
        except Exception as error:
            traceback.print_exc()
            first = next(iter(str(error).strip().splitlines()), "")
            figures = {"failed": f"{type(error).__name__}: {first}"}
        print(json.dumps({"row": name, **figures}), flush=True)
        torch._dynamo.reset()
        gc.collect()
        if not scale.quick:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
