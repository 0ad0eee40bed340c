"""Scores against a slow reference: one target at a time, in float64, bytes counted by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from inl_core.corpus.dataset import TokenDataset
from inl_core.errors import ArtefactError, RecipeError
from inl_core.inference.evaluate import Evaluation, evaluate, most_iterations
from inl_core.inference.loading import LoadedModel, load_model
from inl_core.inference.texts import default_window, open_default, open_split, open_text
from inl_core.model import IntegratorLanguageModel
from tests.inference.tiny import PRESETS, TEXT, perturb, reseal, tiny_model, tokenizer, write_checkpoint


def loaded_model(preset: str = "v4", **config: object) -> LoadedModel:
    return LoadedModel(tiny_model(preset), tokenizer(), Path("here"), dict(config))


def score(loaded: LoadedModel, path: Path, **windows: int) -> Evaluation:
    batches = open_text(loaded, path).windows(**windows)  # type: ignore[arg-type]
    return evaluate(loaded.model, batches, loaded.tokenizer.token_num_bytes)


@torch.no_grad()
def reference(model: IntegratorLanguageModel, text: str, window: int, stride: int) -> dict[str, float]:
    """loss, bits per byte and accuracy of bos, text, eos: each target from the first window that reaches it."""
    model = model.double()
    ids = [tokenizer().bos_id, *tokenizer().encode(text), tokenizer().eos_id]
    nats, text_nats, correct = 0.0, 0.0, 0
    for target in range(1, len(ids)):
        start = max(0, math.ceil((target - window) / stride)) * stride
        hidden = model(torch.tensor([ids[start:target]])).hidden[0, -1]
        log_probabilities = torch.nn.functional.linear(*model.head_factors(hidden)).log_softmax(-1)
        cost = -log_probabilities[ids[target]].item()
        nats += cost
        text_nats += cost if target < len(ids) - 1 else 0.0  # eos has no bytes
        correct += int(log_probabilities.argmax()) == ids[target]
    number = len(ids) - 1
    bits = text_nats / math.log(2)
    return {"loss": nats / number, "bits_per_byte": bits / len(text.encode()), "accuracy": correct / number}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("window", "stride"), [(32, 32), (32, 5), (16, 16), (64, 1)])
def test_scores_equal_the_slow_reference(tmp_path: Path, preset: str, window: int, stride: int) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT[60:180], encoding="utf-8")
    loaded = loaded_model(preset)
    found = score(loaded, path, window=window, stride=stride, batch_size=4)
    wanted = reference(tiny_model(preset), TEXT[60:180], window, stride)
    assert {name: getattr(found, name) for name in wanted} == pytest.approx(wanted, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(wanted["loss"]), rel=1e-4)
    assert (found.tokens, found.bytes) == (len(tokenizer().encode(TEXT[60:180])) + 1, len(TEXT[60:180].encode()))
    assert found.iterations == most_iterations(loaded.model, None)


def test_a_text_inside_one_window_scores_the_same_at_any_stride(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT[:40])
    scores = [score(loaded_model(), path, window=64, stride=stride).loss for stride in (1, 7, 64)]
    assert scores == pytest.approx([scores[0]] * 3, rel=1e-5)


def test_a_stride_scores_every_token_once(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    number = len(tokenizer().encode(TEXT)) + 1
    for stride in (1, 3, 16):
        assert score(loaded_model(), path, window=16, stride=stride, batch_size=8).tokens == number
    assert score(loaded_model(), path, window=16, stride=16, max_tokens=21).tokens == 21


def test_batches_do_not_change_the_score(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    one, many = (score(loaded_model(), path, window=16, batch_size=size) for size in (1, 9))
    assert one.loss == pytest.approx(many.loss, rel=1e-5)


def test_the_model_is_left_in_the_mode_it_came_in(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a")
    loaded = loaded_model()
    loaded.model.train()
    score(loaded, path, window=16)
    assert loaded.model.training


def test_iterations_and_early_stopping_are_what_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    stopping = {"num_iterations": 6, "early_stopping": {"convergence_threshold": 0.8}}
    loaded = LoadedModel(tiny_model("v4", integrator=stopping), tokenizer(), Path("here"), {})

    def iterations(**options: object) -> float:
        batches = open_text(loaded, path).windows(window=32)
        return evaluate(loaded.model, batches, tokenizer().token_num_bytes, **options).iterations  # type: ignore[arg-type]

    assert iterations(early_stopping=False) == 6
    assert 1 <= iterations() < 6
    assert iterations(num_iterations=3, early_stopping=False) == 3


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ({"window": 65}, "window 65: must be between 1 and the model's context of 64"),
        ({"window": 0}, "window 0"),
        ({"window": 16, "stride": 17}, "stride 17: must be between 1 and the window of 16"),
        ({"window": 16, "stride": 0}, "stride 0"),
    ],
)
def test_impossible_windows_are_refused(tmp_path: Path, windows: dict[str, int], message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a")
    with pytest.raises(RecipeError, match=message):
        score(loaded_model(), path, **windows)


def test_texts_that_cannot_be_scored_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("abc\xe9".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ArtefactError, match=r"latin.txt: not UTF-8 text \(byte 3"):
        open_text(loaded_model(), tmp_path / "latin.txt")
    with pytest.raises(ArtefactError, match=r"empty.txt: is empty"):
        open_text(loaded_model(), tmp_path / "empty.txt")
    with pytest.raises(RecipeError, match=r"none.txt: no such file"):
        open_text(loaded_model(), tmp_path / "none.txt")


def test_the_run_s_own_validation_split_is_found(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    loaded = load_model(Path("runs/v4/checkpoints/step-00000007"))
    text = open_split(loaded)
    assert isinstance(text.source, TokenDataset)
    assert (text.source.directory, text.source.split, text.warnings) == (workplace / "data" / "tiny", "validation", ())
    found = evaluate(loaded.model, text.windows(window=default_window(loaded)), loaded.tokenizer.token_num_bytes)
    assert found.bytes == text.source.num_bytes  # every byte of the split, and no special token's


def test_data_of_another_tokenizer_is_refused(workplace: Path, tmp_path: Path) -> None:
    loaded = load_model(write_checkpoint(tmp_path / "run", "v4"))
    loaded.tokenizer.fingerprint = "another"
    with pytest.raises(ArtefactError, match=r"tiny: encoded by another tokenizer .*300 tokens there, 300 in the model"):
        open_split(loaded, workplace / "data" / "tiny")


def test_other_data_than_the_model_s_is_scored_with_a_warning(workplace: Path, tmp_path: Path) -> None:
    loaded = load_model(write_checkpoint(tmp_path / "run", "v4"))
    (warning,) = open_split(loaded, workplace / "data" / "tiny").warnings
    assert "is not the data the model was trained on" in warning


def test_missing_data_is_named_and_the_default_text_takes_its_place(tmp_path: Path) -> None:
    loaded = load_model(write_checkpoint(tmp_path / "run", "v4"))
    with pytest.raises(ArtefactError, match=r"data/none: the data the model was trained on is not here"):
        open_split(loaded)
    text = open_default(loaded)
    assert "argparse" in text.name
    assert text.num_targets > 10_000


def test_a_checkpoint_loads_as_it_was_saved(tmp_path: Path) -> None:
    for preset in PRESETS:
        path = write_checkpoint(tmp_path / preset, preset)
        loaded, saved = load_model(path), tiny_model(preset)
        assert all(torch.equal(tensor, saved.state_dict()[name]) for name, tensor in loaded.model.state_dict().items())
        ids = torch.tensor([[1, 50, 60]])
        torch.testing.assert_close(loaded.model(ids).hidden, saved(ids).hidden)
        assert (loaded.step, loaded.model.training) == (7, False)


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "v5"])
def test_a_checkpoint_from_before_there_was_a_stream_loads_as_it_was_saved(tmp_path: Path, preset: str) -> None:
    path = write_checkpoint(tmp_path / "run", preset)
    before, values = load_model(path).model.config, json.loads((path / "config.json").read_text())
    assert (values["model"].pop("stream"), values["model"].pop("transport")) == (None, False)
    (path / "config.json").write_text(json.dumps(values))
    reseal(path)
    assert load_model(path).model.config == before


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "run", "v4")
    text = (path / "config.json").read_text().replace('"feedforward_hidden": null', '"feedforward_hidden": 48')
    (path / "config.json").write_text(text)
    reseal(path)
    with pytest.raises(ArtefactError, match=r"model.safetensors: does not fit config.json \(size mismatch"):
        load_model(path)


def test_a_nan_score_is_not_hidden(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("a")
    loaded = loaded_model()
    perturb(loaded.model, 0)
    with torch.no_grad():
        next(loaded.model.norm_final.parameters()).fill_(float("nan"))
    assert math.isnan(score(loaded, path, window=16).loss)
    assert np.isnan(score(loaded, path, window=16).perplexity)
