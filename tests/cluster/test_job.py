"""The job scripts of `inl slurm` on two nodes: stopped, or with a node or a process lost, a run ends as it would have.

What the undisturbed run of two ranks computes does not depend on who started them, so one such run is the reference.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from inl_cli.app import app
from tests.cluster import standin
from tests.cluster.nodes import UNAVAILABLE
from tests.cluster.standin import Cluster
from tests.faults.subject import RECIPE, rows, tensors

pytestmark = pytest.mark.slow


def open_cluster(base: Path) -> Cluster:
    """Two nodes. Where none can be made, the tests are skipped, or fail if INL_NEEDS_NODES is set, as in CI."""
    try:
        return Cluster(base)
    except UNAVAILABLE as error:
        if os.environ.get("INL_NEEDS_NODES"):
            raise
        pytest.skip(f"no two nodes here, for want of namespaces: {error}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two nodes that see a directory with a recipe and its text."""
    cluster = open_cluster(tmp_path_factory.mktemp("cluster"))
    (cluster.base / "recipe.yaml").write_text(RECIPE + "  device: cpu\n")
    text = Path(__file__).parents[2] / "docs" / "commands.md"
    shutil.copy(text, cluster.base / "text.md")
    yield cluster
    cluster.close()


def test_one_machine_is_not_taken_for_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: object) -> None:
        raise RuntimeError("no namespaces here")

    monkeypatch.setattr(standin, "Nodes", refuse)
    monkeypatch.delenv("INL_NEEDS_NODES", raising=False)
    (tmp_path / "one").mkdir()
    with pytest.raises(pytest.skip.Exception, match="no two nodes here"):
        open_cluster(tmp_path / "one")
    monkeypatch.setenv("INL_NEEDS_NODES", "1")
    (tmp_path / "other").mkdir()
    with pytest.raises(RuntimeError, match="no namespaces"):
        open_cluster(tmp_path / "other")


def write_script(cluster: Cluster, run: str, launcher: str) -> Path:
    """What `inl slurm` prints for two nodes of one process each."""
    script = cluster.base / f"{run}.sh"
    size = ("--nodes", "2", "--gpus-per-node", "0", "--cpus-per-process", "1", "--time", "10:00", "--lead", "60")
    sources = ("--set", "data.sources=[text.md]")
    where = ("--run-dir", run, "--launcher", launcher, "--output", str(script))
    written = CliRunner().invoke(app, ["slurm", str(cluster.base / "recipe.yaml"), *size, *sources, *where])
    assert written.exit_code == 0, written.output
    return script


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster) -> Path:
    """The run that nothing happened to; it also prepared the data."""
    (told,) = cluster.run(write_script(cluster, "undisturbed", "srun"))
    assert told.endswith("exit code 0"), told + (cluster.base / "logs/subject/4242/0/rank-0.log").read_text()
    return cluster.base / "undisturbed"


def check_is_as(run: Path, undisturbed: Path) -> None:
    """Weights, optimizer and metrics are those of the undisturbed run, bit for bit."""
    assert tensors(run) == tensors(undisturbed)
    assert rows(run) == rows(undisturbed)


def test_a_job_under_torchrun_goes_on_after_its_time_and_after_the_loss_of_a_node(cluster: Cluster, undisturbed: Path):
    script = write_script(cluster, "torchrun", "torchrun")
    told = cluster.run(script, cluster.signal_steps, cluster.lose_second_node)
    assert len(told) == 3, told
    assert "job 4242 is back in the queue" in told[0]
    assert '"state": "preempted"' in told[0]
    assert told[2].endswith("exit code 0"), told[2]
    check_is_as(cluster.base / "torchrun", undisturbed)
    logs = sorted(cluster.base.glob("logs/subject/4242/2/node-*/*/attempt_0/0/stderr.log"))
    assert len(logs) == 2


def test_a_job_under_srun_goes_on_after_its_time_and_after_the_end_of_a_process(cluster: Cluster, undisturbed: Path):
    script = write_script(cluster, "srun", "srun")
    told = cluster.run(script, cluster.signal_steps, cluster.kill_a_task)
    assert len(told) == 3, told
    assert "job 4242 is back in the queue" in told[0]
    assert '"state": "resumable"' in told[1]
    assert told[2].endswith("exit code 0"), told[2]
    check_is_as(cluster.base / "srun", undisturbed)
