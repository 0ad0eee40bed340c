"""The documents' model sizes: dimensions and iterations, without torch.

- Source: docs/model.md, "Sizes". Document 001 names three of them by their parameters after optimisation (2.2B, 5B,
  10B, and 2B): both names are accepted. The feed-forward is 4 D wide everywhere.
- The documents give key-value heads for 3072x32 alone, four queries to one; the other grouped-query sizes follow it.
- `num_iterations` belongs to v1, v2 and v3 (dt = 0.1); v4 has its own T, and v5 has no iterations.
"""

from dataclasses import dataclass
from typing import Any

from inl_core.recipe.presets import GROUPED_QUERIES, ITERATIONS_BY_SIZE

QUERIES_PER_KEY = 4


@dataclass(frozen=True)
class Size:
    """One row of the documents' tables."""

    d_model: int
    num_layers: int
    num_heads: int
    num_iterations: int
    max_seq_len: int

    def keys(self, preset: str) -> dict[str, Any]:
        """The dimensions as model keys, to be laid over a generation's preset."""
        values: dict[str, Any] = {
            "d_model": self.d_model,
            "num_layers": self.num_layers,
            "num_heads": self.num_heads,
            "max_seq_len": self.max_seq_len,
        }
        if preset in GROUPED_QUERIES:
            values["num_kv_heads"] = self.num_heads // QUERIES_PER_KEY
        if preset in ITERATIONS_BY_SIZE:
            values["integrator"] = {"num_iterations": self.num_iterations}
        return values


SIZES: dict[str, Size] = {
    "small": Size(512, 6, 8, 5, 512),
    "medium": Size(768, 12, 12, 7, 1024),
    "large": Size(1024, 24, 16, 10, 2048),
    "xlarge": Size(1536, 32, 24, 12, 4096),
    "3B": Size(2048, 40, 32, 15, 4096),
    "7B": Size(4096, 32, 32, 10, 4096),
    "13B": Size(5120, 40, 40, 12, 4096),
    "3072x32": Size(3072, 32, 24, 2, 4096),
}

ALIASES: dict[str, str] = {"2B": "3B", "2.2B": "3B", "5B": "7B", "10B": "13B"}


def find_size(name: str) -> Size:
    """A size by either of its names; KeyError when there is none."""
    return SIZES[ALIASES.get(name, name)]
