"""Each part of a compiled model is compiled once for training and once for evaluation, whatever a run does."""

import os
import signal
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from inl_core.errors import Interrupted
from inl_core.kernels import compilation
from inl_core.model import IntegratorLanguageModel
from inl_core.recipe import ModelConfig, TrainingSettings
from inl_core.training.execution import prepare_model
from inl_core.training.interruption import StopSignal

EVERYTHING = {
    "steps": 4,
    "compile": True,
    "evaluation": {"every": 3, "final_tokens": 256},
    "logging": {"every": 1, "dynamics_every": 2},
}


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, str]]]:
    """Which parts are compiled, and for what, by a compiler that traces and guards as torch's own does, but runs each
    graph as it is."""
    kinds: list[tuple[str, str]] = []

    class Counted(compilation._Kind):
        def __init__(self, method: Any, purpose: str, **options: Any) -> None:
            super().__init__(method, purpose, **options)
            kinds.append((method.__qualname__, purpose))

    torch._dynamo.reset()
    monkeypatch.setattr(compilation, "_Kind", Counted)
    monkeypatch.setattr(compilation, "generate_code", lambda graph, inputs: graph.forward)
    yield kinds
    torch._dynamo.reset()


LAYERS = {"num_layers": 3, "max_seq_len": 32, "d_model": 48, "num_heads": 2}  # no width is the length of a window
GROUPS = {"mu": {"group_size": 8}}
LOSSES = {"lambda_mean": 0.1, "lambda_speed": 0.1, "lambda_energy": 0.1}
CYCLE = {"num_cycles": 1, "warmup_epochs": 0}
RUNS: dict[str, dict[str, Any]] = {
    "v1": {"model": {"preset": "v1"}},
    "v3, whose budget moves": {"model": {"preset": "v3", "integrator": GROUPS}},
    "v5": {"model": {"preset": "v5"}},
    "plain transformer, no document mask": {
        "model": {"preset": "transformer"},
        "data": {"document_mask": False},
        "training": {"operations": "plain"},
    },
    "all at once": {
        "model": {"preset": "v4", "num_layers": 12, "integrator": {"num_iterations": 3}},
        "training": {"min_iterations": 1, "cycle": CYCLE, "losses": LOSSES, "micro_batch_size": 4},
    },
}
MORE_RUNS: dict[str, dict[str, Any]] = {
    "transformer": {"model": {"preset": "transformer"}},
    "no document mask": {"model": {"preset": "v4"}, "data": {"document_mask": False}},
    "v2": {"model": {"preset": "v2", "integrator": GROUPS}},
    "v4": {"model": {"preset": "v4"}},
    "v5 recomputed, no document mask": {
        "model": {"preset": "v5"},
        "data": {"document_mask": False},
        "training": {"recomputation": "block"},
    },
    "v5 in bfloat16": {"model": {"preset": "v5"}, "training": {"operations": "plain", "precision": "bf16"}},
    "transport": {"model": {"preset": "transformer", "transport": True}},
    "iterations of each layer": {"model": {"preset": "v4", "integrator": {"iterations_per_layer": (1, 3, 2)}}},
    "a learned budget": {
        "model": {"preset": "v4", "integrator": {"num_iterations": 3, "budget": {"strategy": "learned"}}}
    },
    "recomputed blocks": {"model": {"preset": "v4"}, "training": {"recomputation": "block"}},
    "recomputed integrators": {"model": {"preset": "v4"}, "training": {"recomputation": "integrator"}},
    "plain operations": {"model": {"preset": "v4"}, "training": {"operations": "plain"}},
    "plain operations in bfloat16": {
        "model": {"preset": "v4"},
        "training": {"operations": "plain", "precision": "bf16"},
    },
    "plain operations, v3": {"model": {"preset": "v3", "integrator": GROUPS}, "training": {"operations": "plain"}},
    "early stopping": {"model": {"preset": "v4", "integrator": {"early_stopping": {"convergence_threshold": 0.01}}}},
    "experts": {"model": {"preset": "v4", "integrator": {"controller": {"experts": 2}}}},
    "twelve layers of v3": {"model": {"num_layers": 12, "preset": "v3", "integrator": GROUPS}},
}
CASES = [
    *(pytest.param(changes, id=name) for name, changes in RUNS.items()),
    *(pytest.param(changes, id=name, marks=pytest.mark.slow) for name, changes in MORE_RUNS.items()),
]


@pytest.mark.parametrize("changes", CASES)
def test_a_run_compiles_nothing_twice(compiled, changes, make_recipe, make_trainer):
    """Training, records of the dynamics, evaluations, and training again."""
    training = EVERYTHING | changes.get("training", {})
    recipe = make_recipe(model=LAYERS | changes.get("model", {}), training=training, data=changes.get("data", {}))
    trainer, _ = make_trainer(recipe)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* is compiled for")
        trainer.fit()
    found = Counter(compiled)
    begins = "Block.enter" if recipe.model.integrator else "StreamBlock.forward"
    assert {(begins, "training"), (begins, "evaluation")} <= set(found)
    # The records' passes know of documents and evaluations do not: torch's own attention has a mask then, and transport
    # a tensor that says where documents begin, which are other kinds than without them.
    is_told = trainer.run.operations["attention"].way == "torch" or bool(recipe.model.transport)
    has_two = is_told and recipe.data.document_mask
    assert found.pop((begins, "evaluation")) <= (2 if has_two else 1)
    assert set(found.values()) == {1}


@pytest.mark.usefixtures("compiled")
def test_a_second_compilation_is_warned_of():
    config = {"preset": "v4", "d_model": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 20, "max_seq_len": 32}
    model = IntegratorLanguageModel(ModelConfig.model_validate(config))
    model.initialise(0)
    prepare_model(model, TrainingSettings(steps=1, compile=True, operations="plain"), bf16=False)
    model(torch.zeros(2, 32, dtype=torch.long))
    with pytest.warns(RuntimeWarning, match=r"Block\.enter is compiled for training again, number 2: "):
        model(torch.zeros(3, 16, dtype=torch.long))  # training is compiled for one shape


@pytest.mark.parametrize("number", [1, 2], ids=["training", "evaluation"])
def test_a_signal_during_compilation_is_not_kept_waiting(monkeypatch, make_recipe, make_trainer, number):
    trainer, _ = make_trainer(make_recipe(model={"preset": "v5"}, training={"compile": True, "operations": "plain"}))
    before, began = signal.getsignal(signal.SIGTERM), []

    def generate_code(graph, inputs):
        began.append(number)
        if len(began) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return graph.forward

    monkeypatch.setattr(compilation, "generate_code", generate_code)
    try:
        with pytest.raises(Interrupted, match="SIGTERM"), StopSignal() as stop:
            trainer.fit(stop)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(began) == number
    assert trainer.state.step == 0
