"""`inl eval --tasks` with the real lm-eval on tasks in a folder: its scores are those of an independent count."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from inl_cli.app import app
from inl_core.inference.generate import generate
from inl_core.inference.loading import LoadedModel, open_checkpoint
from inl_core.inference.settings import GenerationSettings
from inl_core.interop.harness import TaskSettings
from inl_core.interop.harness.model import InlLM, generation_settings
from inl_core.interop.huggingface.export import export
from tests.inference.test_commands import assert_refused
from tests.inference.tiny import write_checkpoint

ROWS = [
    {
        "question": f"Question {n}: {'what is ' * n}next?\nAnswer:",
        "choices": ["yes", "no", f"maybe {n}"],
        "answer": n % 3,
    }
    for n in range(9)
]
COMMON = "dataset_path: json\ndataset_kwargs: {data_files: {test: rows.jsonl}}\ntest_split: test\n"
TASKS = {
    "mini_choice": """output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "mini_rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
""",
    "mini_answer": """output_type: generate_until
doc_to_text: "{{ask}}"
doc_to_target: "{{expected}}"
generation_kwargs: {until: ["zz"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoint has a context of 64 tokens, which the longer questions do not fit."""
    path = tmp_path_factory.mktemp("harness") / "run"
    write_checkpoint(path, "v5")
    return path


@pytest.fixture(scope="module")
def loaded(run: Path) -> LoadedModel:
    return open_checkpoint(run)


@pytest.fixture
def folder(tmp_path: Path, loaded: LoadedModel) -> Path:
    """Three tasks of nine rows. What the model answers is right in the even ones."""
    path = tmp_path / "tasks"
    path.mkdir()
    settings = GenerationSettings(max_new_tokens=6, temperature=0, stop=("zz",))
    rows = []
    for number, row in enumerate(ROWS):
        answer = generate(loaded.model, loaded.tokenizer, [f"{number}?"], settings)[0].text
        rows.append(row | {"ask": f"{number}?", "expected": answer if number % 2 == 0 else answer + "!"})
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (path / f"{name}.yaml").write_text(f"task: {name}\n{COMMON}{text}metadata: {{version: 3.0}}\n")
    return path


def inl(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def log_probabilities(loaded: LoadedModel, ids: list[int]) -> torch.Tensor:
    """(S - 1, V): what the model gives every token after each of these but the last; one text, no batch."""
    with torch.no_grad():
        logits = loaded.model.logits(loaded.model(torch.tensor([ids[:-1]])).hidden[0])
    return logits.double().log_softmax(-1)


def likelihood(loaded: LoadedModel, context: str, continuation: str) -> tuple[float, bool]:
    """The log-probability of a continuation in nats, token by token, and whether greedy decoding would give it."""
    tokenizer, longest = loaded.tokenizer, loaded.model.config.max_seq_len
    before = [tokenizer.bos_id, *tokenizer.encode(context)]
    ids = [tokenizer.bos_id, *tokenizer.encode(context + continuation)]
    num_new, ids = len(ids) - len(before), ids[-longest - 1 :]
    table, total, is_greedy = log_probabilities(loaded, ids), 0.0, True
    for place in range(len(ids) - num_new, len(ids)):
        total += float(table[place - 1, ids[place]])
        is_greedy &= int(table[place - 1].argmax()) == ids[place]
    return total, is_greedy


def test_scores_are_those_of_an_independent_count(run: Path, loaded: LoadedModel, folder: Path) -> None:
    result = inl("eval", run, "--tasks", "mini_*", "--task-path", folder, "--json", "--quiet", "--batch-size", 4)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["tasks"]
    assert {name: (one["version"], one["examples"]) for name, one in found.items()} == dict.fromkeys(TASKS, ("3.0", 9))

    def value(task: str, metric: str) -> float:
        return next(one["value"] for one in found[task]["metrics"] if one["name"] == metric)

    right = {"acc": 0, "acc_norm": 0}
    for row in ROWS:
        scores = [likelihood(loaded, row["question"], f" {choice}")[0] for choice in row["choices"]]
        per_character = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        right["acc"] += scores.index(max(scores)) == row["answer"]
        right["acc_norm"] += per_character.index(max(per_character)) == row["answer"]
    assert {name: value("mini_choice", name) * 9 for name in right} == pytest.approx(right)
    assert value("mini_answer", "exact_match") == pytest.approx(5 / 9)
    nats, num_bytes, longest = 0.0, 0, loaded.model.config.max_seq_len
    for row in ROWS:  # the first tokens from a full context, each later one from as many as fit before the last
        ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode(row["question"])]
        done = min(longest, len(ids) - 1)
        nats -= float(
            log_probabilities(loaded, ids[: done + 1]).gather(1, torch.tensor(ids[1 : done + 1])[:, None]).sum()
        )
        while done < len(ids) - 1:
            end = min(len(ids), done + 1 + longest)
            window = ids[end - longest - 1 : end]
            table = log_probabilities(loaded, window)
            wanted = range(len(window) - (end - done - 1), len(window))
            nats -= sum(float(table[place - 1, window[place]]) for place in wanted)
            done = end - 1
        num_bytes += len(row["question"].encode())
    assert value("mini_rolling", "bits_per_byte") == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_every_log_likelihood_and_answer_is_that_of_its_text_alone(loaded: LoadedModel, batch_size: int) -> None:
    model = InlLM(loaded, TaskSettings(batch_size=batch_size), lambda what, done, total: None)
    pairs = [(row["question"], choice) for row in ROWS for choice in (*row["choices"], " y", " z")] + [
        ("", "The"),
        ("a", ""),
    ]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in pairs]
    for pair, (total, is_greedy) in zip(pairs, model.loglikelihood(requests), strict=True):
        wanted, wanted_greedy = likelihood(loaded, *pair)
        assert total == pytest.approx(wanted, abs=1e-4)
        assert is_greedy == wanted_greedy
    given: dict[str, Any] = {"until": ["zz"], "max_gen_toks": 6}
    short = ["def", "The quick brown", ""]
    answers = model.generate_until([Instance("generate_until", {}, (text, given), 0) for text in short])
    settings = generation_settings(given, TaskSettings())
    assert answers == [generate(loaded.model, loaded.tokenizer, [text], settings)[0].text for text in short]
    long = model.generate_until([Instance("generate_until", {}, ("word " * 99, given), 0)])
    assert len(loaded.tokenizer.encode(long[0])) > 0  # its beginning was cut, so that six tokens fit


def test_lm_evals_own_class_finds_the_same_in_the_exported_directory(loaded: LoadedModel, tmp_path: Path) -> None:
    export(loaded.path, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    exported: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    theirs = HFLM(pretrained=exported, tokenizer=tokenizer, batch_size=4, device="cpu", add_bos_token=True)
    ours = InlLM(loaded, TaskSettings(), lambda what, done, total: None)
    requests = [
        Instance("loglikelihood", {}, (row["question"], f" {one}"), 0) for row in ROWS for one in row["choices"]
    ]
    for (total, is_greedy), (wanted, wanted_greedy) in zip(
        ours.loglikelihood(requests), theirs.loglikelihood(requests, disable_tqdm=True), strict=True
    ):
        assert total == pytest.approx(wanted, abs=1e-4)
        assert is_greedy == wanted_greedy
    asked = [Instance("generate_until", {}, (f"{n}?", {"until": ["zz"], "max_gen_toks": 6}), 0) for n in range(5)]
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)


def test_generation_arguments_are_read_as_lm_eval_means_them() -> None:
    read: Callable[..., GenerationSettings] = lambda **given: generation_settings(given, TaskSettings())  # noqa: E731
    assert read() == GenerationSettings(max_new_tokens=256, temperature=0, batch_size=16)
    assert read(until="\n", max_tokens=9, temperature=0.5, do_sample=False).temperature == 0
    sampled = read(until=["", "x"], temperature=0.5, top_p=0.9, top_k=0)
    assert (sampled.temperature, sampled.top_p, sampled.top_k, sampled.stop) == (0.5, 0.9, None, ("x",))


@pytest.mark.slow
def test_results_stay_with_the_run_and_tasks_add_up(run: Path, folder: Path) -> None:
    for name in ("mini_choice", "mini_answer"):
        result = inl("eval", run, "--tasks", name, "--task-path", folder)
        assert result.exit_code == 0, result.output
        assert name in result.stdout
        assert "it/s]" not in result.output
    kept = json.loads((run / "reports" / "tasks-step-00000007.json").read_text())
    assert kept["step"] == 7
    assert {"mini_choice", "mini_answer"} <= kept["tasks"].keys()
    assert kept["tasks"]["mini_answer"]["lm_eval"]
    before = (run / "reports" / "tasks-step-00000007.json").read_bytes()
    limited = inl("eval", run, "--tasks", "mini_choice", "--task-path", folder, "--limit", 2, "--json")
    assert json.loads(limited.stdout)["tasks"]["mini_choice"]["examples"] == 2
    assert (run / "reports" / "tasks-step-00000007.json").read_bytes() == before  # a part is no result to keep


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "mini_choice", "--window", "8"), "those score a text; choose"),
        (("--tasks", "mini_choice", "--trust-task-code"), "is about --task-path: give it, too"),
        (("--limit", "3"), "are about --tasks: give it, too"),
        (("--tasks", ","), "--tasks: names no task"),
        (("--tasks", "mini_choice", "--task-path", "nowhere"), "--task-path nowhere: no such directory"),
    ],
)
def test_bad_arguments_are_one_line(run: Path, arguments: tuple[str, ...], message: str) -> None:
    assert_refused(inl("eval", run, *arguments), 2, message)


def test_a_task_that_cannot_be_loaded_is_named_with_the_reason(run: Path, folder: Path) -> None:
    (folder / "rows.jsonl").unlink()
    result = inl("eval", run, "--tasks", "mini_choice", "--task-path", folder)
    assert_refused(result, 2, "--tasks mini_choice: a task or its data cannot be loaded (FileNotFoundError")


def write_task(folder: Path, body: str) -> tuple[str, ...]:
    """A task whose file may ask for anything, beside the others; the arguments that run it."""
    lines = {"output_type": "generate_until", "doc_to_text": '"{{ask}}"', "doc_to_target": '"{{expected}}"'}
    text = body + "".join(f"{key}: {value}\n" for key, value in lines.items() if f"{key}:" not in body)
    (folder / "brought.yaml").write_text(f"task: brought\n{COMMON}{text}generation_kwargs: {{max_gen_toks: 1}}\n")
    return "--tasks", "brought", "--task-path", str(folder)


CODE = {
    "function": ("process_docs: !function evil.f\n", "runs Python code (!function evil.f); if you trust it: --trust-"),
    "template": (
        "doc_to_text: \"{{cycler.__init__.__globals__.os.system('touch ran')}}\"\n",
        "a template in a task file reaches for '__init__' of a type",
    ),
    "metric": ("metric_list: [{metric: ./evil.py}]\n", "the metric './evil.py' is not lm-eval's"),
}


@pytest.mark.parametrize("way", CODE)
def test_no_code_of_a_task_file_runs_unless_it_is_trusted(run: Path, folder: Path, way: str) -> None:
    (folder / "evil.py").write_text("open('ran', 'w').close()\nf = lambda documents: documents\n")
    body, message = CODE[way]
    arguments = write_task(folder, body)
    assert_refused(inl("eval", run, *arguments), 2, message)
    assert not (folder / "ran").exists()
    if way == "function":  # the folder is the working directory while a task's file is read
        assert inl("eval", run, *arguments, "--trust-task-code", "--limit", 1).exit_code == 0
        assert (folder / "ran").exists()


def test_what_lm_eval_cannot_run_is_one_line_that_names_the_task(run: Path, folder: Path) -> None:
    arguments = write_task(folder, "")
    too_many = "--num-fewshot 50: the task brought has fewer solved examples than that"
    assert_refused(inl("eval", run, *arguments, "--num-fewshot", 50), 2, too_many)
    (folder / "rows.jsonl").write_text("")
    assert_refused(inl("eval", run, *arguments), 2, "--tasks brought: the task has no rows")
    os.mkfifo(folder / "pipe.yaml")
    assert_refused(inl("eval", run, *arguments), 4, "pipe.yaml: a FIFO, not a file")


def test_the_folder_of_tasks_is_checked_before_the_model_is_loaded(tmp_path: Path, run: Path) -> None:
    result = inl("eval", run, "--tasks", "mini_choice", "--task-path", tmp_path / "nowhere")
    assert_refused(result, 2, "no such directory")
    assert "using " not in result.stderr


@pytest.mark.slow
def test_an_unknown_task_is_met_with_the_nearest_name(run: Path, folder: Path) -> None:
    result = inl("eval", run, "--tasks", "mini_choic", "--task-path", folder)
    assert_refused(result, 2, "--tasks mini_choic: no such task; did you mean 'mini_choice'?")


def test_without_lm_eval_the_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(inl("eval", run, "--tasks", "mini_choice"), 2, 'pip install "inl[eval]"')
