"""The documents' cycle scheduler, which counts epochs; its phases are computed as `inl train` does for steps."""

from collections.abc import Mapping
from typing import Any

from inl_core.documents.arguments import validated
from inl_core.recipe import CycleSettings
from inl_core.training.cycles import CycleConfig, cycle_config


class CycleScheduler:
    """The phase of each epoch, with its weights and excitation: warm-up, then equilibrium and exploration in turn.

    A phase follows from the number of the epoch alone. Epochs may be asked for in any order, and a resumed run needs to
    know nothing but its epoch.
    """

    def __init__(self, config: CycleConfig) -> None:
        self.config = config
        self.next_epoch = 0

    def step(self, epoch: int | None = None) -> dict[str, Any]:
        """The phase of `epoch`, counted from 0; None is the epoch after the last that was asked for.

        Returns:
            phase_name: warmup, equilibrium, exploration, or consolidation after the last cycle.
            is_exploration: whether the phase is exploration.
            lambda_mean, lambda_energy: weights of the mean and energy losses.
            excitation_amplitude: A.
            cycle: the cycle from 1, 0 before the first; epoch: the epoch asked for.
        """
        epoch = self.next_epoch if epoch is None else epoch
        if epoch < 0:
            raise ValueError(f"epoch {epoch}: epochs count from 0")
        self.next_epoch = epoch + 1
        regime = self.config.regime(epoch)
        begun = (epoch - self.config.warmup_epochs) // self.config.cycle_epochs + 1
        return {
            "phase_name": regime.phase,
            "is_exploration": regime.phase == "exploration",
            "lambda_mean": regime.lambda_mean,
            "lambda_energy": regime.lambda_energy,
            "excitation_amplitude": regime.excitation_amplitude,
            "cycle": min(max(begun, 0), self.config.num_cycles),
            "epoch": epoch,
        }

    def get_total_epochs(self) -> int:
        """Warm-up and all cycles."""
        return self.config.total_epochs


def create_cycle_scheduler(
    preset: str = "balanced",
    *,
    equilibrium_config: Mapping[str, Any] | None = None,
    exploration_config: Mapping[str, Any] | None = None,
    num_cycles: int | None = None,
    warmup_epochs: int | None = None,
) -> CycleScheduler:
    """The scheduler of a preset, with the other arguments laid over it (docs/model.md, "Cycles").

    Args:
        preset: conservative, balanced or aggressive.
        equilibrium_config, exploration_config: any of lambda_mean, excitation_amplitude, duration_epochs.

    Raises:
        ValueError: an unknown preset or key, with the nearest valid one, or a value out of its range.
    """
    values = {
        "preset": preset,
        "equilibrium": dict(equilibrium_config or {}),
        "exploration": dict(exploration_config or {}),
        "num_cycles": num_cycles,
        "warmup_epochs": warmup_epochs,
    }
    names = {"equilibrium": "equilibrium_config", "exploration": "exploration_config"}
    return CycleScheduler(cycle_config(validated(CycleSettings, values, names)))
