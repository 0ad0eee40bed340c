"""`inl check` passes on what is right, and fails, naming the place, on what is damaged on purpose."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from inl_cli.app import app
from inl_core.analysis.checks.resume import FEWEST_STEPS, compare_tensors
from inl_core.model.attention import KVCache
from tests.damage import cut_in_half, flip_a_bit, remove
from tests.inference.tiny import reseal, write_checkpoint
from tests.training.conftest import data_directory, make_recipe, recipe_file, run_python

__all__ = ["data_directory", "make_recipe", "recipe_file"]


def inl(*arguments: object):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def ways(result) -> dict[str, dict]:
    return {way["name"]: way for way in json.loads(result.stdout)["ways"]}


@pytest.mark.parametrize("preset", ["v3", "v5", "transformer"])
def test_every_way_of_computing_logits_is_within_rounding(workplace, tmp_path, preset):
    work = tmp_path / "work"
    done = inl("check", "equivalence", workplace / "runs" / preset, "--no-compile", "--json", "--work-dir", work)
    assert done.exit_code == 0, done.stderr
    found = ways(done)
    assert [name for name, way in found.items() if way["left_out"]] == ["compiled", "compiled cached"]
    assert all(0 <= way["difference"] < 1e-5 for way in found.values() if not way["left_out"])
    assert found["recomputed gradient"]["difference"] == 0
    assert sorted(path.name for path in work.iterdir()) == ["exported", "saved"]


def test_an_export_that_computes_something_else_is_found(workplace, monkeypatch):
    from inl_core.interop.huggingface import export as exporting

    compare = exporting.compare_logits
    monkeypatch.setattr(
        exporting,
        "compare_logits",
        lambda own, exported: replace(compare(own, exported), padded=1.0, largest_logit=4.0),
    )
    done = inl("check", "equivalence", workplace / "runs" / "v5", "--no-compile", "--json", "--tokens", 16)
    assert done.exit_code == 1
    assert ways(done)["exported"]["difference"] == 0.25
    assert done.stderr.splitlines()[-1].endswith("beyond rounding: exported")


def test_without_transformers_the_export_is_left_out(workplace, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = inl("check", "equivalence", workplace / "runs" / "v5", "--no-compile", "--json", "--tokens", 16)
    assert done.exit_code == 0
    assert ways(done)["exported"]["left_out"] == "transformers is not installed"


def test_a_tolerance_that_rounding_exceeds_fails(workplace):
    done = inl("check", "equivalence", workplace / "runs" / "v4", "--no-compile", "--tolerance", 0, "--tokens", 16)
    assert done.exit_code == 1
    assert "beyond rounding" in done.stderr.splitlines()[-1]


def test_a_cached_path_that_is_broken_is_found(workplace, monkeypatch):
    """Tokens after the prompt are put one slot too early, so that one of the prompt's is lost."""
    new_slots = KVCache.new_slots
    monkeypatch.setattr(KVCache, "new_slots", lambda self, count: new_slots(self, count) - int(self.length == 32))
    done = inl("check", "equivalence", workplace / "runs" / "v5", "--no-compile", "--json")
    assert done.exit_code == 1
    broken = ["cached", "chunked", "padded", "exported"]  # the export has the same cache
    assert [name for name, way in ways(done).items() if not way["passed"]] == broken
    assert done.stderr.splitlines()[-1].endswith(f"beyond rounding: {', '.join(broken)}")


def test_recomputation_that_is_broken_is_found(workplace, monkeypatch):
    from inl_core.training import execution

    monkeypatch.setattr(execution, "checkpoint", lambda forward, *given, **kwargs: _twice(forward(*given)))
    done = inl("check", "equivalence", workplace / "runs" / "v5", "--no-compile", "--json")
    assert done.exit_code == 1
    assert [name for name, way in ways(done).items() if not way["passed"]] == ["recomputed", "recomputed gradient"]


def _twice(output):
    return tuple(tensor * 1.001 for tensor in output)


@pytest.mark.slow
def test_compiled_ways_are_compared_too(workplace):
    done = inl("check", "equivalence", workplace / "runs" / "v5", "--json", "--tokens", 16)
    assert done.exit_code == 0, done.stderr
    assert all(way["passed"] for way in ways(done).values())


def another_weight(path: Path, change) -> None:
    """Change model.safetensors, and make the manifest fit it, as if it had been saved so."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")
    reseal(path)


DAMAGES = {
    "a bit": (lambda path: flip_a_bit(path / "training_state" / "optimizer.safetensors"), "optimizer.safetensors"),
    "a length": (lambda path: cut_in_half(path / "model.safetensors"), "truncated"),
    "no manifest": (lambda path: remove(path / "manifest.json"), "manifest.json"),
    "infinity": (lambda path: another_weight(path, lambda t: t["norm_final.weight"].fill_(torch.inf)), "norm_final"),
    "a tensor of another shape": (
        lambda path: another_weight(path, lambda t: t.update({"norm_final.weight": torch.ones(5)})),
        "norm_final.weight has the shape",
    ),
    "a tensor too few": (lambda path: another_weight(path, lambda t: t.pop("norm_final.weight")), "is missing"),
}


def test_a_checkpoint_is_checked_file_by_file(tmp_path):
    good = write_checkpoint(tmp_path / "run", "v5")
    done = inl("check", "checkpoint", tmp_path / "run", "--json")
    assert done.exit_code == 0, done.stderr
    (found,) = json.loads(done.stdout)["checkpoints"]
    parts = ["files", "model.safetensors", "tokenizer.json", "recipe.yaml"]
    assert [what for what, _ in found["passed"]] == parts
    for name, (damage, told) in DAMAGES.items():
        bad = Path(shutil.copytree(good, tmp_path / name.replace(" ", "-") / good.name))
        damage(bad)
        done = inl("check", "checkpoint", bad, "--quiet")
        assert done.exit_code == 4, name
        assert told in done.stderr, (name, done.stderr)
        assert len(done.stderr.strip().splitlines()) == 1, name


def test_all_checkpoints_of_a_run_are_checked(tmp_path):
    for step in (7, 8, 9):
        write_checkpoint(tmp_path / "run", "v4", step=step)
    flip_a_bit(tmp_path / "run" / "checkpoints" / "step-00000008" / "model.safetensors")
    done = inl("check", "checkpoint", tmp_path / "run")
    assert done.exit_code == 4
    assert [line.rpartition("/")[2] for line in done.stderr.splitlines() if "reading" in line] == [
        f"step-0000000{step}" for step in (7, 8, 9)
    ]
    assert "step-00000008/model.safetensors" in done.stderr.splitlines()[-1]
    assert inl("check", "checkpoint", tmp_path / "none").exit_code == 4


def test_the_first_tensor_that_differs_is_named(tmp_path):
    one = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(0.0), "c": torch.tensor([torch.nan, 1.0])}
    paths = [tmp_path / name for name in ("one", "two")]
    save_file(one, paths[0])

    def difference(**changes) -> str | None:
        save_file({**one, **changes}, paths[1])
        found = compare_tensors("weights", *paths)
        assert found.compared == 3
        return found.difference

    assert difference() is None
    assert difference(b=torch.tensor(-0.0)) is not None
    changed = one["a"].clone()
    changed[1, 1] += 0.5
    assert difference(a=changed, b=torch.tensor(1.0)) == "a differs in 1 of 6 numbers, by up to 0.5"
    assert "shape" in (difference(a=torch.zeros(3, 2)) or "")
    assert difference(d=torch.zeros(1)) == "d is in one of them alone"


def test_too_few_steps_and_a_work_directory_in_use_are_refused(recipe_file, tmp_path):
    few = inl("check", "resume", recipe_file(), "--steps", FEWEST_STEPS - 1)
    assert few.exit_code == 2
    assert "--steps 5" in few.stderr
    taken = inl("check", "resume", recipe_file(), "--work-dir", tmp_path)
    assert taken.exit_code == 2
    assert "--work-dir" in taken.stderr


# What a process runs when it starts (`sitecustomize`): a training that is not the same when it is resumed, or at all.
HOOKS = {
    "a moment is lost": """
import inl_core.training.trainer as trainer
load = trainer.load_checkpoint
def load_and_lose(path, model, optimizers, *given):
    state = load(path, model, optimizers, *given)
    optimizers.parts[0].state[optimizers.parts[0].param_groups[0]["params"][0]]["exp_avg"].zero_()
    return state
trainer.load_checkpoint = load_and_lose
""",
    "updates are random": """
import os
from inl_core.training.optimizers import Optimizers
step = Optimizers.step
def step_and_scatter(self):
    step(self)
    for group in self.parts[0].param_groups:
        for parameter in group["params"]:
            parameter.data.mul_(1 + int.from_bytes(os.urandom(2), "little") / 2**26)
Optimizers.step = step_and_scatter
""",
}


def check_resume(recipe: Path, cwd: Path, monkeypatch, *more: object, hook: str | None = None):
    hooks = cwd / "hooks"
    hooks.mkdir(exist_ok=True)
    if hook:
        (hooks / "sitecustomize.py").write_text(f"import sys\nif 'session' in sys.orig_argv:\n    exec({hook!r})\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(hooks), *filter(None, sys.path)]))
    return run_python("-m", "inl_cli", "check", "resume", recipe, "--json", *more, cwd=cwd)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_recipe_that_resumes_exactly_passes_and_nothing_is_left_behind(recipe_file, tmp_path, monkeypatch, processes):
    done = check_resume(recipe_file(), tmp_path, monkeypatch, "--processes", processes)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["passed"]
    assert len(told["sessions"]) == 3
    compared = {one["what"]: one["compared"] for one in told["comparisons"]}
    assert compared["model.safetensors"] > 20
    assert compared["training_state/optimizer.safetensors"] > 60
    assert compared["rows of metrics"] >= 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hooks", "recipe.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("name", HOOKS)
def test_a_training_that_does_not_resume_exactly_fails_and_names_a_tensor(recipe_file, tmp_path, monkeypatch, name):
    done = check_resume(recipe_file(), tmp_path, monkeypatch, hook=HOOKS[name])
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert not told["passed"]
    differing = {one["what"]: one["difference"] for one in told["comparisons"] if one["difference"]}
    assert " differs in " in differing["model.safetensors"]
    assert differing["rows of metrics"].startswith("step ")
    assert "a resumed run is not the run that never stopped" in done.stderr.splitlines()[-1]
