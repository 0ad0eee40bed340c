"""As many faults are tried as docs/reliability.md says, not counting those that some machines must skip."""

from tests.faults import damaged, test_kills, test_ranks, test_write_faults


def test_as_many_faults_are_tried_as_the_documentation_says():
    assert len(test_kills.KILLS) + len(test_ranks.KILLS) + len(test_ranks.LAUNCHED) >= 60
    assert test_write_faults.count() >= 20
    assert len(damaged.CASES) >= 300
