"""What the environment says of the place of a process among the others."""

import pytest

from inl_core.errors import RecipeError
from inl_core.launcher import Place, place_or_alone, read_place, refuse_separate_tasks

MEETING = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


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
    "environment",
    [
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"},
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"},
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
    ],
)
def test_tasks_that_know_nothing_of_each_other_are_told_of_torchrun(environment):
    with pytest.raises(RecipeError, match="torchrun"):
        refuse_separate_tasks(environment)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {
            "SLURM_JOB_ID": "7",
            "SLURM_PROCID": "0",
            "SLURM_NTASKS": "4",
        },  # a batch script, whose job may start four tasks
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # a shell that salloc opened
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "4"},
        {
            "SLURM_PROCID": "1",
            "SLURM_STEP_NUM_TASKS": "2",
            "WORLD_SIZE": "8",
        },  # torchrun or the user has set WORLD_SIZE
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "many"},
    ],
)
def test_one_task_is_no_matter(environment):
    refuse_separate_tasks(environment)
