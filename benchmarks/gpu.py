"""Everything there is to know of `inl` on one GPU, in one command of under eight minutes.

    python benchmarks/gpu.py                                 # prints Markdown, writes gpu.json
    python benchmarks/gpu.py --only train-medium decode      # some of it
    python benchmarks/gpu.py --quick                         # tiny models on a CPU: whether it all runs

- Each job of gpu_jobs.py runs in a process of its own with a limit of its own. What it measured until it failed or ran
  out of time is kept, and the others go on.
- It runs with torch 2.11, too, and where `inl` is not installed. `transformers` is measured beside ours where it is.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIMITS = {
    "machine": 60,
    "precision": 70,
    "loss": 40,
    "waits": 60,
    "train-medium": 140,
    "decode": 140,
    "documents": 90,
    "train-large": 150,
    "command": 90,
    "kernels": 60,
}
"""Seconds of each job, in the order of what is most worth knowing."""
JSON_KEYS = ("job", "row")


def run_job(job: str, seconds: float, *, quick: bool) -> list[dict[str, Any]]:
    """The rows that a job measured within so many seconds; a last one says how it failed, if it did."""
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_jobs.py"), job, *(["--quick"] if quick else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))}
    problem, start = "", time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=log, start_new_session=True)
        try:
            if process.wait(timeout=seconds):
                problem = f"ended with code {process.returncode}"
        except subprocess.TimeoutExpired:
            problem = f"not done after {seconds:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # its compiler's processes, too
                process.wait()
        out.seek(0)
        log.seek(0)
        rows = [json.loads(line) for line in out.read().decode(errors="replace").splitlines() if line.startswith("{")]
        words = log.read().decode(errors="replace").strip().splitlines()[-3:]
    if problem:
        rows.append({"row": "the rest", "failed": " | ".join((problem, *words))})
    print(f"{job}: {len(rows)} rows in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return [{"job": job, **row} for row in rows]


def tables(rows: list[dict[str, Any]]) -> str:
    """A Markdown table for each job, its columns in the order in which they first appear."""
    parts = []
    for job in dict.fromkeys(row["job"] for row in rows):
        own = [row for row in rows if row["job"] == job]
        names = list(dict.fromkeys(name for row in own for name in row if name not in JSON_KEYS))
        lines = [f"## {job}\n", f"| | {' | '.join(names)} |", f"|---{'|---' * len(names)}|"]
        lines += [f"| {row['row']} | {' | '.join(cell(row.get(name)) for name in names)} |" for row in own]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def cell(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else " ".join(str(value).replace("|", "/").split())[:300]


def main() -> None:
    """Run the jobs one after another within the time there is; print the tables and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny models on a CPU, to see whether everything runs")
    parser.add_argument("--only", nargs="+", default=list(LIMITS), help=f"of {', '.join(LIMITS)}")
    parser.add_argument("--seconds", type=float, default=470, help="for all jobs together")
    parser.add_argument("--output", type=Path, default=Path("gpu.json"), help="the file of all figures")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.only) - set(LIMITS))
    if unknown:
        parser.error(f"--only {unknown[0]}: there are {', '.join(LIMITS)}")
    end, rows = time.monotonic() + arguments.seconds, []
    for job in arguments.only:
        left = end - time.monotonic()
        if left < 5:
            rows.append({"job": job, "row": "all", "failed": "no time was left"})
        else:
            rows += run_job(job, min(LIMITS[job], left), quick=arguments.quick)
        # After each job, so that nothing is lost when the whole command is stopped.
        arguments.output.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(tables(rows))
    sys.exit(any("failed" in row for row in rows))


if __name__ == "__main__":
    main()
