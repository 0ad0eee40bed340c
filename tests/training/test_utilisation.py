"""Model FLOPs utilisation: which GPU has which peak, and what share of it a run's speed is."""

from dataclasses import replace

import pytest
import torch

from inl_core.model.flops import training_flops
from inl_core.training.distributed import World
from inl_core.training.interruption import StopSignal
from inl_core.training.utilisation import Utilisation, peak_flops, utilisation_of

PEAKS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L400": None,
    "Tesla T4": None,
}


@pytest.mark.parametrize("name", PEAKS)
def test_a_gpu_s_peak_is_found_by_its_name(name):
    assert peak_flops(name) == PEAKS[name]


def test_the_share_is_the_model_s_flops_over_all_gpus_peaks(make_recipe, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    recipe, two = make_recipe(), World(0, 2, torch.device("cuda", 0))
    found = utilisation_of(recipe, 400, two)
    flops = training_flops(recipe.model.with_vocab_size(400), 32)
    assert found is not None
    assert found.of(256, 0.5) == pytest.approx(256 * flops / 0.5 / (2 * 989e12))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU of next year")
    assert utilisation_of(recipe, 400, two) is None
    assert utilisation_of(recipe, 400, replace(two, device=torch.device("cpu"))) is None


def test_a_row_of_metrics_has_it_where_the_peak_is_known(make_recipe, make_trainer, monkeypatch):
    trainer, listener = make_trainer(make_recipe(training={"steps": 4}))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 0)
    stop = StopSignal()
    trainer.model.train()
    trainer.log.device = torch.device("cuda")  # the rows alone are said to be a GPU's
    trainer._train_step(stop)
    trainer.log.utilisation = Utilisation(flops_per_token=10, peak=1000.0)
    trainer._train_step(stop)
    trainer.stepper.close()
    unknown, known = listener.rows
    assert unknown["mfu"] is None
    batch = trainer.settings.batch_tokens
    seconds = (known["tokens"] - unknown["tokens"]) / known["tokens_per_second"]
    assert known["mfu"] == pytest.approx(batch * 10 / seconds / 1000)
