"""What the environment says of the place of a process among the others."""

import pytest

from inl_core.errors import RecipeError
from inl_core.launcher import Place, first_host, place_or_alone, read_place

MEETING = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[03-04,7]", "SLURM_STEP_ID": "2"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, Place(0, 1, 0)),
        ({"RANK": "1", "LOCAL_RANK": "auto"}, Place(0, 1, 0)),
        ({"WORLD_SIZE": "1"}, Place(0, 1, 0)),
        ({"WORLD_SIZE": "1", "RANK": "1", "LOCAL_RANK": "auto"}, Place(0, 1, 0)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", **MEETING}, Place(3, 4, 1)),
    ],
)
def test_places(environment: dict[str, str], place: Place) -> None:
    assert read_place(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE=''"),
        ({"WORLD_SIZE": "auto"}, "WORLD_SIZE='auto'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2'"),
        ({"WORLD_SIZE": "9" * 10_000}, "WORLD_SIZE='999"),
        ({"WORLD_SIZE": "2.0", "RANK": "0"}, "WORLD_SIZE='2.0'"),
        ({"WORLD_SIZE": "\u0662", "RANK": "0"}, "WORLD_SIZE="),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE=2 without MASTER_ADDR"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MEETING}, "RANK=2 with WORLD_SIZE=2: ranks go from 0 to 1"),
        ({"WORLD_SIZE": "2", "RANK": "-1", **MEETING}, "RANK='-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "auto", **MEETING}, "LOCAL_RANK='auto'"),
    ],
)
def test_an_environment_that_makes_no_sense_is_one_line(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError) as caught:
        read_place(environment)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) < 200
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place_or_alone() == Place(0, 1, 0)


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        (
            {**JOB, "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "9"},
            Place(5, 8, 1, "tcp://gpu03:10009"),
        ),
        ({**JOB, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "2"}, Place(1, 2, 1, "tcp://gpu03:10009")),
        (
            {
                **JOB,
                "SLURM_PROCID": "1",
                "SLURM_NTASKS": "2",
                "SLURM_STEP_NODELIST": "gpu7",
            },  # a step on one of the nodes
            Place(1, 2, 0, "tcp://gpu7:10009"),
        ),
        ({**JOB, **MEETING, "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, Place(1, 2, 0, "tcp://localhost:29500")),
        (
            {**JOB, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_ID": "4000019999"},
            Place(1, 2, 0, "tcp://gpu03:10001"),
        ),
        # srun tells its tasks of MPI, too
        ({**JOB, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "PMI_SIZE": "2"}, Place(1, 2, 0, "tcp://gpu03:10009")),
    ],
)
def test_tasks_of_srun_are_processes_of_one_run(environment: dict[str, str], place: Place) -> None:
    assert read_place(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "srun started 2 tasks without SLURM_JOB_NODELIST"),
        ({**JOB, "SLURM_JOB_ID": "", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_JOB_ID=''"),
        (
            {"SLURM_STEP_NODELIST": "a", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
            "srun started 2 tasks without SLURM_JOB_ID",
        ),
        ({**JOB, "SLURM_PROCID": "x", "SLURM_NTASKS": "2"}, "SLURM_PROCID='x'"),
        ({**JOB, "SLURM_PROCID": "1", "SLURM_LOCALID": "-1", "SLURM_NTASKS": "2"}, "SLURM_LOCALID='-1'"),
        ({**JOB, "SLURM_PROCID": "2", "SLURM_NTASKS": "2"}, "SLURM_PROCID=2 among 2 tasks: they go from 0 to 1"),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun started 4 tasks"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "mpirun started 2 tasks"),
        # mpirun, which started one helper on each of two nodes by srun
        ({**JOB, "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "PMI_SIZE": "16"}, "mpirun started 16 tasks"),
    ],
)
def test_tasks_that_cannot_find_each_other_are_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RecipeError, match="torchrun") as caught:
        read_place(environment)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "environment",
    [
        {**JOB, "SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # a batch script, whose job may start four tasks
        {**JOB, "SLURM_NTASKS": "4"},  # a shell that salloc opened
        {**JOB, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
        # the user wants a run of its own in each task
        {**JOB, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "many"},
    ],
)
def test_one_task_is_alone(environment: dict[str, str]) -> None:
    assert read_place(environment) == Place()


def _all_hosts(nodes: str) -> list[str]:
    """Every host of a node list, by the rules of Slurm's manual: a slow reference."""
    items, depth, item = [], 0, ""
    for letter in nodes:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and not depth:
            items, item = [*items, item], ""
        else:
            item += letter
    return [host for each in [*items, item] for host in _expanded(each)]


def _expanded(item: str) -> list[str]:
    before, bracket, rest = item.partition("[")
    if not bracket:
        return [item]
    inside, _, after = rest.partition("]")
    numbers: list[str] = []
    for part in inside.split(","):
        low, dash, high = part.partition("-")
        numbers += [str(number).zfill(len(low)) for number in range(int(low), int(high) + 1)] if dash else [part]
    return [before + number + end for number in numbers for end in _expanded(after)]


@pytest.mark.parametrize(
    "nodes",
    [
        "alone",
        "a,b",
        "gpu[003-005,9],login",
        "gpu[9,003-005]",
        "rack[0-1]n[07-08]-ib,z",
        "n[1]",
        "a[2-3].example.org,b",
    ],
)
def test_the_first_host_of_a_node_list(nodes: str) -> None:
    assert first_host(nodes) == _all_hosts(nodes)[0]


@pytest.mark.parametrize("nodes", ["", "[", "a[", "],", ",b", "a[[1]"])
def test_a_damaged_node_list_gives_some_text_at_once(nodes: str) -> None:
    assert len(first_host(nodes)) <= len(nodes)
