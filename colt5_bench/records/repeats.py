"""Figures of training runs repeated with other seeds: means, intervals, differences, and equal times."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import fmean

import numpy as np

from colt5_bench.records.derived import group_by
from colt5_bench.records.results import Record

SEED = "seed"
"""The case field in which repeats differ."""

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """The mean of repeats, and half of the width of its 95 % interval by the t-distribution."""

    mean: float
    reach: float
    """Infinite if there is one repeat."""

    @classmethod
    def of(cls, values: Sequence[float]) -> "Estimate":
        from scipy.special import stdtrit  # Imported here, because it takes long.

        count = len(values)
        if count < 2:
            return cls(fmean(values), inf)
        error = np.std(values, ddof=1) / sqrt(count)
        return cls(fmean(values), float(stdtrit(count - 1, (1 + CONFIDENCE) / 2) * error))

    @property
    def is_zero(self) -> bool:
        """True if the interval contains 0 and so shows no difference."""
        return abs(self.mean) <= self.reach


@dataclass(frozen=True)
class Repeats:
    """Records of an implementation that differ only in their seeds."""

    records: Sequence[Record]

    @property
    def implementation(self) -> str:
        return self.records[0].implementation

    def of(self, metric: str) -> Estimate | None:
        values = [record.metrics[metric] for record in self.records if metric in record.metrics]
        return Estimate.of(values) if values else None

    def difference(self, other: "Repeats", metric: str) -> Estimate | None:
        """The difference from another implementation per seed. Both had the same data in the same order."""
        theirs = {record.fields[SEED]: record.metrics.get(metric) for record in other.records}
        pairs = [(record.metrics.get(metric), theirs.get(record.fields[SEED])) for record in self.records]
        differences = [own - their for own, their in pairs if own is not None and their is not None]
        return Estimate.of(differences) if differences else None

    def at(self, seconds: float, curve: str) -> Estimate | None:
        """A curve after a number of seconds of training, interpolated between evaluations; None before the first
        one."""
        curves = [record.curves for record in self.records if curve in record.curves]
        if not curves or any(seconds < each["seconds"][0] for each in curves):
            return None
        return Estimate.of([float(np.interp(seconds, each["seconds"], each[curve])) for each in curves])


def repeats(records: Sequence[Record]) -> list[list[Repeats]]:
    """Repeats of each implementation, grouped by case."""

    def but_seed(record: Record) -> str:
        return str({name: value for name, value in record.fields.items() if name != SEED})

    return [
        [Repeats(own) for own in group_by(of_case, lambda record: record.implementation)]
        for of_case in group_by(records, but_seed)
    ]


def equal_seconds(group: Sequence[Repeats]) -> float:
    """The longest time that all runs of a case had."""
    ends = [record.curves["seconds"][-1] for each in group for record in each.records if "seconds" in record.curves]
    return min(ends, default=0.0)
