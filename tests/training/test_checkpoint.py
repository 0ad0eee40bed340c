"""What is in a checkpoint: bytes that depend on the weights alone, and the random generators of every rank."""

import hashlib
import os
from dataclasses import dataclass
from typing import Any

import torch

from inl_core.inference.checkpoint_files import list_checkpoints
from inl_core.training.checkpoint import capture_rng, restore_rng
from inl_core.training.distributed import World
from tests.training.conftest import run_python

_SAVES = """
import sys
from pathlib import Path
import torch
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import ModelConfig
from inl_core.training.checkpoint_writing import save_weights

model = IntegratorLanguageModel(ModelConfig(d_model=32, num_layers=2, num_heads=2, vocab_size=50, max_seq_len=16))
model.initialise(0)
save_weights(Path(sys.argv[1]), model, {"config.json": "{}"})
"""


def test_the_same_weights_are_the_same_bytes_in_every_process(tmp_path):
    digests = set()
    for seed in ("1", "2"):
        run = run_python("-c", _SAVES, tmp_path / seed, cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": seed})
        assert run.returncode == 0, run.stderr
        digests.add(hashlib.sha256((tmp_path / seed / "model.safetensors").read_bytes()).hexdigest())
    assert len(digests) == 1


def test_the_same_state_is_the_same_bytes(make_recipe, make_trainer):
    trainer, _ = make_trainer(make_recipe())
    for step in (1, 2):
        trainer.state.step = step
        assert trainer.saver.save(trainer.state)
    one, two = list_checkpoints(trainer.run.checkpoints)
    for name in ("model.safetensors", "training_state/optimizer.safetensors"):
        assert (one / name).read_bytes() == (two / name).read_bytes()


@dataclass(frozen=True)
class Ranks(World):
    """A world whose other ranks said the given things."""

    said: tuple[Any, ...] = ()

    def gather(self, value):
        return [value, *self.said]


def test_every_rank_gets_its_own_random_numbers_back():
    states = [torch.Generator().manual_seed(seed).get_state().tolist() for seed in (1, 1, 2)]
    torch.set_rng_state(torch.tensor(states[0], dtype=torch.uint8))
    world = Ranks(0, 3, torch.device("cpu"), said=tuple({"cpu": state} for state in states[1:]))
    kept = capture_rng(world)
    assert "cpu/1" not in kept  # it has the state of rank 0
    for rank, expected in [(0, 0), (1, 0), (2, 2), (5, 0)]:  # rank 5 is new, and begins like rank 0
        torch.manual_seed(99)
        restore_rng(kept, rank)
        assert torch.get_rng_state().tolist() == states[expected]
