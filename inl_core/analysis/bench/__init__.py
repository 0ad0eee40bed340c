"""Benchmarks: candidates measured by turns, each in a process of its own (docs/bench.md)."""

from inl_core.analysis.bench.choosing import Choice, first_candidate, other_candidate
from inl_core.analysis.bench.comparison import Comparison, Measured, Outcome, compare
from inl_core.analysis.bench.loading import LoaderSpeed, measure_loader
from inl_core.analysis.bench.measuring import Spread, describe_machine, describe_versions, spread
from inl_core.analysis.bench.parts import PartTimes
from inl_core.analysis.bench.settings import BenchSettings, Candidate
from inl_core.analysis.bench.startup import measure_startup

__all__ = [
    "BenchSettings",
    "Candidate",
    "Choice",
    "Comparison",
    "LoaderSpeed",
    "Measured",
    "Outcome",
    "PartTimes",
    "Spread",
    "compare",
    "describe_machine",
    "describe_versions",
    "first_candidate",
    "measure_loader",
    "measure_startup",
    "other_candidate",
    "spread",
]
