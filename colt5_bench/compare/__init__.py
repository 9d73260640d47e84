"""Comparison of two runs: a verdict on each figure, and the regressions."""

from colt5_bench.compare.baselines import read_baseline
from colt5_bench.compare.findings import Comparison, Finding
from colt5_bench.compare.thresholds import Rules, ThresholdsError, load_rules
from colt5_bench.compare.verdicts import IncomparableError, compare

__all__ = [
    "Comparison",
    "Finding",
    "IncomparableError",
    "Rules",
    "ThresholdsError",
    "compare",
    "load_rules",
    "read_baseline",
]
