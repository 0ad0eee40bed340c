"""The learning rate, the drawn iterations and what is due, as functions of the step. Nothing here has state."""

import hashlib
import math
from collections.abc import Sequence

from inl_core.recipe import ModelConfig, ScheduleSettings, TrainingSettings


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


def logs_after(settings: TrainingSettings, step: int) -> bool:
    """Whether a row of metrics is written when `step` steps are done."""
    return step in (1, settings.num_steps) or is_due(step, settings.logging.every)


def writes_after(settings: TrainingSettings, step: int) -> bool:
    """Whether anything is written or scored when `step` steps are done."""
    regular = (settings.checkpoint.every, settings.evaluation.every)
    return logs_after(settings, step) or any(is_due(step, every) for every in regular)


def iterations_of_step(settings: TrainingSettings, config: ModelConfig, step: int) -> tuple[int, ...] | None:
    """Each layer's iterations in optimizer step `step`, where the recipe has them drawn; None where it does not."""
    if settings.min_iterations is None:
        return None
    return drawn_iterations(config.layer_iterations, settings.min_iterations, settings.seed, step)


def drawn_iterations(configured: Sequence[int], fewest: int, seed: int, step: int) -> tuple[int, ...]:
    """Draw each layer's number of iterations t, from `fewest` to the configured one, with odds in proportion to 1/t.

    - Every layer and step has a draw of its own. A hash takes the place of random numbers, so that there is no state to
      save and every rank draws the same.
    - Few iterations are drawn more often, because a token that stops early gets few of them.
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
