"""The generations as plain dictionaries: what each preset means, before a recipe's own keys are laid over it.

- This is data alone and imports no torch, so that a recipe can be validated quickly.
- Sources: docs/model.md, "The generations". `v4`, `v5` and `transformer` are this project's own.
- v2 is v1 with low-rank embeddings, a shared controller, hierarchical mu and sparse excitation; v3 has a modern block.
"""

from typing import Any, Final

DEFAULT_PRESET: Final = "v5"
"""The preset of a recipe that names none."""

_MODERN_BLOCK: dict[str, Any] = {
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "positions": "rope",
    "rope_theta": 10_000.0,
    "feed_forward": "swiglu",
    "bias": False,
    "tie_head": True,
}

_FIRST_BLOCK: dict[str, Any] = {
    "norm": "layernorm",
    "norm_eps": 1e-5,
    "positions": "sinusoidal",
    "rope_theta": 10_000.0,
    "feed_forward": "gelu",
    "feed_forward_rounding": "exact",
    "bias": True,
    "tie_head": True,
    "embedding_norm": False,
    "embedding_scale": "sqrt_dim",  # arXiv 1706.03762, section 3.4: or the positions' sines drown the tokens
}

_PLAIN_STREAM: dict[str, Any] = {"stream": None, "transport": False}  # x + c, as in a Transformer

# The dynamics that all three documents share. The code released with them adds the state itself to the residual stream.
_DOCUMENTED_DYNAMICS: dict[str, Any] = {
    "num_iterations": 5,
    "dt": 0.1,
    "init_alpha": 0.8,
    "init_beta": 0.5,
    "init_gate": 0.5,
    "candidate": "controller",
    "carry_velocity": False,
    "readout": "state",
}

_DOCUMENTED_OPTIMISED: dict[str, Any] = {
    **_DOCUMENTED_DYNAMICS,
    "mu": {"form": "hierarchical"},
    "excitation": {"amplitude": 0.03, "sparsity": 0.1},
    "controller": {"shared": True, "modulation": "scalar"},
    "early_stopping": {"convergence_threshold": 0.001},
}

PRESETS: dict[str, dict[str, Any]] = {
    "v1": {
        **_FIRST_BLOCK,
        "embedding_rank": None,
        "integrator": {
            **_DOCUMENTED_DYNAMICS,
            "mu": {"form": "per_dim"},
            "excitation": {"amplitude": 0.03, "sparsity": 1.0},
            "controller": {"shared": False},
            "early_stopping": {"convergence_threshold": 0.0},
        },
        **_PLAIN_STREAM,
    },
    "v2": {**_FIRST_BLOCK, "embedding_rank": "auto", "integrator": _DOCUMENTED_OPTIMISED, **_PLAIN_STREAM},
    "v3": {
        **_MODERN_BLOCK,
        "feed_forward_rounding": "exact",
        "embedding_rank": "auto",
        "embedding_norm": False,
        "integrator": {**_DOCUMENTED_OPTIMISED, "budget": {"strategy": "hybrid"}},
        **_PLAIN_STREAM,
    },
    # The feed-forward is the integrator's candidate velocity and velocity is carried through depth.
    "v4": {
        **_MODERN_BLOCK,
        "feed_forward_rounding": "down_64",
        "embedding_rank": None,
        "embedding_norm": True,
        "integrator": {
            "num_iterations": 2,
            "dt": 0.7,  # at 1 the displacement is too large for this learning rate (docs/evidence.md)
            "init_alpha": 0.5,
            "init_beta": 0.05,
            "init_gate": 0.9,
            "candidate": "feed_forward",
            "carry_velocity": True,
            "readout": "delta",
            "mu": {"form": "per_dim"},
            "excitation": {"amplitude": 0.03, "sparsity": 1.0},
            "controller": {"modulation": "scalar"},
            "early_stopping": {"convergence_threshold": 0.0},
        },
        **_PLAIN_STREAM,
    },
    # Depth is the time of one second-order system, and velocity travels along the text.
    "v5": {
        **_MODERN_BLOCK,
        "feed_forward_rounding": "up_16",
        "embedding_rank": None,
        "embedding_norm": True,
        "integrator": None,
        "transport": True,
        "stream": {
            "momentum": True,
            "anchor": True,
            "equilibrium": True,
            "excitation": {"amplitude": 0.03, "sparsity": 1.0},
        },
    },
    # The baseline: the same block, norms, attention, initialisation and loss, without an integrator.
    "transformer": {
        **_MODERN_BLOCK,
        "feed_forward_rounding": "up_16",
        "embedding_rank": None,
        "embedding_norm": True,
        "integrator": None,
        **_PLAIN_STREAM,
    },
}

# How a generation reads the documents' sizes: four queries a key or one, the size's iterations or its own.
GROUPED_QUERIES = ("v3", "v4", "v5", "transformer")
ITERATIONS_BY_SIZE = ("v1", "v2", "v3")


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A copy of `base` in which the keys of `over`, at every depth, have their values from `over`."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
