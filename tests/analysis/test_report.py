"""Reports of runs: the numbers, the same ones in page and JSON, and a page that a browser draws without help."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from inl_cli.app import app
from inl_core.analysis.report.build import compare_runs, report_runs
from inl_core.analysis.report.history import MOST_RECORDS
from inl_core.analysis.report.page import LIBRARIES, to_page
from inl_core.analysis.report.parts import Finding, Part, Report, Section
from inl_core.analysis.report.tasks import results_path
from inl_core.errors import ArtefactError, RecipeError
from inl_core.model.flops import training_flops
from tests.analysis.report_runs import SPEED, browse, inside, needs_chromium, write_history, write_run
from tests.inference.tiny import config, tokenizer


def records(report: Report, key: str) -> list[dict[str, Any]]:
    return next(part for part in report.parts if part.key == key).records()


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "a", "v5", scores={2: 3.0, 4: 2.0, 6: 1.8}),
        write_run(tmp_path / "b", "v4", scores={2: 2.9, 4: 2.4, 10: 1.5}),
    ]


def test_a_run_is_told_by_what_it_spent(runs: list[Path]) -> None:
    row = records(report_runs(runs[:1]), "validation")[1]
    cost = training_flops(config("v5").with_vocab_size(tokenizer().vocab_size), 32)
    assert (row["step"], row["tokens"], row["validation_bits_per_byte"]) == (4, 256, 2.0)
    assert row["seconds"] == pytest.approx(256 / SPEED)
    assert row["flops"] == 256 * cost


def test_budgets_are_those_all_runs_have_reached_and_scores_lie_between_evaluations(runs: list[Path]) -> None:
    found = {(row["budget"], row["run"]): row for row in records(compare_runs(runs), "equal-budgets")}
    assert found["tokens", "a"]["amount"] == 6 * 64
    assert found["tokens", "a"]["validation_bits_per_byte"] == 1.8
    assert found["tokens", "b"]["validation_bits_per_byte"] == pytest.approx(np.interp(6, [2, 4, 10], [2.9, 2.4, 1.5]))


def test_the_findings_name_who_is_ahead_and_which_keys_differ(runs: list[Path]) -> None:
    sentences = "\n".join(finding.sentence for finding in compare_runs(runs).findings)
    assert "At equal tokens (384) a is ahead: 1.8000 bits per byte, b 2.1000 (0.3000 more)." in sentences
    assert "A run that is read before its last step" in sentences
    assert "The recipes differ in" in sentences
    assert "model.preset" in sentences


def test_runs_with_the_same_score_are_said_to_be_equal(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / name, "v5", scores={2: 3.0, 4: 2.0}) for name in ("a", "b")]
    sentences = "\n".join(finding.sentence for finding in compare_runs(runs).findings)
    assert "At equal tokens (256) a and b score the same: 2.0000 bits per byte." in sentences
    assert "ahead" not in sentences


def test_scores_of_different_texts_are_not_ranked(tmp_path: Path) -> None:
    texts = [write_run(tmp_path / name, scores={4: 2.0}, scored_on=name) for name in ("a", "b")]
    sentences = [finding.sentence for finding in compare_runs(texts).findings]
    said = "The runs were scored on different texts, or in different windows: "
    assert f"{said}their bits per byte do not rank them." in sentences
    assert not any("ahead" in sentence for sentence in sentences)
    texts.append(write_run(tmp_path / "c", scores={4: 1.5}, scored_on="a"))
    report = compare_runs(texts)
    assert f"{said}bits per byte rank only a, c." in [finding.sentence for finding in report.findings]
    assert {row["run"] for row in records(report, "equal-budgets")} == {"a", "c"}


def test_a_run_that_got_worse_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", scores={2: 3.0, 4: 2.0, 6: 2.5})
    sentence = report_runs([run]).findings[0].sentence
    assert "2.5000 bits per byte of held-out text, which is 0.5000 worse than its best, at step 4." in sentence


def test_scores_on_tasks_are_shown_beside_each_other(runs: list[Path]) -> None:
    assert not any(part.key == "tasks" for part in compare_runs(runs).parts)
    metric = {"name": "acc", "filter": "none", "value": 0.25, "stderr": 0.1}
    for step in (2, 10):
        tasks = {"quiz": {"version": "1", "num_fewshot": 0, "examples": step, "lm_eval": "0.4", "metrics": [metric]}}
        path = results_path(runs[1], f"step-{step:08d}")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"checkpoint": "c", "step": step, "tasks": tasks}))
    (row,) = records(compare_runs(runs), "tasks")
    assert (row["run"], row["step"], row["task"], row["score"], row["examples"]) == ("b", 10, "quiz", 0.25, 10)
    assert "On tasks b scores quiz acc 0.25 at step 10." in [one.sentence for one in report_runs(runs).findings]
    path.write_text("{}")
    with pytest.raises(ArtefactError, match="run it again"):
        report_runs(runs)


def test_long_runs_are_thinned_to_means(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", scores={1000: 2.0})
    losses = [row["loss"] for row in records(report_runs([run]), "training-loss")]
    assert len(losses) <= 240
    assert losses[0] == pytest.approx(np.mean([5 - step / 10 for step in range(1, 6)]))


def test_the_records_of_the_dynamics_become_a_table_of_step_and_layer(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "v4", scores={4: 2.0})
    write_history(run, {1: [0.0, 0.0], 3: [0.5, 0.25]}, drift=0.002)
    report = report_runs([run])
    rows = [(row["step"], row["place"], row["mean"], row["drift"]) for row in records(report, "a-mu")]
    assert rows == [
        (1, "layer 0", 0, 0.002),
        (1, "layer 1", 0, 0.002),
        (3, "layer 0", 0.5, 0.002),
        (3, "layer 1", 0.25, 0.002),
    ]
    sentences = [finding.sentence for finding in report.findings]
    assert "a: distance from the start at step 3, rms: mu 0.002." in sentences
    assert any(text.startswith("a: mu hardly left its start by step ") for text in sentences)


def test_many_records_are_thinned_and_the_last_one_stays(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "v4", scores={4: 2.0})
    write_history(run, {step: [step / 7] for step in range(1, 151)})
    steps = [row["step"] for row in records(report_runs([run]), "a-mu")]
    assert len(steps) <= MOST_RECORDS
    assert steps[-1] == 150


@pytest.mark.parametrize(("variance", "said"), [(0.01, "(20% of its size)"), (1e-8, "as good as constant")])
def test_a_coefficient_that_no_token_changes_is_called_constant(tmp_path: Path, variance: float, said: str) -> None:
    run = write_run(tmp_path / "a", "v4", scores={4: 2.0})
    write_history(run, {1: [0.5]}, "alpha", variance_tokens=variance)
    assert said in report_runs([run]).findings[-1].sentence


def test_runs_of_one_name_go_by_their_paths(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / name / "run", scores={4: 2.0}) for name in ("a", "b")]
    assert [row["run"] for row in records(compare_runs(paths), "runs")] == [str(path) for path in paths]


def test_what_is_no_run_is_refused_by_name(tmp_path: Path, runs: list[Path]) -> None:
    with pytest.raises(ArtefactError, match="nothing: no such directory"):
        report_runs([tmp_path / "nothing"])
    with pytest.raises(ArtefactError, match="is no run"):
        report_runs([tmp_path])
    with pytest.raises(RecipeError, match="is named twice"):
        compare_runs([runs[0], runs[0]])


def test_page_and_json_hold_the_same_numbers(runs: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = CliRunner().invoke(app, ["compare", *map(str, runs), "--output", str(page), "--json"])
    assert result.exit_code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed.pop("file") == str(page)
    assert inside(page.read_text(encoding="utf-8"), "numbers") == printed


def test_a_page_is_small_and_names_nothing_to_load(runs: list[Path]) -> None:
    page = to_page(compare_runs(runs))
    assert len(page.encode()) < 5_000_000
    outside = re.sub(r"(<script[^>]*>).*?(</script>)", r"\1\2", page, flags=re.DOTALL)
    assert not re.search(r"""\ssrc=|href="(?!#)""", outside)
    assert "default-src 'none'" in page


def test_the_libraries_of_a_page_are_those_whose_licences_lie_beside_them() -> None:
    licences = (Path(to_page.__code__.co_filename).parent / "assets" / "LICENSES.txt").read_text(encoding="utf-8")
    assert all(f"\n{name} {version} (" in licences for name, version in LIBRARIES.items())
    commands = Path(__file__).parents[2].joinpath("docs", "commands.md").read_text(encoding="utf-8")
    assert all(version in commands for version in LIBRARIES.values())


def test_text_of_a_report_is_never_taken_for_markup() -> None:
    evil = "</script><script>alert(1)</script>"
    part = Part("a", evil, evil, ("x",), [(evil,), (float("nan"),)])
    page = to_page(Report(evil, [Section(evil, [part], evil, [Finding(evil)])]))
    assert evil not in page
    assert inside(page, "numbers")["sections"][0]["parts"][0]["rows"] == [[evil], [None]]


def test_the_terminal_shows_the_findings_and_the_short_tables(runs: list[Path]) -> None:
    result = CliRunner().invoke(app, ["compare", *map(str, runs)])
    assert result.exit_code == 0, result.stderr
    assert "- At equal tokens (384) a is ahead" in result.stdout
    assert "What the recipes differ in" in result.stdout
    arguments = ["report", str(runs[0]), "--output", str(runs[0] / "page.html")]
    only = CliRunner().invoke(app, arguments).stdout
    assert "bits per byte of held-out text" in only
    assert "steps planned" not in only
    assert re.search(r"^(1 table is|\d+ tables are) not shown here", only, re.MULTILINE)
    assert "1 tables" not in only
    every = CliRunner().invoke(app, [*arguments, "--tables", "all"]).stdout
    assert all(part.title in every for part in report_runs(runs[:1]).parts)


def test_steps_whose_loss_was_not_finite_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", scores={4: 2.0})
    with (run / "metrics.jsonl").open("a") as file:
        row = {"tokens": 256, "loss": None}
        file.writelines(json.dumps(row | {"step": step, "skipped": "a record"}) + "\n" for step in (5, 6))
        file.write(json.dumps(row | {"step": 7}) + "\n")  # prompts filled its windows: no target token, and no fault
    sentences = [finding.sentence for finding in report_runs([run]).findings]
    assert "a: 2 steps had no finite loss, the last of them step 6." in sentences


def test_every_table_is_a_csv_file_too(runs: list[Path], tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", *map(str, runs), "--csv", str(tmp_path / "tables")])
    assert result.exit_code == 0, result.stderr
    parts = compare_runs(runs).parts
    assert {path.stem for path in (tmp_path / "tables").iterdir()} == {part.key for part in parts}
    table = pd.read_csv(tmp_path / "tables" / "validation.csv")
    wanted = records(compare_runs(runs), "validation")
    assert table["validation_bits_per_byte"].tolist() == [row["validation_bits_per_byte"] for row in wanted]


def test_a_comparison_needs_two_runs(runs: list[Path]) -> None:
    result = CliRunner().invoke(app, ["compare", str(runs[0])])
    assert (result.exit_code, "needs two runs or more" in result.stderr) == (2, True)


@needs_chromium
def test_a_browser_draws_every_chart_without_an_error(runs: list[Path], tmp_path: Path) -> None:
    write_history(runs[0], {1: [0.0, 0.0], 3: [0.5, 0.25]}, drift=0.1)
    report = report_runs(runs)
    path = tmp_path / "report.html"
    path.write_text(to_page(report), encoding="utf-8")
    document, log = browse(path, tmp_path / "profile")
    assert 'data-drawn="yes"' in document, log
    assert len(re.findall(r'<svg[^>]*class="marks"', document)) == sum(len(part.specs) for part in report.parts)
    assert "CONSOLE" not in log, log
