"""The examples of docs/python-api.md, run as they are printed."""

import doctest
from pathlib import Path


def test_the_guides_examples_give_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some of them write files
    guide = Path(__file__).parents[2] / "docs" / "python-api.md"
    failed, tried = doctest.testfile(str(guide), module_relative=False, encoding="utf-8")
    assert failed == 0
    assert tried > 30
