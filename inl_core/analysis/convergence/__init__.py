"""What the integrators of a trained model do on real text: trajectories, verdicts, and what iterating is worth."""

from inl_core.analysis.convergence.report import (
    ConvergenceReport,
    Written,
    default_directory,
    report_convergence,
    require_integrator,
    write_report,
)
from inl_core.analysis.convergence.verdict import Thresholds

__all__ = [
    "ConvergenceReport",
    "Thresholds",
    "Written",
    "default_directory",
    "report_convergence",
    "require_integrator",
    "write_report",
]
