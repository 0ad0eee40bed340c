"""Two commands at the same moment never share a run's directory, wherever they meet."""

from collections.abc import Sequence

import pytest

from tests.faults.commands import Outcome, check_manners
from tests.faults.inject import Fault
from tests.faults.subject import RUN, Stage, check_is_whole, rows, tensors

pytestmark = pytest.mark.slow

BASE = ("train", "recipe.yaml", "--json")
PLACES = [(r"^(mkdir|open) runs?\b", number) for number in (1, 2, 4)] + [("^forward$", 1), ("^step$", 1)]
"""Where the two wait for each other: at the n-th such event."""


def run_twins(stage: Stage, commands: Sequence[tuple[str, ...]], event: str, number: int) -> list[Outcome]:
    """Two commands that wait for each other at an event."""
    fault = Fault(event, number, meet=str(stage.log.parent / f"meeting {len(list(stage.log.parent.iterdir()))}"))
    started = [stage.server.start(*command, faults=[fault]) for command in commands]
    return [command.wait(60) for command in started]


def check_one_was_refused(outcomes: list[Outcome]) -> None:
    """One did its work; the other one says why it did not."""
    assert sorted(outcome.code for outcome in outcomes) == [0, 4], [outcome.told for outcome in outcomes]
    for outcome in outcomes:
        check_manners(outcome)


@pytest.fixture(scope="session")
def alone(opened):
    """What each of two seeds gives: tensors and rows."""
    stage, found = opened[0], []
    for seed in (1, 2):
        stage.set("prepared")
        check_manners(stage.server.run(*BASE, "--run-dir", RUN, "--set", f"training.seed={seed}"), codes=[0])
        found.append((tensors(stage.run), rows(stage.run)))
    return found


@pytest.mark.parametrize(("event", "number"), PLACES)
def test_two_runs_of_one_name_get_a_directory_each(stage: Stage, alone, event: str, number: int):
    stage.set("prepared")
    commands = [(*BASE, "--set", f"training.seed={seed}") for seed in (1, 2)]
    outcomes = run_twins(stage, commands, event, number)
    for outcome in outcomes:
        check_manners(outcome, codes=[0])
    directories = [stage.path / outcome.result()["run"] for outcome in outcomes]
    assert directories[0] != directories[1]
    assert [(tensors(path), rows(path)) for path in directories] == alone


@pytest.mark.parametrize(("event", "number"), PLACES)
def test_of_two_runs_in_one_directory_one_is_refused(stage: Stage, alone, event: str, number: int):
    stage.set("prepared")
    commands = [(*BASE, "--run-dir", RUN, "--set", f"training.seed={seed}") for seed in (1, 2)]
    outcomes = run_twins(stage, commands, event, number)
    check_one_was_refused(outcomes)
    winner = [outcome.code for outcome in outcomes].index(0)
    assert (tensors(stage.run), rows(stage.run)) == alone[winner]


@pytest.mark.parametrize(("event", "number"), [(r"^open run/run\.lock", 1), ("^step$", 1)])
def test_of_two_resumes_of_one_run_one_is_refused(stage: Stage, whole, event: str, number: int):
    """Or it got the lock when the other one had just finished, and found nothing left to train."""
    stage.set("halfway")
    outcomes = run_twins(stage, [("resume", RUN, "--json")] * 2, event, number)
    if [outcome.code for outcome in outcomes] == [0, 0]:
        trained, late = sorted(outcomes, key=lambda outcome: "at its last step already" in outcome.stderr)
        assert f"{RUN}, from step 30" in trained.stderr, trained.told
        assert "at its last step already" in late.stderr, late.told
    else:
        check_one_was_refused(outcomes)
    check_is_whole(stage, whole)


@pytest.mark.parametrize("number", [1, 3, 30])
def test_two_runs_that_prepare_the_same_data_do_not_spoil_it(stage: Stage, whole, number: int):
    stage.set("start")
    commands = [(*BASE, "--run-dir", name) for name in (RUN, "other")]
    outcomes = run_twins(stage, commands, r" data\b", number)
    for outcome in outcomes:
        check_manners(outcome, codes=[0, 4])
    assert 0 in [outcome.code for outcome in outcomes], [outcome.told for outcome in outcomes]
    for name, outcome in zip((RUN, "other"), outcomes, strict=True):
        if outcome.code == 0:
            assert tensors(stage.path / name) == whole.tensors
