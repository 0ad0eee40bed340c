"""A stand-in for Slurm with two nodes, which runs one job. `srun` and `scontrol` are programs on the job's PATH.

- As with Slurm, the script runs on the first node; a signal before the end goes to the processes that srun started, and
  not to the script; a job that loses a node is killed, and repeated if it has asked for that.
- The nodes are namespaces. Where the system allows none, there is no cluster.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.cluster.nodes import Nodes

PROJECT = Path(__file__).parents[2]
NAMES = ("node1", "node2")
TIMEOUT = 180.0
_SCONTROL = 'case "$1" in show) cat "$STANDIN/names" ;; requeue) echo "$2" >"$STANDIN/requeue" ;; *) exit 1 ;; esac'


class Cluster:
    """Two nodes and the queue. Everything is below `base`, which both nodes see; raises as Nodes does."""

    def __init__(self, base: Path) -> None:
        self.base, self._script = base, ""
        self._mark = f"STANDIN={base}\0".encode()
        (base / "bin").mkdir()
        for name, line in {
            "srun": f'exec "{sys.executable}" -m tests.cluster.srun "$@"',
            "scontrol": _SCONTROL,
        }.items():
            (base / "bin" / name).write_text(f"#!/bin/sh\n{line}\n")
            (base / "bin" / name).chmod(0o755)
        self.nodes = Nodes(NAMES, base / "hosts")
        (base / "names").write_text("node1\nnode2\n")

    def run(self, script: Path, *disturbances: Callable[[], None], row: int = 6) -> list[str]:
        """Run a job until it does not come back into the queue; what each of its attempts wrote, and its exit code.

        Args:
            disturbances: one for each of the first attempts. It happens when the run is about to write its `row`-th row
                of metrics in this attempt.
        """
        told: list[str] = []
        self._script = script.read_text("utf-8")
        while not told or (self.base / "requeue").exists():
            disturbance = disturbances[len(told)] if len(told) < len(disturbances) else None
            (self.base / "requeue").unlink(missing_ok=True)
            with self._fifo("reached") as reached, self._fifo("go") as go, (self.base / "job.out").open("wb") as output:
                job = subprocess.Popen(
                    [*self.nodes.enter(NAMES[0]), "sh", "-c", 'cd "$0" && exec bash "$1"', str(self.base), str(script)],
                    env=self._environment(restarts=len(told), row=row if disturbance else 0),
                    stdout=output,
                    stderr=output,
                )
                try:
                    if disturbance and _is_readable(reached, job):
                        disturbance()
                        os.write(go, b"x")
                    job.wait(TIMEOUT)
                finally:
                    self.kill(b"SLURM_JOB_ID=")
                    job.wait()
            told.append(f"{(self.base / 'job.out').read_text()}\nexit code {job.returncode}")
        return told

    def signal_steps(self) -> None:
        """The end of the job is near: send the signal that its script asks for."""
        found = re.search(r"^#SBATCH --signal=([A-Z]+)@\d+$", self._script, re.MULTILINE)
        assert found
        self.kill(b"SLURM_STEP_ID=", signal.Signals[f"SIG{found[1]}"])

    def lose_second_node(self) -> None:
        """A node loses its power: Slurm ends the job, and repeats it."""
        self.nodes.lose(NAMES[1])
        self.kill(b"SLURM_JOB_ID=")
        if "\n#SBATCH --requeue\n" in self._script:
            (self.base / "requeue").touch()
        self.nodes.repair(NAMES[1])

    def kill_a_task(self) -> None:
        """What srun started on the second node is killed, as when there is no memory left."""
        self.kill(b"SLURM_PROCID=1\0")

    def kill(self, mark: bytes, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to every process of the job that has `mark` in its environment."""
        for path in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):
                environment = b"\0" + path.read_bytes()
                if self._mark in environment and b"\0" + mark in environment:
                    os.kill(int(path.parent.name), number)

    def close(self) -> None:
        """End the nodes."""
        self.nodes.close()

    def _environment(self, *, restarts: int, row: int) -> dict[str, str]:
        tasks = re.search(r"^#SBATCH --ntasks-per-node=(\d+)$", self._script, re.MULTILINE)
        assert tasks
        nodes = [self.nodes.enter(name) for name in NAMES]
        (self.base / "nodes.json").write_text(json.dumps(nodes))
        job = {"JOB_ID": "4242", "JOB_NODELIST": "node[1-2]", "PROCID": "0"}
        job |= {"NTASKS": str(len(nodes) * int(tasks[1]))} | ({"RESTART_COUNT": str(restarts)} if restarts else {})
        mine = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        return mine | {
            **{f"SLURM_{name}": value for name, value in job.items()},
            "STANDIN": str(self.base),
            "PAUSE_ROW": str(row),
            "PATH": f"{self.base / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": f"{PROJECT / 'tests/cluster/pause'}:{PROJECT}",
        }

    @contextmanager
    def _fifo(self, name: str) -> Iterator[int]:
        """A FIFO that is open at both ends, so that nobody waits for another one to open it."""
        path = self.base / name
        os.mkfifo(path)
        descriptor = os.open(path, os.O_RDWR)
        yield descriptor
        os.close(descriptor)
        path.unlink()


def _is_readable(descriptor: int, job: subprocess.Popen) -> bool:
    """Wait until something can be read; False when the job ends before."""
    while job.poll() is None:
        if select.select([descriptor], [], [], 0.5)[0]:
            return True
    return False
