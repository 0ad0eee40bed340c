"""A stand-in for srun: python -m tests.cluster.srun OPTIONS COMMAND. It knows the options that our scripts use."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    """Start the tasks on their nodes; the highest exit code of them."""
    parser = argparse.ArgumentParser()
    for name in ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "wait"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--output")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    given = parser.parse_args()
    nodes = json.loads(Path(os.environ["STANDIN"], "nodes.json").read_text("utf-8"))[: given.nodes]
    per_node = given.ntasks_per_node or 1
    places = [(node, local) for node in range(len(nodes)) for local in range(per_node)][: given.ntasks]
    of_step = {"NTASKS": len(places), "STEP_NUM_TASKS": len(places), "STEP_NODELIST": os.environ["SLURM_JOB_NODELIST"]}
    tasks, flags = [], os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for rank, (node, local) in enumerate(places):
        of_task = of_step | {"STEP_ID": 0, "PROCID": rank, "LOCALID": local, "NODEID": node}
        # Set where the task is, and not here: what leads there is no process of the step.
        environment = ["env", *(f"SLURM_{name}={value}" for name, value in of_task.items())]
        stream = os.open(given.output.replace("%t", str(rank)), flags) if given.output else None
        there = [*nodes[node], *environment, "sh", "-c", 'cd "$0" && exec "$@"', str(Path.cwd()), *given.command]
        tasks.append(subprocess.Popen(there, stdout=stream, stderr=stream))
    return max(code if code >= 0 else 128 - code for code in _wait(tasks, given.wait))


def _wait(tasks: list[subprocess.Popen], patience: int | None) -> list[int]:
    """All exit codes; once a task has ended, the others have `patience` seconds left."""
    end = None
    while any(task.poll() is None for task in tasks):
        if end is None and any(task.poll() is not None for task in tasks):
            end = time.monotonic() + (patience or 1e9)
        if end is not None and time.monotonic() > end:
            for task in tasks:
                task.kill()
        time.sleep(0.02)
    return [task.wait() for task in tasks]


if __name__ == "__main__":
    sys.exit(main())
