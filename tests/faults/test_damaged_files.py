"""Whatever a file holds: a clear refusal or the right result, in bounded time and memory; bad weights never load."""

from typing import Any

import pytest

from tests.faults.commands import Outcome, check_manners
from tests.faults.conftest import chosen
from tests.faults.damaged import CASES, Case, Command
from tests.faults.subject import Stage, Whole, rows, tensors

pytestmark = pytest.mark.slow

MEASURED = {"eval", "generate", "inspect-params", "train"}
"""Commands whose output is results, which damage must not change."""


@pytest.fixture(scope="session")
def undamaged() -> dict[tuple[str, Command], Any]:
    """Results of commands on undamaged files, as they are needed."""
    return {}


def results(outcome: Outcome) -> Any:
    """The JSON on stdout without times."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(item) for key, item in value.items() if "seconds" not in key}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    return timeless(outcome.result())


@pytest.mark.parametrize("case", chosen(CASES), ids=str)
def test_a_damaged_file_is_refused_or_does_no_harm(stage: Stage, whole: Whole, undamaged, case: Case):
    is_measured = case.state != "inputs"  # with other text, other results are right
    for command in case.commands if is_measured else ():
        if command[0] in MEASURED and (case.state, command) not in undamaged:
            stage.set(case.state)
            outcome = stage.server.run(*command)
            check_manners(outcome, codes=[0])
            undamaged[case.state, command] = results(outcome)
    stage.set(case.state)
    case.damage(stage)
    for command in case.commands:
        outcome = stage.server.run(*command, faults=case.faults)
        check_manners(outcome, codes=[4] if case.must_refuse else [0, 1, 2, 4])
        if outcome.code == 0 and (case.state, command) in undamaged:
            assert results(outcome) == undamaged[case.state, command], f"silently wrong: {outcome.told}"
        if command[0] == "prepare-data":
            check_prepared(stage, outcome)
    if case.resumes:
        check_resumed(stage, whole, case)


def check_prepared(stage: Stage, outcome: Outcome) -> None:
    """A preparation that failed leaves nothing that looks like a data set; one that did not leaves an intact one."""
    if outcome.code:
        assert not (stage.path / "out" / "manifest.json").exists(), outcome.told
    else:
        check_manners(stage.server.run("inspect", "out"), codes=[0])


def check_resumed(stage: Stage, whole: Whole, case: Case) -> None:
    """The run goes on to the undisturbed end. What lies beside the checkpoints may be refused, but never followed."""
    outcome = stage.resume(faults=case.faults)
    is_of_checkpoint = "/checkpoints/" in case.file
    check_manners(outcome, codes=[0] if is_of_checkpoint else [0, 1, 2, 4])
    if outcome.code == 0:
        assert tensors(stage.run) == whole.tensors, f"silently another run: {outcome.told}"
    if is_of_checkpoint:
        assert case.file.endswith("manifest.json") or "skipped" in outcome.stderr, outcome.told
        assert rows(stage.run) == whole.rows
