"""How large the models of benchmarks/gpu.py are, where they run, and how something is timed there."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from inl_core.analysis.bench.choosing import Choice, first_candidate
from inl_core.analysis.bench.measuring import synchronize
from inl_core.analysis.bench.settings import BenchSettings, Candidate

Figures = dict[str, Any]
Rows = Iterator[tuple[str, Callable[[], Figures]]]
"""Names of rows, and what measures each."""


@dataclass(frozen=True)
class Scale:
    """How large everything is: of use on a GPU, or quick on a CPU."""

    quick: bool

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return torch.device("cpu" if self.quick else "cuda")

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return 32 if self.quick else 1024

    def dimensions(self, size: str = "medium") -> Figures:
        """Keys of the model section: d = 768 x 12, or d = 1024 x 24; 4 queries share a key head."""
        if self.quick:
            return {"d_model": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": 320}
        medium = {"d_model": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 3, "vocab_size": 32768}
        large = {"d_model": 1024, "num_layers": 24, "num_heads": 16, "num_kv_heads": 4, "vocab_size": 32768}
        return medium if size == "medium" else large

    def settings(self, task: Any, **changes: Any) -> BenchSettings:
        """A benchmark's settings; bfloat16 everywhere."""
        more = {"batch_size": 2 if self.quick else 16, "sequence_length": self.length} | changes
        return BenchSettings(task, device=self.device.type, bf16=True, **more)  # type: ignore[arg-type]

    def candidate(self, preset: str = "v5", *overrides: str, size: str = "medium", batch: int = 0) -> Candidate:
        """A model of ours; `overrides` as of --set."""
        rows = batch or (2 if self.quick else 16)
        more = ["training.precision=bf16", *overrides]
        choice = Choice(None, preset, self.dimensions(size), more, batch_size=rows, sequence_length=self.length)
        return first_candidate(choice)

    def seconds(self, run: Callable[[], Any], *, warmup: int = 3, repetitions: int = 8) -> float:
        """Seconds of one repetition: the median of three turns."""
        for _ in range(1 if self.quick else warmup):
            run()
        found = []
        for _ in range(1 if self.quick else 3):
            synchronize(self.device)
            start, count = time.perf_counter(), 1 if self.quick else repetitions
            for _ in range(count):
                run()
            synchronize(self.device)
            found.append((time.perf_counter() - start) / count)
        return sorted(found)[len(found) // 2]
