"""Our key-value cache in the form that transformers' `generate` hands from token to token.

Legend: B batch, S new tokens, M slots.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache

from inl_core.model import IntegratorLanguageModel, KVCache

_FEWEST_SLOTS = 256


class InlCache(Cache):
    """Keys and values of every layer and, where velocity travels along the text, each layer's last velocities.

    It grows as needed. Its rows may be chosen and reordered, as beam search does. It cannot be shortened, because the
    velocities of earlier tokens are not kept; so there is no assisted decoding.

    Attributes:
        own: the model's own cache; None before the first tokens.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.own: KVCache | None = None

    def prepared(self, model: IntegratorLanguageModel, ids: Tensor, padding: Tensor | None) -> KVCache:
        """The model's own cache with room for the tokens `ids` (B, S).

        Args:
            padding: (B,) how many leading tokens of a row hold no text; used with the first tokens alone.
        """
        batch, num_new = ids.shape
        if self.own is None:
            self.own = model.new_cache(batch, max(_FEWEST_SLOTS, num_new))
            self.own.padding = padding
        if len(self.own.keys[0]) != batch:
            raise ValueError(f"past_key_values holds {len(self.own.keys[0])} rows and input_ids {batch}")
        self._grow(self.get_seq_length() + num_new)
        return self.own

    def _grow(self, needed: int) -> None:
        assert self.own is not None
        slots = self.own.keys[0].shape[2]
        if needed > slots:
            more = (0, 0, 0, max(needed, 2 * slots) - slots)
            self.own.keys = [F.pad(keys, more) for keys in self.own.keys]
            self.own.values = [F.pad(values, more) for values in self.own.values]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens it holds, left padding included."""
        return 0 if self.own is None else int(self.own.length)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: it grows as needed."""
        return -1

    @property
    def batch_size(self) -> int:
        """B; -1 before the first tokens."""
        return -1 if self.own is None else len(self.own.keys[0])

    @property
    def is_croppable(self) -> bool:
        """False, see above."""
        return False

    def crop(self, *arguments: Any) -> None:
        """Not possible."""
        raise NotImplementedError("an InlCache cannot be shortened; compute the shorter text again with a new InlCache")

    def reset(self) -> None:
        """Forget all tokens."""
        self.own = None

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make these rows, in this order, the whole batch."""
        if self.own is not None:
            self.own.select(indices.to(self.own.keys[0].device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make these rows, in this order, the whole batch."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times."""
        self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))
