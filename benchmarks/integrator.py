"""One integrator layer, forward and backward: time and memory of every backend, in turn, in one run.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/integrator.py --dim 512 --tokens 1024 --width 64 --iterations 2

- Backends alternate call by call, so that a busy machine slows all alike; the table gives medians, the least, and the
  ratio of medians to the plain loop's.
- Kept: bytes that autograd holds between the passes, inputs included. Peak: what the process (or the GPU) needs above
  its level before the first call, each backend in a process of its own; of `--memory-tokens`, enough to stand above
  what importing torch once needed.
- `--growth` also gives both at T=8 over T=2, the requirement for activations is 1.1.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
from inl_core.model.backends.select import has_native, has_triton
from torch.autograd.graph import saved_tensors_hooks

from inl_core.model import integrator as integrator_module
from inl_core.model.controller import Controller
from inl_core.model.integrator import Integrator
from inl_core.recipe import IntegratorConfig


def build(backend: str, arguments: argparse.Namespace, iterations: int) -> tuple[Callable[[], None], Callable[[], int]]:
    """A call that runs one forward and backward pass, and one that counts the bytes kept between them."""
    device = torch.device(arguments.device)
    name = "auto" if backend == "plain" else backend
    values = {"num_iterations": iterations, "backend": name, "controller": {"width": arguments.width}}
    config = IntegratorConfig.model_validate(values)
    torch.manual_seed(0)
    layer, controller = Integrator(config, arguments.dim), Controller(config, arguments.dim)
    layer.initialise()
    layer.excitation.reset_buffers()
    layer, controller = layer.to(device), controller.to(device)
    shape = (1, arguments.tokens, arguments.dim)
    h, x, v, candidate = (torch.randn(shape, device=device, requires_grad=True) for _ in range(4))
    gradient = torch.randn(shape, device=device)
    find = integrator_module.find_backend

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16)
        with (
            autocast,
            patch.object(integrator_module, "find_backend", (lambda *_: None) if backend == "plain" else find),
        ):
            amplitude = torch.tensor(0.03, device=device)
            output = layer(h, x, v, amplitude=amplitude, candidate=candidate, controller=controller)
        return output.state, output.velocity

    def both() -> None:
        torch.autograd.backward(list(forward()), [gradient, gradient])
        if device.type == "cuda":
            torch.cuda.synchronize()

    def kept() -> int:
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            results = forward()
        del results
        return sum(seen.values())

    return both, kept


def memory(backend: str, arguments: argparse.Namespace, iterations: int) -> dict[str, int]:
    """{kept, peak} in bytes, from a process of its own."""
    command = [sys.executable, __file__, "--memory-of", backend, "--iterations", str(iterations)]
    command += ["--tokens", str(arguments.memory_tokens)]
    for name in ("dim", "width", "device"):
        command += [f"--{name}", str(getattr(arguments, name))]
    command += ["--bf16"] * arguments.bf16
    return json.loads(subprocess.run(command, check=True, capture_output=True, encoding="utf-8").stdout)


def measure_memory(backend: str, arguments: argparse.Namespace) -> dict[str, int]:
    """In this process: what two calls need above what a call on 16 tokens had needed (which also compiles)."""
    small = argparse.Namespace(**vars(arguments) | {"tokens": 16})
    build(backend, small, arguments.iterations)[0]()
    both, kept = build(backend, arguments, arguments.iterations)
    on_gpu = arguments.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if on_gpu else _resident_bytes()
    for _ in range(2):
        both()
    after = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"kept": kept(), "peak": max(0, after - before)}


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * resource.getpagesize()


def main() -> None:
    """Time the backends in turn, then measure memory, and print a table (or JSON)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (
        ("dim", 512),
        ("tokens", 1024),
        ("width", 64),
        ("iterations", 2),
        ("repeats", 20),
        ("memory_tokens", 16_384),
    ):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--backends", nargs="*")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments.memory_of, arguments)))
        return
    names = arguments.backends or ["plain", "eager", "compiled"]
    if not arguments.backends and arguments.device == "cuda" and has_triton():
        names.append("triton")
    if not arguments.backends and arguments.device == "cpu" and has_native():
        names.append("native")
    calls = {name: build(name, arguments, arguments.iterations)[0] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for call in calls.values():
        call()
    for _ in range(arguments.repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    rows = []
    for name in names:
        median = statistics.median(times[name])
        row = {"backend": name, "median_ms": 1e3 * median, "least_ms": 1e3 * min(times[name])}
        row["ratio"] = median / statistics.median(times[names[0]])
        row |= {f"{key}_mb": value / 1e6 for key, value in memory(name, arguments, arguments.iterations).items()}
        if arguments.growth:
            two, eight = memory(name, arguments, 2), memory(name, arguments, 8)
            row |= {f"{key}_8_over_2": eight[key] / two[key] for key in two}
        rows.append(row)
    if arguments.json:
        print(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}))
        return
    print(" | ".join(rows[0]))
    for row in rows:
        print(" | ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))


if __name__ == "__main__":
    main()
