"""`inl slurm`: the scripts are accepted by the shell and shellcheck, and do what they should when a training ends."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from inl_cli.app import app
from inl_cli.job_scripts import seconds_of
from inl_core.errors import RecipeError

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "recipes" / "tiny.yaml")  # 16 sequences in a batch
CONTAINER = ("--container", "inl image.sqsh", "--mount", "/scratch:/scratch", "--mount", "/home/me:/home/me")
SITE = (
    "--partition",
    "gpu",
    "--account",
    "lab",
    "--sbatch=--mem=0",
    "--setup",
    "module load cuda",
    "--interface",
    "ib0",
)


@pytest.fixture
def inl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Result]:
    """`inl slurm` in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: CliRunner().invoke(app, ["slurm", *arguments])


def script_of(result: Result) -> str:
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    return result.stdout


def check_script(path: Path) -> None:
    """Both the shell and shellcheck accept it."""
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, 'pip install -e ".[dev]" brings shellcheck'
    for command in (["bash", "-n"], [found, "--severity=style"]):
        checked = subprocess.run([*command, str(path)], capture_output=True, text=True)
        assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("launcher", "container", "site"), list(itertools.product(("torchrun", "srun"), ((), CONTAINER), ((), SITE)))
)
def test_the_shell_and_shellcheck_accept_the_script(
    inl: Callable[..., Result], tmp_path: Path, launcher: str, container: tuple[str, ...], site: tuple[str, ...]
) -> None:
    size = ("--time", "1:00:00", "--nodes", "2", "--gpus-per-node", "8")
    script = script_of(inl(RECIPE, *size, "--launcher", launcher, *container, *site))
    path = tmp_path / "job.sh"
    path.write_text(script)
    check_script(path)
    options = re.findall("^#SBATCH (.*)$", script, re.MULTILINE)
    assert script.startswith("#!/bin/bash\n" + "".join(f"#SBATCH {option}\n" for option in options)), (
        "after a command, sbatch reads none"
    )
    expected = {"--nodes=2", "--gpus-per-node=8", "--time=1:00:00", "--signal=TERM@300", "--requeue", "--job-name=tiny"}
    expected |= {"--partition=gpu", "--account=lab", "--mem=0"} if site else set()
    # torchrun starts a node's processes as one task, which must have the processors of all of them.
    tasks, cpus = (1, 64) if launcher == "torchrun" else (8, 8)
    assert expected | {f"--ntasks-per-node={tasks}", f"--cpus-per-task={cpus}"} <= set(options)


class Job:
    """A job of which the commands are stand-ins that write down what they are asked, each into a file of its name."""

    def __init__(self, base: Path, script: str) -> None:
        self.base = base
        (base / "bin").mkdir()
        (base / "job.sh").write_text(script)
        for name, line in {
            "srun": "exit $SRUN",
            "scontrol": "echo host1",
            "sleep": ":",
            "inl": 'echo "$ANSWER"; exit $STATE',
        }.items():
            (base / "bin" / name).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>"$0.asked"\n{line}\n')
            (base / "bin" / name).chmod(0o755)

    def run(self, *, srun: int, state: int = 0, step: int = 0, restarts: int = 0) -> subprocess.CompletedProcess[str]:
        """Run the script: how its srun ends, and what state the run is in then."""
        said = {
            "SRUN": str(srun),
            "STATE": str(state),
            "ANSWER": json.dumps({"num_steps": 99, "step": step, "reason": None}),
        }
        said |= {"SLURM_JOB_ID": "30001", "SLURM_JOB_NODELIST": "host[1-2]", "SLURM_RESTART_COUNT": str(restarts)}
        environment = os.environ | said | {"PATH": f"{self.base / 'bin'}:{os.environ['PATH']}"}
        for asked in self.base.glob("bin/*.asked"):
            asked.unlink()
        return subprocess.run(["bash", "job.sh"], cwd=self.base, env=environment, capture_output=True, text=True)

    def asked(self, name: str) -> list[str]:
        """The arguments that a command was given, of all its calls."""
        path = self.base / "bin" / f"{name}.asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def job(inl: Callable[..., Result], tmp_path: Path) -> Job:
    """A job that trains by srun."""
    return Job(tmp_path, script_of(inl(RECIPE, "--time", "1:00:00", "--launcher", "srun")))


@pytest.mark.parametrize(
    ("state", "is_requeued", "code"),
    [
        pytest.param(0, False, 0, id="done, though a process failed at its end"),
        pytest.param(75, True, 7, id="preempted"),
        pytest.param(10, True, 7, id="killed"),
        pytest.param(11, False, 7, id="another job has the run"),
        pytest.param(12, False, 7, id="it never began"),
        pytest.param(13, False, 7, id="failed"),
        pytest.param(2, False, 7, id="not a run"),
    ],
)
def test_a_job_goes_back_into_the_queue_when_its_run_can_go_on(
    job: Job, state: int, is_requeued: bool, code: int
) -> None:
    assert job.run(srun=7, state=state, step=5).returncode == code
    assert job.asked("scontrol") == (["requeue", "30001"] if is_requeued else [])
    assert job.asked("inl")[-3:] == ["run-status", "--json", "runs/tiny"]


def test_a_job_that_succeeds_asks_nothing(job: Job) -> None:
    assert job.run(srun=0, state=75).returncode == 0
    assert job.asked("scontrol") == job.asked("inl") == []


def test_a_crash_is_repeated_only_while_the_run_gets_further(job: Job) -> None:
    steps = [0, 0, 6, 9, 9]
    requeued = []
    for restarts, step in enumerate(steps):
        job.run(srun=1, state=10, step=step, restarts=restarts)
        requeued.append(bool(job.asked("scontrol")))
    assert requeued == [True, False, True, True, False]
    assert sorted(path.name for path in (job.base / "logs/tiny/30001").glob("[0-9]*")) == ["0", "1", "2", "3", "4"]


def test_a_job_that_is_stopped_three_times_at_one_step_is_not_queued_again(job: Job) -> None:
    steps = [0, 0, 6, 6, 6, 9]
    requeued = []
    for restarts, step in enumerate(steps):
        job.run(srun=1, state=75, step=step, restarts=restarts)
        requeued.append(bool(job.asked("scontrol")))
    assert requeued == [True, True, True, True, False, True]


def test_words_of_an_earlier_attempt_are_gone_before_the_run_starts(job: Job) -> None:
    (job.base / "runs/tiny").mkdir(parents=True)
    for name in ("preempted.json", "failed.json"):
        (job.base / "runs/tiny" / name).touch()
    job.run(srun=1, state=12)
    assert not list((job.base / "runs/tiny").iterdir())


@pytest.mark.parametrize("launcher", ["torchrun", "srun"])
def test_values_reach_the_command_as_they_were_given(inl: Callable[..., Result], tmp_path: Path, launcher: str) -> None:
    name, value = 'it\'s $(not) "run"', "data.sources=[a b, $HOME]"
    where = ("--run-dir", f"runs/{name}", "--logs", f"logs {name}")
    given = inl(RECIPE, "--time", "90", "--launcher", launcher, "--set", value, *where, *CONTAINER)
    job = Job(tmp_path, script_of(given))
    assert job.run(srun=0).returncode == 0
    asked = job.asked("srun")
    assert asked[asked.index("train") :] == [
        "train",
        RECIPE,
        "--set",
        value,
        "--run-dir",
        f"runs/{name}",
        "--resume-or-start",
    ]
    assert {"--container-image=inl image.sqsh", "--container-mounts=/scratch:/scratch,/home/me:/home/me"} <= set(asked)
    assert (tmp_path / f"logs {name}" / "30001" / "0").is_dir()


@pytest.fixture
def preparation(inl: Callable[..., Result], tmp_path: Path) -> Job:
    """The jobs that prepare data in three parts."""
    sources = ("--set", "data.sources=[a b.txt, c]", "--set", "data.weights=[0.3333333333, 2]")
    data = (*sources, "--set", "data.directory=data/ours", "--set", "data.num_shards=2")
    return Job(tmp_path, script_of(inl("prepare", RECIPE, "--parts", "3", "--time", "1:00:00", *data, *CONTAINER)))


def test_the_script_of_a_preparation_submits_the_parts_and_the_job_that_joins_them(preparation: Job) -> None:
    check_script(preparation.base / "job.sh")
    assert "\n#SBATCH --array=1-3\n" in (preparation.base / "job.sh").read_text()
    submitter = preparation.base / "bin" / "sbatch"
    submitter.write_text('#!/bin/sh\necho "$@" >>"$0.asked"\necho "77;cluster"\n')
    submitter.chmod(0o755)
    assert preparation.run(srun=0).returncode == 0
    first, second = preparation.asked("sbatch")
    assert first == "--parsable job.sh"
    assert second == "--dependency=afterok:77 --kill-on-invalid-dep=yes --array=0 job.sh"


@pytest.mark.parametrize(("task", "work"), [("2", ["--part", "2/3"]), ("0", ["--finish"])])
def test_each_job_of_a_preparation_does_its_part(
    preparation: Job, monkeypatch: pytest.MonkeyPatch, task: str, work: list[str]
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", task)
    for code, asked in ((0, []), (1, []), (75, ["requeue", "30001"])):
        assert preparation.run(srun=code).returncode == code
        assert preparation.asked("scontrol") == asked
    given = preparation.asked("srun")
    options = ["--output", "data/ours", "--vocab-size", "2048", "--validation-fraction", "0.1"]
    sources = ["a b.txt", "c", "--weight", "0.3333333333", "--weight", "2.0"]
    expected = ["prepare-data", *sources, *options, "--num-shards", "2", "--max-bad-ratio", "0.01", *work]
    assert given[given.index("prepare-data") :] == expected


def test_output_and_json(inl: Callable[..., Result], tmp_path: Path) -> None:
    arguments = (RECIPE, "--time", "1:00:00")
    script = script_of(inl(*arguments))
    assert json.loads(script_of(inl(*arguments, "--json"))) == {"script": script}
    assert script_of(inl("train", *arguments)) == script_of(inl(*arguments[1:], RECIPE)) == script
    written = inl(*arguments, "--output", "job.sh")
    assert (written.exit_code, written.stdout, (tmp_path / "job.sh").read_text()) == (0, "", script)
    assert "sbatch job.sh" in written.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml", "--time", "1:00"], "missing.yaml"),
        ([RECIPE, "--time", "soon"], "--time 'soon': not a time limit"),
        ([RECIPE, "--time", "0"], "--time '0': not a time limit"),
        ([RECIPE, "--time", "5:00"], "--lead 300: seconds before the end, so --time 5:00 must be longer"),
        ([RECIPE, "--time", "1:00:00", "--nodes", "3"], "micro_batch_size 1 x world size 24 = 24 does not divide 16"),
        ([RECIPE, "--time", "1:00:00", "--set", "training.stepz=1"], "training.stepz"),
        ([RECIPE, "--time", "1:00:00", "--partition", "a b"], "--partition 'a b': not a name"),
        ([RECIPE, "--time", "1:00:00", "--sbatch", "mem=0"], "--sbatch 'mem=0': not an option of sbatch"),
        ([RECIPE, "--time", "1:00:00", "--sbatch", "--mem=0\nrm"], "'--mem=0\\nrm': holds a line end"),
        ([RECIPE, "--time", "1:00:00", "--setup", "a\nb"], "'a\\nb': holds a line end"),
        ([RECIPE, "--time", "1:00:00", "--mount", "/a:/b"], "--mount: is for a container"),
        (["prepare", RECIPE, "--parts", "2", "--time", "1"], "--lead 60: seconds before the end, so --time 1 must be"),
        (
            ["prepare", RECIPE, "--parts", "2", "--time", "9", "--set", "data.sources=['-']"],
            "data.sources: '-' cannot be",
        ),
        (
            ["prepare", RECIPE, "--parts", "2", "--time", "9", "--set", "data.tokenizer.sample_bytes=9"],
            "data.tokenizer.sample_bytes: not an option of `inl prepare-data`",
        ),
    ],
)
def test_what_cannot_be_used_is_one_line(inl: Callable[..., Result], arguments: list[str], message: str) -> None:
    result = inl(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("90", 90 * 60),
        ("90:30", 90 * 60 + 30),
        ("24:00:00", 86_400),
        ("1-0", 86_400),
        ("2-12", 60 * 3600),
        ("1-2:30", 86_400 + 9000),
        ("1-2:30:15", 86_400 + 9015),
    ],
)
def test_every_form_of_a_time_limit(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    "time", ["", "1:", "-1", "1-", "1:2:3:4", "1h", " 60", "60\n", "\u0661", "0-0:00", "UNLIMITED", "9" * 99]
)
def test_what_is_no_time_limit(time: str) -> None:
    with pytest.raises(RecipeError, match="not a time limit"):
        seconds_of(time)


def test_no_torch_is_needed() -> None:
    program = f"""
import sys
from inl_cli.app import app
try:
    app(["slurm", {RECIPE!r}, "--time", "1:00:00"])
except SystemExit as exit:
    assert exit.code == 0
print([name for name in ("torch", "numpy", "pandas") if name in sys.modules], file=sys.stderr)
"""
    done: Any = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("#!/bin/bash\n")
    assert done.stderr == "[]\n"
