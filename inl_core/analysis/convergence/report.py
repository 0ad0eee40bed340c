"""The convergence report of one checkpoint: measure it on a text, and write what was found.

    DIR/report.html  report.md  summary.json  trajectories.parquet  *.png     and of a stream coefficients.parquet

- Every number is defined in docs/convergence-report.md; summary.json holds all of them, report.md the ones to read.
- Figures need matplotlib, the extra [plot]; without it everything else is written and the report says so.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic_core import to_jsonable_python

from inl_core.analysis.convergence.collect import trace
from inl_core.analysis.convergence.figures import DRAW, FIGURES, draw_figures
from inl_core.analysis.convergence.iterations import (
    IterationReport,
    StoppingReport,
    measure_iterations,
    measure_stopping,
    num_passes,
)
from inl_core.analysis.convergence.layer_statistics import PathStatistics
from inl_core.analysis.convergence.markdown import to_markdown
from inl_core.analysis.convergence.sample import TokenSample, portrait_dims
from inl_core.analysis.convergence.stability import BETA_FLOOR
from inl_core.analysis.convergence.stream_figures import STREAM_FIGURES, stream_drawings
from inl_core.analysis.convergence.stream_markdown import stream_to_markdown
from inl_core.analysis.convergence.verdict import Evidence, Thresholds, Verdict, gather, judge
from inl_core.analysis.report.documents import convergence_page
from inl_core.analysis.report.page import write_page
from inl_core.corpus.loader import Batch
from inl_core.errors import ArtefactError, RecipeError
from inl_core.inference.loading import LoadedModel
from inl_core.inference.texts import Text, default_window
from inl_core.recipe import ModelConfig

FEWEST_FOLLOWED = 8
"""Iterations followed by default, unless twice the model's own are more."""
FEWEST_BATCHES = 16
"""A standard error over fewer batches says little."""
_BATCH_ELEMENTS = 2**21
"""About how many numbers one tensor of a layer's path may have: iterations x tokens x dimensions."""


@dataclass(frozen=True)
class LayerReport:
    """One layer: the verdict, what it rests on, and a row of figures an iteration (PathStatistics.rows)."""

    layer: int
    verdict: Verdict
    """Within the iterations that the model runs."""
    beyond: Verdict | None
    """The same of all iterations that were followed; None where these are the same ones."""
    evidence: Evidence
    used_iterations: int
    iterations: list[dict[str, Any]]


@dataclass(frozen=True)
class ConvergenceReport:
    """What the dynamics of a checkpoint do on a text."""

    checkpoint: Path
    step: int
    preset: str
    terms: list[str]
    """Those of a stream, which is one system and stands as the only layer; empty for a model with integrators."""
    num_iterations: int
    """T, the model's own; of a stream 2L, its steps."""
    iterations_followed: int
    text: str
    tokens: int
    window: int
    amplitude: float
    """A of the excitation, as the checkpoint holds it."""
    epsilon: float
    """Tolerance of the convergence metrics."""
    beta_floor: float
    """Smaller betas count as this much in a fixed point."""
    portrait_dimensions: list[int]
    """Which dimensions trajectories.parquet holds whole."""
    thresholds: Thresholds
    layers: list[LayerReport]
    bits_per_byte: IterationReport
    early_stopping: StoppingReport | None

    def summary(self) -> dict[str, Any]:
        """Everything as JSON values; what is not finite is null."""
        return to_jsonable_python(self, inf_nan_mode="null")


def require_dynamics(loaded: LoadedModel) -> None:
    """ArtefactError for a model that has no dynamics to report."""
    config = loaded.model.config
    if not config.has_dynamics:
        lacks = "all terms of this model's stream are off" if config.preset == "v5" else "this model has no integrator"
        raise ArtefactError(
            f"{loaded.path}: {lacks}, so it is a plain Transformer, without states that could converge; name a "
            "checkpoint of a preset v1 to v5, or of a Transformer with transport"
        )


def report_convergence(
    loaded: LoadedModel,
    text: Text,
    *,
    max_tokens: int,
    num_iterations: int | None = None,
    window: int | None = None,
    epsilon: float = 0.1,
    sample_tokens: int = 256,
    thresholds: Thresholds = Thresholds(),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[ConvergenceReport, TokenSample]:
    """Measure a model on the first `max_tokens` tokens of `text`.

    Args:
        num_iterations: iterations to follow each layer for; default twice the model's own, at least FEWEST_FOLLOWED.
            A stream has its 2L steps and no more.
        epsilon: tolerance of the convergence metrics, in units of the state.
        sample_tokens: about how many tokens' trajectories are kept.
        progress: called with how many passes over the text are done, and how many there are.

    Raises:
        ArtefactError: the model has no dynamics.
        RecipeError: fewer iterations than the model's own, any number for a stream, or an epsilon that is not positive.
    """
    require_dynamics(loaded)
    model = loaded.model
    own, followed = _iterations(model.config, num_iterations, epsilon)
    if window is None:
        window = min(default_window(loaded), max(1, text.num_targets))
    windows = _windows(text, window, max_tokens, numbers_per_token=followed * model.config.d_model)
    passes, num_done = 1 + num_passes(model), count(1)
    advance = lambda: progress(next(num_done), passes)  # noqa: E731
    model.eval()
    sample = TokenSample(loaded.tokenizer, size=sample_tokens, num_tokens=min(max_tokens, text.num_targets))
    statistics = trace(model, windows(), num_iterations=followed, epsilon=epsilon, sample=sample)
    if not statistics:
        raise ArtefactError(f"{text.name}: holds no target token; give it more text")
    advance()
    byte_table = text.byte_counts(max_tokens).token_num_bytes
    bits = measure_iterations(model, windows, byte_table, done=advance)
    report = ConvergenceReport(
        checkpoint=loaded.path,
        step=loaded.step,
        preset=model.config.preset,
        terms=list(model.config.stream_terms),
        num_iterations=own,
        iterations_followed=followed,
        text=text.name,
        tokens=statistics[0].num_tokens,
        window=window,
        amplitude=model.excitation_amplitude.item(),
        epsilon=epsilon,
        beta_floor=BETA_FLOOR,
        portrait_dimensions=portrait_dims(model.config.d_model).tolist(),
        thresholds=thresholds,
        layers=[_layer(index, layer, bits, thresholds) for index, layer in enumerate(statistics)],
        bits_per_byte=bits,
        early_stopping=measure_stopping(model, windows, byte_table),
    )
    return report, sample


def _iterations(config: ModelConfig, wanted: int | None, epsilon: float) -> tuple[int, int]:
    """The model's own iterations, and those to follow; RecipeError where the settings cannot be used."""
    if not epsilon > 0:
        raise RecipeError(f"epsilon {epsilon}: must be above 0")
    if config.integrator is None:
        steps = 2 * config.num_layers
        if wanted is not None:
            raise RecipeError(f"iterations {wanted}: this model is one system of {steps} steps; leave iterations out")
        return steps, steps
    own, followed = config.num_iterations, wanted or max(FEWEST_FOLLOWED, 2 * config.num_iterations)
    if followed < max(2, own):
        raise RecipeError(f"iterations {followed}: must be at least 2 and the model's own {own}")
    return own, followed


def _windows(text: Text, window: int, max_tokens: int, *, numbers_per_token: int) -> Callable[[], Iterator[Batch]]:
    """A function that begins the text anew, in at least FEWEST_BATCHES batches where it has as many windows."""
    text.check_window(window)
    num_windows = -(-min(max_tokens, text.num_targets) // window)
    rows = max(1, min(_BATCH_ELEMENTS // (numbers_per_token * window), num_windows // FEWEST_BATCHES))
    return partial(text.windows, window=window, batch_size=rows, max_tokens=max_tokens)


def _layer(index: int, statistics: PathStatistics, bits: IterationReport, thresholds: Thresholds) -> LayerReport:
    without = bits.without_layer[index] if bits.without_layer else {"change": None, "standard_error": None}
    change, error = without["change"], without["standard_error"]
    evidence = gather(statistics, bits.bits_per_byte, change, error_without=error)
    verdict = judge(evidence, thresholds, unit="iteration" if bits.without_layer else "step")
    beyond = None
    if statistics.num_iterations > statistics.used_iterations:
        beyond = judge(gather(statistics, bits.bits_per_byte, None, beyond=True), thresholds)
    return LayerReport(index, verdict, beyond, evidence, statistics.used_iterations, statistics.rows())


def default_directory(checkpoint: Path) -> Path:
    """reports/convergence-step-N of the checkpoint's run; below the working directory when it is in none."""
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else Path()
    return run / "reports" / f"convergence-{checkpoint.name}"


def write_report(
    report: ConvergenceReport, sample: TokenSample, directory: Path, coefficients: pa.Table | None = None
) -> tuple[list[str], str | None]:
    """Write all files of a report, in place of those of an earlier report in the same directory.

    Args:
        coefficients: of a stream, as `coefficient_table` has them.

    Returns:
        The names of the files; why there are no figures among them, None when there are.
    """
    directory.mkdir(parents=True, exist_ok=True)
    for name in (*FIGURES, *STREAM_FIGURES, "coefficients.parquet"):
        (directory / name).unlink(missing_ok=True)
    summary, figures, warning = report.summary(), [], None
    files = ["report.html", "report.md", "summary.json", "trajectories.parquet"]
    try:
        if coefficients is None:
            figures = draw_figures(DRAW, summary, sample.table(), directory)
        else:
            figures = draw_figures(stream_drawings(coefficients), summary, sample.table(), directory)
    except ImportError:
        warning = 'no figures: they need matplotlib, which pip install "inl[plot]" brings'
    if coefficients is not None:
        files.append("coefficients.parquet")
        pq.write_table(coefficients, directory / files[-1])
    sample.write(directory / "trajectories.parquet")
    (directory / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    to_text = to_markdown if coefficients is None else stream_to_markdown
    (directory / "report.md").write_text(to_text(summary, figures, warning), encoding="utf-8")
    write_page(convergence_page(summary), directory / "report.html")
    return [*files, *figures], warning
