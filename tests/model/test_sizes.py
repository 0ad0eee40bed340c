"""Parameter counts of every generation at every size of the documents, counted by hand from the equations."""

import math

import pytest

from inl_core.analysis.planning import count_parameters, meta_model
from inl_core.recipe import ModelConfig
from inl_core.recipe.sizes import SIZES, find_size

PRESETS = ("v1", "v2", "v3", "v4", "v5", "transformer")
VOCABULARY = 50_000
GELU, SWIGLU = 2, 3  # matrices of a feed-forward
MODERN = {"v3", "v4", "v5", "transformer"}


def by_hand(preset: str, d: int, layers: int) -> dict[str, int]:
    """What docs/model.md, "The generations", says of a preset, without reading the configuration that is tested."""
    c, rank = 64, max(64, d // 8)
    bias = 0 if preset in MODERN else 1
    kv = d // 4 if preset in MODERN else d  # four queries to one key
    two_thirds = 4 * d * 2 // 3
    up_16 = math.ceil(two_thirds / 16) * 16
    hidden = {"v3": two_thirds, "v4": two_thirds // 64 * 64, "v5": up_16, "transformer": up_16}.get(preset, 4 * d)
    norm = d * (1 + bias)
    norms_in_a_block = {"v4": 2, "v5": 2, "transformer": 2}.get(preset, 3)
    groups = 3 if preset == "v4" else 4
    controller = 3 * d * c + c + groups * d * c  # W_h, W_x, W_v with b_h, and W_out
    excited = {"v1": d, "v4": d}.get(preset, max(1, d // 10))
    counts = {
        "embedding": VOCABULARY * rank + rank * d if preset in ("v2", "v3") else VOCABULARY * d,
        "attention": layers * (2 * d * d + 2 * d * kv + bias * (2 * d + 2 * kv)),
        "feed-forward": layers * ((SWIGLU if preset in MODERN else GELU) * d * hidden + bias * (hidden + d)),
        "norms and gains": norm + layers * (norms_in_a_block * norm + (d if preset == "v4" else 0)),
    }
    if preset == "v5":  # alpha, b, r and beta, mu, gamma and phi after each of 2L sub-layers, and b of the embedding
        counts |= {"stream": 2 * layers * 4 * d + d, "mu": 2 * layers * d, "excitation": 2 * layers * 2 * d}
    elif preset != "transformer":
        counts |= {
            # one with a scale and a bias a layer, or one a layer with its bias
            "controller": layers * (controller + groups) if preset == "v1" else controller + layers * 2 * groups,
            "mu": layers * (d if preset in ("v1", "v4") else 1 + d // 64),
            "excitation": layers * 2 * excited,
        }
    if preset == "v3":
        counts["budget"] = layers  # w of the hybrid allocation
    return counts


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("preset", PRESETS)
def test_parameters_of_every_preset_and_size_are_the_closed_formulas(preset: str, size: str) -> None:
    row = find_size(size)
    config = ModelConfig(preset=preset, size=size, vocab_size=VOCABULARY)
    assert count_parameters(meta_model(config)) == by_hand(preset, row.d_model, row.num_layers)


@pytest.mark.parametrize(
    ("size", "dimensions"),
    [
        ("small", (512, 6, 8, 5)),
        ("medium", (768, 12, 12, 7)),
        ("large", (1024, 24, 16, 10)),
        ("xlarge", (1536, 32, 24, 12)),
        ("2.2B", (2048, 40, 32, 15)),
        ("5B", (4096, 32, 32, 10)),
        ("10B", (5120, 40, 40, 12)),
        ("3072x32", (3072, 32, 24, 2)),
    ],
)
def test_the_sizes_have_the_documents_dimensions_under_both_names(size: str, dimensions: tuple[int, ...]) -> None:
    config = ModelConfig(preset="v1", size=size)
    assert (config.d_model, config.num_layers, config.num_heads, config.num_iterations) == dimensions
