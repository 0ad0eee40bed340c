"""Records of what the dynamics do during a run: a Parquet file in dynamics/ for each recorded step.

- A record is measured by an extra forward pass without gradients, on the first rows of the step's batch, so that the
  training pass need not keep the trajectory.
- It describes, for each layer's integrator, mu (with its drift from the start), gamma, phi, alpha, beta, gate,
  velocity, and the residual of each iteration; for each sub-layer of a stream, what depth.py lists.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from inl_core.files import written_aside
from inl_core.model import Integrator, IntegratorLanguageModel, Options, Trajectory
from inl_core.training.depth import FORCES, MOVEMENTS, quantities, token_rms

PERCENTILES = (5, 50, 95)
SATURATION = 0.01


def summarise(values: Tensor) -> dict[str, float]:
    """mean, std, min, max, p5, p50, p95 of a tensor's values; quantiles on an even sample of at most a million."""
    flat = values.detach().float().flatten()
    sample = flat[:: max(1, flat.numel() // 1_000_000)]
    quantiles = torch.quantile(sample, torch.tensor([p / 100 for p in PERCENTILES], device=flat.device)).tolist()
    spread = flat.std(correction=0).item()
    row = {"mean": flat.mean().item(), "std": spread, "min": flat.min().item(), "max": flat.max().item()}
    return row | {f"p{p}": value for p, value in zip(PERCENTILES, quantiles, strict=True)}


def saturation(name: str, values: Tensor, beta_max: float | None) -> float:
    """The share of values within 1% of a bound: 0 and 1 for alpha and gate, 0 and beta_max, if any, for beta."""
    top = beta_max if name == "beta" else 1.0
    if top is None:
        return (values < SATURATION).float().mean().item()
    return ((values < SATURATION * top) | (values > (1 - SATURATION) * top)).float().mean().item()


@torch.no_grad()
def record_layers(
    model: IntegratorLanguageModel, ids: Tensor, *, positions: Tensor | None = None, document_ids: Tensor | None = None
) -> list[dict[str, Any]]:
    """One row per layer and quantity: layer, quantity, mean, std, min, max, percentiles, saturated, drift.

    The model runs all T iterations, as in training: no token stops early. The rows of a stream are those of its
    sub-layers and say which, in sub_layer.
    """
    if model.config.integrator is None:
        [path] = _paths(model, ids, positions, document_ids)
        return [
            {**place, "quantity": name, **summarise(values), **_drift(name, values)}
            for place, name, values in quantities(model, path)
        ]
    rows = []
    for index, (integrator, trajectory) in enumerate(_trajectories(model, ids, positions, document_ids)):
        rows += [{"layer": index, **row} for row in _layer_rows(integrator, trajectory)]
    return rows


@torch.no_grad()
def last_residuals(
    model: IntegratorLanguageModel, ids: Tensor, *, positions: Tensor | None = None, document_ids: Tensor | None = None
) -> list[float]:
    """The root mean square change of the state in each layer's last iteration, averaged over tokens, (L,)."""
    found = _trajectories(model, ids, positions, document_ids)
    return [_residuals(trajectory)[-1].mean().item() for _, trajectory in found]


def _drift(name: str, values: Tensor) -> dict[str, float]:
    """How far the mu of a step is from its start, 0."""
    return {"drift": values.square().mean().sqrt().item()} if name == "mu" else {}


def _trajectories(
    model: IntegratorLanguageModel, ids: Tensor, positions: Tensor | None, document_ids: Tensor | None
) -> list[tuple[Integrator, Trajectory]]:
    paths = _paths(model, ids, positions, document_ids)
    return list(zip(model.integrators(), paths, strict=True))


def _paths(
    model: IntegratorLanguageModel, ids: Tensor, positions: Tensor | None, document_ids: Tensor | None
) -> list[Trajectory]:
    """The trajectory of each integrator, or the only one of a stream."""
    was_training = model.training
    model.train()
    output = model(ids, positions=positions, document_ids=document_ids, options=Options(keep_trajectory=True))
    model.train(was_training)
    return [layer.trajectory for layer in output.layers if layer.trajectory is not None]


def _residuals(trajectory: Trajectory) -> Tensor:
    """||x_{t+1} - x_t|| / sqrt(D), (T, B, S)."""
    return token_rms(trajectory.states[1:] - trajectory.states[:-1])


def _layer_rows(integrator: Integrator, trajectory: Trajectory) -> list[dict[str, Any]]:
    config, mu = integrator.config, integrator.equilibrium()
    drift = (mu - config.mu.init).norm().item() / mu.numel() ** 0.5
    rows: list[dict[str, Any]] = [{"quantity": "mu", **summarise(mu), "drift": drift}]
    for name in ("gamma", "phi"):
        rows.append({"quantity": name, **summarise(getattr(integrator.excitation, name))})
    for name in ("alpha", "beta", "gate"):
        values = getattr(trajectory, name)
        rows.append({"quantity": name, **summarise(values), "saturated": saturation(name, values, config.beta_max)})
    speeds = token_rms(trajectory.velocities[1:])  # (T, B, S)
    rows.append({"quantity": "velocity", **summarise(speeds)})
    residuals = _residuals(trajectory)
    rows += [{"quantity": f"residual_{t + 1}", **summarise(residual)} for t, residual in enumerate(residuals)]
    return rows


def write_record(run: Path, step: int, rows: list[dict[str, Any]]) -> None:
    """Write dynamics/step-N.parquet whole, over an older one.

    Raises:
        OSError: it could not be written; no part of it is left.
    """
    directory = run / "dynamics"
    directory.mkdir(exist_ok=True)
    table = pa.Table.from_pylist([{"step": step, **row} for row in rows], schema=_SCHEMA)
    with written_aside(directory / f"step-{step:08d}.parquet") as aside:
        pq.write_table(table, aside)


def cut_records(run: Path, step: int) -> None:
    """Remove the records of steps after `step`."""
    for path in (run / "dynamics").glob("step-*.parquet"):
        digits = path.stem.removeprefix("step-")
        if digits.isdecimal() and int(digits) > step:
            path.unlink()


def headline(rows: list[dict[str, Any]]) -> dict[str, float]:
    """The means over layers, or sub-layers, that go into the row of metrics.

    alpha_mean, beta_mean, gate_mean, velocity_rms; of a stream also transport_mean, anchor_mean, state_rms,
    residual_rms, and the shares of its terms, as depth.py names them.
    """
    names = {name: f"{name}_mean" for name in ("alpha", "beta", "gate", "transport", "anchor")} | {
        name: f"{name}_rms" for name in ("velocity", "state", "residual")
    }
    names |= {f"force_{name}": f"force_{name}" for name in FORCES}
    names |= {f"movement_{name}": f"movement_{name}" for name in MOVEMENTS}
    found = {label: [row["mean"] for row in rows if row["quantity"] == name] for name, label in names.items()}
    return {label: sum(values) / len(values) for label, values in found.items() if values}


_SCHEMA = pa.schema(
    [("step", pa.int64()), ("layer", pa.int32()), ("sub_layer", pa.string()), ("quantity", pa.string())]
    + [(name, pa.float64()) for name in ("mean", "std", "min", "max", "p5", "p50", "p95", "saturated", "drift")]
)
