"""Medians with their spread, peak memory, and what the machine is."""

import ctypes
import gc
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_PACKAGES = ("inl", "torch", "transformers", "numpy")


@dataclass(frozen=True)
class Spread:
    """A median, the quartiles around it, and what they are of."""

    median: float
    p25: float
    p75: float
    values: tuple[float, ...]


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles."""
    p25, median, p75 = np.percentile(values, (25, 50, 75)).tolist()
    return Spread(median, p25, p75, tuple(map(float, values)))


class PeakMemory:
    """Bytes above what the process held when this was made: resident on a CPU, allocated on a GPU.

    - It is the kernel's own mark of the most that was held at once, which counts what lives for a moment too. It is
      read from /proc, since a process's ru_maxrss begins with its parent's on Linux.
    - `reset` starts the mark anew, after giving freed memory back, so that what compilation needed once does not count.
      Where there is no /proc it cannot be reset: the mark is that of the process's whole life.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.reset()
        self.base = 0 if device.type == "cuda" else _status_bytes("VmRSS")

    def reset(self) -> None:
        """Forget the peak so far."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with suppress(OSError, AttributeError):  # glibc only
            ctypes.CDLL(None).malloc_trim(0)
        with suppress(OSError):
            _CLEAR.write_text("5", encoding="utf-8")

    def read(self) -> int:
        """The peak since the last reset, above the base."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return _status_bytes("VmHWM") - self.base


def _status_bytes(key: str) -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text(encoding="utf-8").splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe_machine(device: str, threads: int) -> dict[str, Any]:
    """Processor, cores this process may use, threads in use, device, system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": threads,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "system": platform.platform(),
        "load_average": os.getloadavg()[0],
    }


def describe_versions() -> dict[str, str | None]:
    """Python and the packages that matter; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), **dict.fromkeys(_PACKAGES)}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _cpu_model() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
