"""A sample of tokens whose trajectories are kept, as the table trajectories.parquet (docs/convergence-report.md)."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from inl_core.corpus.loader import IGNORED, Batch
from inl_core.corpus.tokenizer import Tokenizer
from inl_core.model import Trajectory

NUM_PORTRAIT_DIMS = 4
GAINS = ("alpha", "beta", "gate")


class TokenSample:
    """Every k-th scored token, about `size` of `num_tokens`; rows are in the order token, layer, iteration."""

    def __init__(self, tokenizer: Tokenizer, *, size: int, num_tokens: int) -> None:
        self.tokenizer, self.every = tokenizer, max(1, -(-num_tokens // size))
        self.num_seen = 0
        self.tokens: list[dict[str, Any]] = []
        self.parts: list[pa.Table] = []

    def choose(self, batch: Batch) -> np.ndarray:
        """Which of the batch's scored tokens are kept, as places among them (n,); they are remembered."""
        rows, places = np.nonzero(batch.targets != IGNORED)
        kept = np.flatnonzero((self.num_seen + np.arange(len(rows))) % self.every == 0)
        for place in kept.tolist():
            token = int(batch.tokens[rows[place], places[place]])
            self.tokens.append(
                {
                    "token_index": self.num_seen + place,
                    "token_id": token,
                    "token": self.tokenizer.decode([token]),
                    "next_token_id": int(batch.targets[rows[place], places[place]]),
                }
            )
        self.num_seen += len(rows)
        return kept

    def add(
        self, layer: int, used: int, kept: np.ndarray, path: Trajectory, mu: Tensor, measures: dict[str, Tensor]
    ) -> None:
        """Keep the tokens `kept` of one layer's trajectories, states (T+1, N, D)."""
        if not len(kept):
            return
        chosen = torch.from_numpy(kept).to(path.states.device)
        num_iterations, dims = len(path.alpha), portrait_dims(path.states.shape[-1], path.states.device)
        columns: dict[str, Any] = {name: values[:, chosen] for name, values in measures.items()}
        for name in GAINS:
            means = getattr(path, name)[:, chosen].mean(-1)
            columns[name] = torch.cat((torch.full_like(means[:1], torch.nan), means))
        tokens = self.tokens[-len(kept) :]
        size = len(kept) * (num_iterations + 1)
        table: dict[str, Any] = {
            name: [token[name] for token in tokens for _ in range(num_iterations + 1)] for name in tokens[0]
        }
        iteration = np.tile(np.arange(num_iterations + 1, dtype=np.int32), len(kept))
        table |= {"layer": np.full(size, layer, np.int32), "iteration": iteration, "used": iteration <= used}
        table |= {name: _column(values) for name, values in columns.items()}
        table |= {
            "portrait_error": _lists((path.states - mu)[:, chosen][..., dims]),
            "portrait_velocity": _lists(path.velocities[:, chosen][..., dims]),
        }
        self.parts.append(pa.table(table))

    def table(self) -> pa.Table:
        """All rows so far."""
        keys = [(name, "ascending") for name in ("token_index", "layer", "iteration")]
        return pa.concat_tables(self.parts).sort_by(keys)

    def write(self, path: Path) -> None:
        """trajectories.parquet."""
        pq.write_table(self.table(), path)


def portrait_dims(dim: int, device: torch.device | str = "cpu") -> Tensor:
    """The dimensions a phase portrait shows: evenly spaced."""
    count = min(NUM_PORTRAIT_DIMS, dim)
    return torch.arange(count, device=device) * dim // count


def _column(values: Tensor) -> pa.Array:
    """(T+1, n) -> one value a row, token by token; NaN (no step led here) is null."""
    array = values.T.flatten().float().cpu().numpy()
    return pa.array(array, mask=np.isnan(array))


def _lists(values: Tensor) -> pa.Array:
    """(T+1, n, P) -> one list of P values a row."""
    flat = values.transpose(0, 1).flatten(0, 1).float().cpu().numpy()
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), flat.shape[1])
