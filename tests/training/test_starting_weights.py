"""A run that begins with other weights than drawn ones: `model.init_from`."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from inl_core.inference.checkpoint_files import file_digest
from inl_core.recipe.load import dump_recipe
from inl_core.training.session import open_session
from tests.damage import flip_a_bit
from tests.training.conftest import MODEL, small_recipe
from tests.training.test_distributed import run_torchrun
from tests.training.test_strategies import assert_alike

ONWARD = {"steps": 3, "seed": 7, "optimizer": {"learning_rate": 1e-3}}


@pytest.fixture(scope="module")
def made(data_directory, tmp_path_factory):
    """A run that has done its 4 steps, and what `inl export` makes of it; not to be changed."""
    base = tmp_path_factory.mktemp("made")
    with open_session(small_recipe(data_directory, training={"steps": 4}), base / "first") as session:
        session.build_trainer(session.open_data()).fit()
    from inl_core.interop.huggingface.export import export  # transformers, which takes seconds to import

    export(base / "first/checkpoints/step-00000004", base / "exported")
    return base


@pytest.fixture
def first(made, inl, tmp_path):
    """A copy of that run."""
    shutil.copytree(made / "first", tmp_path / "first")
    return tmp_path / "first/checkpoints/step-00000004"


def last_weights(run, step=3):
    return load_file(run / f"checkpoints/step-{step:08d}/model.safetensors")


def test_it_is_a_new_run_whose_weights_were_put_there(made, make_recipe, make_trainer, recipe_file, inl, tmp_path):
    checkpoint = made / "first/checkpoints/step-00000004"
    reference, _ = make_trainer(make_recipe(training=ONWARD), "reference")
    reference.model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    reference.fit()
    expected = last_weights(tmp_path / "reference")
    for name, origin in {"run": made / "first", "exported": made / "exported"}.items():
        outcome = inl(
            "train", recipe_file(training=ONWARD, model={"init_from": str(origin)}), "--run-dir", f"of-{name}"
        )
        assert outcome.exit_code == 0, outcome.stderr
        found = last_weights(tmp_path / f"of-{name}")
        assert found.keys() == expected.keys()
        assert all(bool((found[key] == expected[key]).all()) for key in expected)
    config = json.loads((tmp_path / "of-run/checkpoints/step-00000003/config.json").read_text())
    before, begun, trained = config["provenance"]
    digest = file_digest(checkpoint / "manifest.json")
    assert (before["run"], before["step"], trained["run"], trained["step"]) == ("first", 4, "of-run", 3)
    assert begun == {"event": "init", "from": str(checkpoint), "step": 4, "manifest_sha256": digest}
    assert config["model"]["init_from"] is None  # no part of what the model computes
    config = json.loads((tmp_path / "of-exported/checkpoints/step-00000003/config.json").read_text())
    assert config["provenance"][0]["weights_sha256"] == [file_digest(made / "exported/model.safetensors")]
    assert inl("resume", "of-exported", "--steps", 4).exit_code == 0


def test_exported_weights_of_16_bits_are_widened_which_a_line_says(made, recipe_file, inl, tmp_path):
    exported = shutil.copytree(made / "exported", tmp_path / "exported")
    weights = load_file(exported / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, exported / "model.safetensors")
    still = {"steps": 1, "optimizer": {"learning_rate": 1e-30, "weight_decay": 0.0}}
    outcome = inl("train", recipe_file(training=still, model={"init_from": str(exported)}), "--run-dir", "new")
    assert outcome.exit_code == 0, outcome.stderr
    assert "its weights are in bfloat16; the run begins with them widened to float32" in outcome.stderr
    for name, tensor in last_weights(tmp_path / "new", step=1).items():
        torch.testing.assert_close(tensor, weights[f"model.{name}"].bfloat16().float(), rtol=0, atol=1e-20)


def test_weights_of_another_preset_are_refused_before_anything_is_written(first, recipe_file, inl, tmp_path):
    refused = inl("train", recipe_file(model={"preset": "transformer", "init_from": str(first)}), "--run-dir", "new")
    assert refused.exit_code == 2
    assert "its weights do not fit the recipe: model.preset (v5, not transformer)" in refused.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("changes", "code", "expected"),
    [
        ({"model.d_model": 64}, 2, "do not fit the recipe: model.d_model (32, not 64)"),
        ({"model.init_from": "nowhere"}, 4, "model.init_from nowhere: no such run or checkpoint"),
        ({"model.init_from": "pipe"}, 4, "model.init_from pipe: is a file, not a run or a checkpoint"),
        ({"model.init_from": "first/weights.safetensors"}, 2, "inl import-reference first/weights.safetensors"),
        ({"model.init_from": "adapter"}, 2, "model.init_from adapter: holds an adapter of peft"),
        ({"data.tokenizer.vocab_size": 300, "data.directory": "other"}, 4, "first/checkpoints/step-00000004/tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(first, recipe_file, inl, changes, code, expected):
    overrides = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    os.mkfifo("pipe")
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").touch()
    refused = inl("train", recipe_file(model={"init_from": "first"}), "--run-dir", "new", *overrides)
    assert refused.exit_code == code, refused.stderr
    assert expected in refused.stderr
    branched = inl("train", recipe_file(model={"init_from": "first"}), "--branch-from", "first", "--run-dir", "new")
    assert branched.exit_code == 2
    assert "--set model.init_from=null" in branched.stderr


def test_a_run_directory_that_is_a_link_to_nothing_is_refused(recipe_file, inl, tmp_path):
    (tmp_path / "gone").symlink_to("nowhere")
    refused = inl("train", recipe_file(), "--run-dir", "gone")
    assert (refused.exit_code, refused.stderr.count("gone: a link that leads nowhere")) == (2, 1), refused.stderr


def test_damaged_and_foreign_weights_are_refused(made, first, recipe_file, inl, tmp_path):
    flip_a_bit(first / "model.safetensors")
    damaged = inl("train", recipe_file(model={"init_from": str(first)}), "--run-dir", "new")
    assert damaged.exit_code == 4
    assert "checksum" in damaged.stderr
    for name, config in {"llama": {"model_type": "llama"}, "missing": None}.items():
        directory = tmp_path / name
        shutil.copytree(made / "exported", directory)
        if config:
            (directory / "config.json").write_text(json.dumps(config))
        weights = load_file(directory / "model.safetensors")
        save_file({key: weights[key] for key in list(weights)[1:]}, directory / "model.safetensors")
        refused = inl("train", recipe_file(model={"init_from": str(directory)}), "--run-dir", f"of-{name}")
        expected = "--format inl" if config else f"{next(iter(weights))} is missing"
        assert refused.exit_code == (2 if config else 4), refused.stderr
        assert expected in refused.stderr
        assert refused.stderr.count("\n") < 12


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_processes_begin_with_the_same_weights(made, make_recipe, tmp_path, inl, strategy):
    training = ONWARD | {"distributed": {"strategy": strategy}}
    recipe = make_recipe(training=training, model=MODEL | {"init_from": made / "first"})
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe))
    assert inl("train", "recipe.yaml", "--run-dir", "alone").exit_code == 0
    outcome = run_torchrun(2, ["-m", "inl_cli", "train", "recipe.yaml", "--run-dir", "both"], tmp_path)
    assert outcome.returncode == 0, outcome.stderr
    assert_alike(tmp_path / "alone", tmp_path / "both")
