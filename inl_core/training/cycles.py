"""Equilibrium-exploration cycles as a function of the step (docs/model.md, "Cycles").

    warm-up | cycle 1: equilibrium, exploration | cycle 2: equilibrium, exploration | ... | consolidation

- In equilibrium the states are drawn towards mu (high lambda_mean, no excitation); in exploration they are driven away
  from it (low lambda_mean, excitation of amplitude A).
- The documents do not say what happens at the two ends. Here the warm-up uses the equilibrium phase's values, and after
  the last cycle the run stays in equilibrium, which is called "consolidation".
"""

from dataclasses import dataclass

from inl_core.recipe import CycleSettings, LossSettings

ENERGY_WEIGHT = {"equilibrium": 0.01, "exploration": 0.001}


@dataclass(frozen=True)
class PhaseConfig:
    """One phase of a cycle: weight of the mean loss, amplitude A, and length in epochs."""

    lambda_mean: float
    excitation_amplitude: float
    duration_epochs: int


@dataclass(frozen=True)
class CycleConfig:
    """A whole schedule of cycles."""

    equilibrium: PhaseConfig
    exploration: PhaseConfig
    num_cycles: int
    warmup_epochs: int

    @property
    def total_epochs(self) -> int:
        """Warm-up and all cycles."""
        return self.warmup_epochs + self.num_cycles * self.cycle_epochs

    @property
    def cycle_epochs(self) -> int:
        """One equilibrium and one exploration phase."""
        return self.equilibrium.duration_epochs + self.exploration.duration_epochs

    def phase_name(self, epoch: float) -> str:
        """warmup, equilibrium, exploration or consolidation, at an epoch counted from 0."""
        if epoch < self.warmup_epochs:
            return "warmup"
        if epoch >= self.total_epochs:
            return "consolidation"
        inside = (epoch - self.warmup_epochs) % self.cycle_epochs
        return "equilibrium" if inside < self.equilibrium.duration_epochs else "exploration"

    def regime(self, epoch: float) -> "Regime":
        """What governs the training at an epoch, counted from 0; it may be a fraction."""
        name = self.phase_name(epoch)
        kind = "exploration" if name == "exploration" else "equilibrium"
        phase: PhaseConfig = getattr(self, kind)
        return Regime(name, phase.lambda_mean, ENERGY_WEIGHT[kind], phase.excitation_amplitude)


CYCLE_PRESETS: dict[str, CycleConfig] = {
    "conservative": CycleConfig(PhaseConfig(0.8, 0.0, 15), PhaseConfig(0.1, 0.02, 15), num_cycles=4, warmup_epochs=20),
    "balanced": CycleConfig(PhaseConfig(0.5, 0.0, 10), PhaseConfig(0.05, 0.05, 20), num_cycles=5, warmup_epochs=10),
    "aggressive": CycleConfig(PhaseConfig(0.3, 0.0, 5), PhaseConfig(0.01, 0.08, 25), num_cycles=6, warmup_epochs=5),
}


def cycle_config(settings: CycleSettings) -> CycleConfig:
    """The preset with the recipe's partial overrides laid over it."""
    preset = CYCLE_PRESETS[settings.preset]

    def phase(base: PhaseConfig, over) -> PhaseConfig:
        given = {key: value for key, value in over.model_dump().items() if value is not None}
        return PhaseConfig(**{**vars(base), **given})

    return CycleConfig(
        phase(preset.equilibrium, settings.equilibrium),
        phase(preset.exploration, settings.exploration),
        settings.num_cycles or preset.num_cycles,
        preset.warmup_epochs if settings.warmup_epochs is None else settings.warmup_epochs,
    )


@dataclass(frozen=True)
class Regime:
    """What governs one step: the phase's name, two weights of losses, and the amplitude A (None leaves the model's)."""

    phase: str
    lambda_mean: float
    lambda_energy: float
    excitation_amplitude: float | None


def regime(losses: LossSettings, cycle: CycleSettings | None, step: int, num_steps: int) -> Regime:
    """The regime of optimizer step `step` (from 0) of a run of `num_steps`."""
    if cycle is None:
        return Regime("constant", annealed(losses, step, num_steps), losses.lambda_energy, None)
    config = cycle_config(cycle)
    return config.regime(step / (cycle.steps_per_epoch or num_steps / config.total_epochs))


def annealed(losses: LossSettings, step: float, num_steps: int) -> float:
    """lambda_mean at `step` of `num_steps` without a cycle."""
    start, end = losses.lambda_mean, losses.lambda_mean_final
    if end is None:
        return start
    progress = min(1.0, step / max(1.0, losses.annealing_fraction * num_steps))
    if losses.annealing == "linear" or start == 0.0 or end == 0.0:  # an exponential never reaches zero
        return start + (end - start) * progress
    return start * (end / start) ** progress
