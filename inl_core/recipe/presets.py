"""The generations as plain dictionaries: what each preset means, before a recipe's own keys are laid over it.

- Pure data, no torch: a recipe can be validated, and `inl --help` shown, without the core.
- Sources: doc 000 is `v3`; `v4` and `transformer` are this project's own (docs/evidence.md has their measurements).
- Generations v1 and v2 (docs 002, 001) take their place in this table.
"""

from typing import Any

_COMMON: dict[str, Any] = {
    "norm": "rmsnorm",
    "norm_eps": 1e-6,
    "positions": "rope",
    "rope_theta": 10_000.0,
    "feed_forward": "swiglu",
    "bias": False,
    "tie_head": True,
}

PRESETS: dict[str, dict[str, Any]] = {
    # Doc 000. The seeds' own code reads the state out as it is, hence `readout: state`.
    "v3": {
        **_COMMON,
        "feed_forward_rounding": "exact",
        "embedding_rank": "auto",
        "embedding_norm": False,
        "integrator": {
            "num_iterations": 5,
            "dt": 0.1,
            "init_alpha": 0.8,
            "init_beta": 0.5,
            "init_gate": 0.5,
            "candidate": "controller",
            "carry_velocity": False,
            "readout": "state",
            "mu": {"form": "hierarchical"},
            "excitation": {"amplitude": 0.03, "sparsity": 0.1},
            "controller": {"modulation": "scalar"},
            "early_stopping": {"convergence_threshold": 0.001},
        },
    },
    # The feed-forward is the integrator's candidate velocity and velocity is carried through depth.
    "v4": {
        **_COMMON,
        "feed_forward_rounding": "down_64",
        "embedding_rank": None,
        "embedding_norm": True,
        "integrator": {
            "num_iterations": 2,
            "dt": 1.0,
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
    },
    # The baseline: the same block, norms, attention, initialisation and loss, without an integrator.
    "transformer": {
        **_COMMON,
        "feed_forward_rounding": "up_16",
        "embedding_rank": None,
        "embedding_norm": True,
        "integrator": None,
    },
}


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Lay `over` on `base`, key by key at every depth; neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
