"""The documents' snippets, run as they stand but for the import line.

- A snippet's text is the document's, comments left out where they are not ASCII. `run` changes the import lines, which
  a reader of the documents must change too, and whatever else a test names: dimensions that need more memory or time
  than a test may take. Where that is so, the snippet's own dimensions also run, on the meta device (shapes, no memory).
- Document 002's one-line fragments leave out hidden_dim, which has no default; the test adds it.
"""

import sys
from collections.abc import Mapping

import pytest
import torch

import inl_core
from inl_core import IntegratorNeuronLayer

DOC_000_USAGE = """
from inl_llm_v3 import UltraOptimizedIntegratorLanguageModel

model = UltraOptimizedIntegratorLanguageModel(
    vocab_size=50261,
    d_model=3072,
    num_layers=32,
    num_heads=24,
    num_kv_heads=6,        # GQA: 4 Q heads per KV head
    num_iterations_per_layer=2,
    feedforward_dim=12288,
    max_seq_len=4096,
    # All optimizations enabled by default
)

# Forward pass
logits, aux_info, cache = model(input_ids, use_cache=True, return_aux=True)

# Generation with KV cache
output_ids = model.generate(
    input_ids,
    max_new_tokens=100,
    temperature=0.8,
    top_p=0.9,
    use_cache=True  # 3x faster!
)
"""

DOC_001_BASIC_USAGE = """
import sys
sys.path.insert(0, '/path/to/vAgent/architecture')

from inl_llm import create_model
import torch

# Create model with ALL optimizations (Level 1 + 2) enabled by default
model = create_model(
    size='5B',  # Available: 'small' (30M), 'medium' (80M), '2B', '5B', '10B'
    vocab_size=50000
)

# Forward pass
input_ids = torch.randint(0, 50000, (2, 128))
logits, _ = model(input_ids)

# Generation
output = model.generate(
    input_ids,
    max_new_tokens=100,
    temperature=0.8,
    top_p=0.9
)
"""

DOC_001_TRAINING_LOOP = """
from inl_llm import create_model
from inl_llm.core import IntegratorLoss, create_cycle_scheduler
import torch.optim as optim

# Create model (all optimizations enabled by default)
model = create_model(size='medium', vocab_size=50000)

# Training components
loss_fn = IntegratorLoss(variance_weighted=True)
optimizer = optim.AdamW(model.parameters(), lr=3e-4)
scheduler = create_cycle_scheduler(preset='balanced')

# Training loop
for epoch in range(100):
    # Update phase (equilibrium vs exploration)
    phase_info = scheduler.step(epoch)
    loss_fn.set_exploration_phase(phase_info['is_exploration'])

    for batch in dataloader:
        input_ids, targets = batch

        # Forward
        logits, trajectory = model(input_ids, return_aux=True)

        # Compute loss
        losses = loss_fn(
            predictions=logits,
            targets=targets,
            trajectory=trajectory,
            epoch=epoch
        )

        # Backward
        optimizer.zero_grad()
        losses['total'].backward()
        optimizer.step()
"""

DOC_002_OPTIMIZED = """
from integrator_language_model_optimized import create_optimized_model

# Create optimized model with all efficiency improvements
model = create_optimized_model(
    size='medium',  # 'small', 'medium', 'large', 'xlarge', '3B', '7B', '13B'
    vocab_size=50000,
    enable_all_optimizations=True  # Enables all 3 optimizations
)
"""

DOC_002_TRAINING = """
from integrator_neuron_layer import IntegratorModel
from integrator_losses import IntegratorLoss
from integrator_scheduler_v2 import create_cycle_scheduler
import torch.optim as optim

# 1. Create model (all features enabled by default)
model = IntegratorModel(
    input_dim=512,
    hidden_dim=768,
    num_iterations=10,
    # Defaults: learnable_mu=True, dynamic_alpha=True,
    #           excitation_amplitude=0.03
)

# 2. Create loss (variance weighting enabled)
loss_fn = IntegratorLoss(
    target_value=5.0,
    variance_weighted=True,  # default
    lambda_mean_init=1.0,
    lambda_energy=0.01
)

# 3. Setup cycle scheduler
scheduler = create_cycle_scheduler(preset='balanced')

# 4. Optimizer
optimizer = optim.AdamW(model.parameters(), lr=3e-4)

# 5. Training loop
for epoch in range(scheduler.get_total_epochs()):

    # Update training phase
    phase_info = scheduler.step(epoch)
    loss_fn.set_exploration_phase(phase_info['is_exploration'])

    # Update model excitation amplitude
    if hasattr(model, 'inl'):
        model.inl.excitation_amplitude = phase_info['excitation_amplitude']

    # Train epoch
    for batch in dataloader:
        inputs, targets = batch

        # Forward with trajectory tracking
        outputs, trajectory = model(inputs, return_trajectory=True)

        # Get learned equilibrium for loss
        learned_mu = model.get_learned_mu()

        # Compute losses
        losses = loss_fn(
            predictions=outputs,
            targets=targets,
            trajectory=trajectory,
            epoch=epoch,
            learned_mu=learned_mu
        )

        # Backward
        optimizer.zero_grad()
        losses['total'].backward()
        optimizer.step()

        # Log
        print(f"Phase: {phase_info['phase_name']}, Loss: {losses['total'].item():.4f}")
"""

DOC_002_METRICS = """
from integrator_losses import compute_convergence_metrics

metrics = compute_convergence_metrics(
    x_trajectory=trajectory['x'],
    target_value=model.inl.mu.mean().item()
)
"""

DOC_002_SCHEDULERS = """
from integrator_scheduler_v2 import create_cycle_scheduler

# Three presets available
scheduler = create_cycle_scheduler(preset='balanced')
# Options: 'conservative', 'balanced', 'aggressive'

# Or custom:
scheduler = create_cycle_scheduler(
    equilibrium_config={
        'lambda_mean': 0.5,
        'excitation_amplitude': 0.0,
        'duration_epochs': 10
    },
    exploration_config={
        'lambda_mean': 0.05,
        'excitation_amplitude': 0.05,
        'duration_epochs': 20
    },
    num_cycles=5,
    warmup_epochs=10
)
"""

DOC_002_SWITCHES = """
from integrator_language_model_optimized import OptimizedIntegratorLanguageModel

model = OptimizedIntegratorLanguageModel(
    vocab_size=50000,
    d_model=2048,
    num_layers=24,
    # Enable/disable specific optimizations
    use_lowrank_embeddings=True,      # Default: True
    use_gradient_checkpointing=True,  # Default: False (enable for large models)
    use_adaptive_stopping=True,       # Default: True
    lowrank_ratio=0.125,              # Rank = d_model * 0.125
    convergence_threshold=0.01        # Early stopping threshold
)
"""

THEIR_MODULES = (
    "inl_llm_v3",
    "inl_llm.core",
    "inl_llm",
    "integrator_language_model_optimized",
    "integrator_neuron_layer",
    "integrator_losses",
    "integrator_scheduler_v2",
)


def run(snippet: str, given: Mapping[str, object] | None = None, changes: Mapping[str, str] | None = None) -> dict:
    """Execute a snippet with our import lines and `changes` to its text, and return its variables."""
    for module in THEIR_MODULES:
        snippet = snippet.replace(f"from {module} import", "from inl_core import")
    for old, new in (changes or {}).items():
        assert snippet.count(old) == 1, old
        snippet = snippet.replace(old, new)
    names = dict(given or {})
    exec(snippet, names)
    return names


def before(heading: str, snippet: str) -> str:
    """The snippet up to one of its comments."""
    head, found, _ = snippet.partition(heading)
    assert found, heading
    return head


@pytest.fixture(autouse=True)
def _unchanged_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_doc_000_usage_with_smaller_dimensions_and_fewer_tokens():
    ids = torch.randint(0, 50261, (2, 16), generator=torch.Generator().manual_seed(0))
    smaller = {
        "d_model=3072": "d_model=192",
        "num_layers=32": "num_layers=2",
        "feedforward_dim=12288": "feedforward_dim=768",
        "max_seq_len=4096": "max_seq_len=256",
        "max_new_tokens=100": "max_new_tokens=10",
    }
    found = run(DOC_000_USAGE, {"input_ids": ids}, smaller)
    assert found["logits"].shape == (2, 16, 50261)
    assert found["output_ids"].shape == (2, 26)
    assert torch.equal(found["output_ids"][:, :16], ids)
    assert found["cache"].length == 16
    assert len(found["aux_info"]["x"]) == 2
    assert found["model"].config.preset == "v3"


def test_doc_000_usage_with_its_own_dimensions_without_memory():
    with torch.device("meta"):
        # Without values there is nothing to sample from, so the snippet ends before it generates.
        found = run(before("# Generation", DOC_000_USAGE), {"input_ids": torch.zeros(2, 16, dtype=torch.long)})
    assert found["logits"].shape == (2, 16, 50261)
    assert [x.shape for x in found["aux_info"]["x"]] == [(2, 16, 3, 3072)] * 32
    assert found["model"].config.rank == 384


def test_doc_001_basic_usage_with_the_small_size_and_fewer_tokens():
    found = run(DOC_001_BASIC_USAGE, changes={"size='5B'": "size='small'", "max_new_tokens=100": "max_new_tokens=10"})
    assert found["logits"].shape == (2, 128, 50000)
    assert found["output"].shape == (2, 138)
    assert torch.equal(found["output"][:, :128], found["input_ids"])


def test_doc_001_basic_usage_builds_its_own_size_without_memory():
    # A forward pass through 32 layers of 10 iterations takes seconds even without memory; the test above has run one.
    with torch.device("meta"):
        config = run(before("# Forward pass", DOC_001_BASIC_USAGE))["model"].config
    assert (config.d_model, config.num_layers, config.rank, config.preset) == (4096, 32, 512, "v2")
    assert config.integrator.controller.shared
    assert config.integrator.mu.form == "hierarchical"
    assert config.integrator.excitation.sparsity == 0.1


def test_doc_001_training_loop_with_fewer_epochs_and_layers():
    # medium is 768x12 with 7 iterations, and the loop has 100 epochs: hours here. All else is the document's.
    ids = torch.randint(0, 50000, (4, 9), generator=torch.Generator().manual_seed(0))
    seen = []
    smaller = {
        "range(100)": "range(17, 23)",  # from equilibrium into exploration
        "size='medium', vocab_size=50000": "size='medium', vocab_size=50000, num_layers=2, num_iterations_per_layer=3",
        "        optimizer.step()\n": "        optimizer.step()\n        seen.append((phase_info, losses))\n",
    }
    found = run(DOC_001_TRAINING_LOOP, {"dataloader": [(ids[:, :-1], ids[:, 1:])], "seen": seen}, smaller)
    assert [phase["phase_name"] for phase, _ in seen] == ["equilibrium"] * 3 + ["exploration"] * 3
    assert [losses["lambda_mean"].item() for _, losses in seen] == pytest.approx([0.5] * 3 + [0.05] * 3)
    task = [losses["task"].item() for _, losses in seen]
    assert task == sorted(task, reverse=True), task
    assert all(losses["L_mean"] > 0 and losses["L_speed"] > 0 and losses["L_energy"] > 0 for _, losses in seen)
    assert found["trajectory"]["x"][0].shape == (4, 8, 4, 768)


def test_doc_002_optimized_model_as_it_stands():
    with torch.device("meta"):
        model = run(DOC_002_OPTIMIZED)["model"]
    assert model.config.rank == 96
    assert model.config.integrator.early_stopping.convergence_threshold > 0
    assert "forward" in vars(model.model.blocks[0]), "blocks are computed again in the backward pass"


def test_doc_002_switches_as_they_stand():
    with torch.device("meta"):
        model = run(DOC_002_SWITCHES)["model"]
    embedding = sum(parameter.numel() for parameter in model.model.embedding.parameters())
    assert embedding == (50000 + 2048) * 256  # the document's 102M -> 13.3M
    assert model.config.integrator.early_stopping.convergence_threshold == 0.01


def some_regression(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs (N, 512) that mix 4 factors, and a smooth function of two of them around the documents' 5, (N, 1)."""
    mixing = torch.randn(4, 512, generator=torch.Generator().manual_seed(0)) / 2
    factors = torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed))
    targets = 5 + torch.sin(factors[:, :1]) + 0.5 * factors[:, 1:2]
    return factors @ mixing, targets


def test_doc_002_training_and_metrics_as_they_stand(capsys):
    inputs, targets = some_regression(128, seed=1)
    found = run(DOC_002_TRAINING, {"dataloader": [(inputs, targets)]})
    lines = capsys.readouterr().out.splitlines()
    phases = [line.split(",")[0].removeprefix("Phase: ") for line in lines]
    assert phases == ["warmup"] * 10 + (["equilibrium"] * 10 + ["exploration"] * 20) * 5
    model = found["model"].eval()
    held_out, wanted = some_regression(256, seed=2)
    of_the_mean = (wanted - targets.mean()).square().mean().item()
    error = (model(held_out) - wanted).square().mean().item()
    assert error < 0.25 * of_the_mean
    assert model.inl.excitation_amplitude == pytest.approx(0.05), "the last phase explores"
    metrics = run(DOC_002_METRICS, found)["metrics"]
    assert list(metrics) == ["time_to_converge", "final_rmse", "final_mean", "final_std", "fraction_converged"]
    assert metrics["final_mean"] == pytest.approx(found["trajectory"]["x"][:, -1].mean().item(), rel=1e-5)


def test_doc_002_schedulers_as_they_stand():
    custom, preset = run(DOC_002_SCHEDULERS)["scheduler"], inl_core.create_cycle_scheduler("balanced")
    assert custom.get_total_epochs() == preset.get_total_epochs() == 160
    assert [custom.step(epoch) for epoch in range(160)] == [preset.step(epoch) for epoch in range(160)]


@pytest.mark.parametrize(
    "arguments",
    [
        "learnable_mu=True, mu_adaptation_rate=1e-4",
        "excitation_amplitude=0.03",
        "dynamic_alpha=True, alpha_kappa=1.0",
    ],
)
def test_doc_002_fragments_with_the_hidden_dim_they_leave_out(arguments):
    layer = eval(f"IntegratorNeuronLayer(hidden_dim=8, {arguments})", {"IntegratorNeuronLayer": IntegratorNeuronLayer})
    default = IntegratorNeuronLayer(8)
    assert layer.config == default.config, "each fragment shows a default"
