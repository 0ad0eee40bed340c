"""The commit hooks run the versions that constraints.txt pins."""

import re
from pathlib import Path

import yaml

PROJECT = Path(__file__).parents[1]


def test_every_hook_has_the_version_that_ci_runs() -> None:
    pinned = set(re.findall(r"^[\w.-]+==\S+$", (PROJECT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE))
    hooks = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"][0]["hooks"]
    versions = {version for hook in hooks for version in hook["additional_dependencies"]}
    assert {version.split("==")[0] for version in versions} == {"ruff", "clang-format"}
    assert versions <= pinned
