"""The learning rate as a function of the step; nothing here has state."""

import math

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
