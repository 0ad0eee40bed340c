"""One token a row: the model's forward pass as functions over packed weights, eager or compiled.

    decoder = Decoder(model, options, rows=len(ids))
    prompt = decoder.prefill(ids, cache)            # all tokens of the prompts, in one pass
    step = decoder.step(tokens, cache)              # one token a row
    logits = decoder.logits(step.hidden)

- The same numbers as `model(...)` but for rounding; mixtures and budgets that are not uniform run `model(...)` itself.
- Compiled, one graph serves all layers. Keys and values keep their full length behind a mask, so nothing changes
  shape from token to token and nothing is compiled again; finished rows stay in the batch for the same reason.
- Early stopping ends the loop once every row has stopped: with one row, at its own last iteration.
- Legend: B rows, S tokens, D d_model, M cache slots, V vocabulary, T iterations.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inl_core.inference.layer_step import (
    Iterated,
    Reach,
    begin,
    finish,
    freeze,
    head_logits,
    integrator_step,
    layer_step,
    normalise,
)
from inl_core.inference.packing import Dynamics, Layer, can_pack, pack
from inl_core.model import IntegratorLanguageModel, KVCache, Options

_BUCKET = 256


class Predicted(NamedTuple):
    """The final states behind each row's next token, (B, D), and its mean iterations over layers, (B,)."""

    hidden: Tensor
    iterations: Tensor


class Decoder:
    """Decodes with one model as it is now; in evaluation mode and under `torch.inference_mode`.

    Args:
        options: iterations and early stopping.
        rows: the largest batch it will run; the weights are laid out for it.
        compiled: let torch.compile generate the step's kernels at the first token; that takes tens of seconds.
    """

    def __init__(self, model: IntegratorLanguageModel, options: Options, *, rows: int, compiled: bool = False) -> None:
        self.model, self.options = model, options
        assert not isinstance(options.num_iterations, tuple)
        with torch.inference_mode():
            self.packed = pack(model, options.num_iterations, rows=rows, compiled=compiled) if can_pack(model) else None
        self.is_compiled = compiled and self.packed is not None
        integrator = model.config.integrator
        threshold = integrator.early_stopping.convergence_threshold if integrator else 0.0
        self.threshold = threshold if options.early_stopping else 0.0
        self.min_iterations = integrator.early_stopping.min_iterations if integrator else 1

    def new_cache(self, batch: int, slots: int) -> KVCache:
        """A cache for `batch` rows of up to `slots` tokens; compiled, its length is rounded up to few sizes."""
        if self.is_compiled:
            slots = -(-slots // _BUCKET) * _BUCKET
        return self.model.new_cache(batch, slots)

    def prefill(self, ids: Tensor, cache: KVCache) -> Predicted:
        """Run whole prompts (B, S), aligned to the right, in one pass."""
        output = self.model(ids, cache=cache, options=self.options)
        return Predicted(output.hidden[:, -1], output.iterations()[:, -1])

    def step(self, tokens: Tensor, cache: KVCache) -> Predicted:
        """Run one token a row, (B,), and add it to the cache."""
        if self.packed is None:
            return self.prefill(tokens[:, None], cache)
        x = self.model.embedding(tokens[:, None])[:, 0]  # (B, D)
        x, reach = self._reach(x, cache)
        still = torch.zeros_like(x)
        velocity, used = still, []
        end = cache.keys.shape[3] if self.is_compiled else cache.length + 1
        for number, layer in enumerate(self.packed.layers):
            keys, values = cache.keys[number, :, :, :end], cache.values[number, :, :, :end]
            if self.threshold and layer.dynamics is not None:
                x, velocity, iterations = self._stopping_layer(layer, layer.dynamics, x, velocity, reach, keys, values)
                used.append(iterations)
            else:
                x, velocity = self._run(layer_step)(layer, x, velocity, reach, keys, values)
                used.append(layer.dynamics.num_iterations if layer.dynamics else 0)
            velocity = velocity if self.model.carries_velocity else still
        cache.length += 1
        total = sum(used[1:], used[0]) / len(used)
        mean = total.float() if isinstance(total, Tensor) else torch.full((len(x),), total, device=x.device)
        return Predicted(normalise(x, self.packed.norm_final), mean)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden (B, D) -> logits (B, V) in float32."""
        if self.packed is None:
            return self.model.logits(hidden)
        return self._run(head_logits)(hidden, self.packed.head_down, self.packed.head)

    def _run(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return compiled_function(function) if self.is_compiled else function

    def _reach(self, x: Tensor, cache: KVCache) -> tuple[Tensor, Reach]:
        """Positions and visibility; sinusoidal positions are added to x here."""
        assert self.packed is not None
        now, padding = cache.length, cache.padding
        # A compiled batch keeps its finished rows: one that has filled the context stands still at its last position
        # while shorter ones go on.
        last = self.model.config.max_seq_len - 1
        position = slice(now, now + 1) if padding is None else (now - padding).clamp(max=last)
        rotary = None
        if self.packed.rotary is None:
            x = x + self.model.position_table[position]
        else:
            cos, sin = self.packed.rotary[:, position].to(x.dtype)
            rotary = (cos[:, None], sin[:, None])
        mask = None
        if self.is_compiled or padding is not None:
            slots = torch.arange(cache.keys.shape[3] if self.is_compiled else now + 1, device=x.device)
            mask = (slots <= now)[None]
            mask = (mask if padding is None else mask & (slots >= padding[:, None]))[:, None, None]
        return x, Reach(torch.tensor([now], device=x.device), rotary, mask)

    def _stopping_layer(
        self,
        layer: Layer,
        dynamics: Dynamics,
        x: Tensor,
        velocity: Tensor,
        reach: Reach,
        keys: Tensor,
        values: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor | int]:
        """A layer whose iterations end when every row has stopped; the iterations each row used, (B,)."""
        begun = self._run(begin)(layer, x, reach, keys, values)
        iterate = self._run(integrator_step)
        state, total = begun.start, dynamics.num_iterations
        active: Tensor | None = None
        used: Tensor | int = 0
        for t in range(total):
            new = iterate(dynamics, begun, state, velocity, dynamics.forcing[t], measured=True)
            state, velocity = freeze(active, new, state, velocity)
            used = used + (1 if active is None else active)
            if t + 1 < self.min_iterations or t + 1 == total:
                continue
            if len(x) == 1:  # nothing to freeze: it goes on or it ends
                if _moved(new).item() < self.threshold:
                    return finish(layer, begun, state), velocity, t + 1
                continue
            moving = _moved(new).squeeze(-1) >= self.threshold
            active = moving if active is None else active & moving
            if not bool(active.any()):
                break
        return finish(layer, begun, state), velocity, used


@lru_cache
def compiled_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as torch.compile runs it, once for the whole process."""
    return torch.compile(function, fullgraph=True)


def _moved(iterated: Iterated) -> Tensor:
    assert iterated.moved is not None
    return iterated.moved
