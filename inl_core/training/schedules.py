"""The learning rate, the drawn iterations and what is due, as functions of the step; nothing here has state."""

import hashlib
import math
from collections.abc import Sequence

from inl_core.recipe import ScheduleSettings


def learning_rate_factor(settings: ScheduleSettings, step: int, num_steps: int) -> float:
    """Share of the peak learning rate for optimizer step `step`, counted 0 .. num_steps - 1.

    Warm-up rises linearly and reaches 1 at its last step. `wsd` then stays at 1 and falls linearly to `final_ratio` in
    the decay steps (the step after the last would be exactly `final_ratio`); `cosine` falls along half a cosine.
    """
    warmup = round(settings.warmup_fraction * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.name == "constant":
        return 1.0
    if settings.name == "cosine":
        progress = (step - warmup) / max(1, num_steps - warmup)
        return settings.final_ratio + (1 - settings.final_ratio) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    decay = round(settings.decay_fraction * num_steps)
    left = num_steps - step
    if left >= decay:
        return 1.0
    return settings.final_ratio + (1 - settings.final_ratio) * max(0, left) / decay


def is_due(step: int, every: int) -> bool:
    """Whether something done `every` so many steps is due after `step` of them; never where `every` is 0."""
    return every > 0 and step % every == 0


def drawn_iterations(configured: Sequence[int], fewest: int, seed: int, step: int) -> tuple[int, ...]:
    """Each layer's iterations t in optimizer step `step`: fewest .. configured, with odds in proportion to 1/t.

    - One draw a layer and step; a hash stands for the random numbers: nothing to save, and the same on every rank.
    - Few iterations are drawn more often, since they are what a token that is stopped early gets.
    """

    def draw(layer: int, most: int) -> int:
        digest = hashlib.blake2b(f"iterations/{seed}/{step}/{layer}".encode(), digest_size=8).digest()
        numbers = range(fewest, most + 1)
        left = int.from_bytes(digest, "little") / 2**64 * sum(1 / number for number in numbers)
        for number in numbers:
            left -= 1 / number
            if left < 0:
                return number
        return most

    return tuple(draw(layer, most) for layer, most in enumerate(configured))
