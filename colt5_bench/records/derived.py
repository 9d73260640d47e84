"""Figures derived from records: labels of cases, speed-ups, intervals, and short texts for them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from itertools import takewhile
from math import inf, isfinite, isnan
from statistics import geometric_mean
from typing import Any, TypeVar, cast

import numpy as np

from colt5_bench.records.results import Divergence, Record
from colt5_bench.records.samples import beside, intervals

Interval = tuple[float, float]

T = TypeVar("T")


def group_by(records: Iterable[T], key: Callable[[T], object]) -> list[list[T]]:
    """Records, or findings, grouped by key, in the order of the first of each group."""
    groups: dict[object, list[T]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.values())


def summarised(record: Record) -> dict[str, Any]:
    """The record without its samples, with the median of each time column in seconds."""
    info = asdict(record)
    for column, timing in info["timings"].items():
        del timing["samples"]
        timing["median"] = record.seconds(column)
    return info


def varying_fields(records: Sequence[Record]) -> list[str]:
    """The case fields that differ between records, in the order of the case."""
    names = dict.fromkeys(name for record in records for name in record.fields)
    return [name for name in names if len({text(record.fields.get(name)) for record in records}) > 1]


def text(value: object) -> str:
    """The value of a field as a short text."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def label(fields: Mapping[str, object], names: Iterable[str]) -> str:
    """`n=512 eps=0.1`: the named fields that have a value."""
    return " ".join(f"{name}={text(fields[name])}" for name in names if fields.get(name) is not None)


def severity(divergence: Divergence) -> float:
    """The largest error, for comparisons. NaN counts as the worst."""
    return inf if isnan(divergence.largest) else divergence.largest


def worst(record: Record) -> Divergence | None:
    """The tensor with the largest error."""
    return max(record.accuracy.values(), key=severity, default=None)


def worst_gradient(record: Record) -> Divergence | None:
    """The gradient with the largest error."""
    gradients = (divergence for tensor, divergence in record.accuracy.items() if tensor != "output")
    return max(gradients, key=severity, default=None)


def main_column(records: Iterable[Record]) -> str:
    """The time column that gives the figures of records. It is GPU time with a cold L2 if there is any, else wall
    time."""
    return "cold" if any(record.seconds("cold") is not None for record in records) else "wall"


def bandwidth(record: Record, column: str) -> float | None:
    """The fewest possible bytes over the time, in bytes per second."""
    seconds = record.seconds(column)
    return record.minimum_bytes / seconds if seconds and record.minimum_bytes else None


def share_of_limit(record: Record, column: str) -> float | None:
    """The least time that the device needs over the measured time."""
    seconds = record.seconds(column)
    return record.limit_seconds / seconds if seconds and record.limit_seconds else None


def time_intervals(records: Sequence[Record], column: str) -> list[Interval | None]:
    """Intervals of the medians of a time column, from the run alone. All at once are faster than one by one."""
    samples = [timing.samples if (timing := record.timings.get(column)) else [] for record in records]
    known = iter(_intervals([each for each in samples if each]))
    return [next(known) if each else None for each in samples]


def speed_ups(records: Sequence[Record], reference: str, column: str) -> list[float | None]:
    """Speed-up of each record over the reference on the same case, in the same direction and run."""
    seconds = {id(record): record.seconds(column) or 0.0 for record in records}
    pairs = _beside_reference(records, reference, column)
    return [seconds[id(pair[1])] / seconds[id(pair[0])] if pair else None for pair in pairs]


def speed_up_intervals(records: Sequence[Record], reference: str, column: str) -> list[Interval | None]:
    """Intervals of the same speed-ups, by rounds, so that a common slowdown in a round is no noise. None for the
    reference itself."""
    pairs = _beside_reference(records, reference, column)
    ratios = [
        beside(pair[1].timings[column].samples, pair[0].timings[column].samples)
        for pair in pairs
        if pair and pair[0] is not pair[1]
    ]
    known = iter(_intervals(ratios))
    return [next(known) if pair and pair[0] is not pair[1] else None for pair in pairs]


def faster_from(records: Sequence[Record], reference: str, column: str, x: str) -> dict[tuple[str, str], str]:
    """The least value of a field from which on each implementation is certainly faster than the reference.

    Args:
        records: records of one suite.
        reference: the name of the implementation that others are compared with.
        column: the time column.
        x: the field, with numbers as values.

    Returns:
        By implementation and line (the other fields of the case, and the direction): this value; or `not to` and the
        largest value with times of both; or nothing if there is none.
    """
    bounds = dict(zip(map(id, records), speed_up_intervals(records, reference, column), strict=True))
    fields = [name for name in varying_fields(records) if name != x]
    lines = group_by(records, lambda each: (each.implementation, each.direction, label(each.fields, fields)))
    found = {}
    for group in lines:
        compared = sorted((each for each in group if bounds[id(each)]), key=lambda each: cast(float, each.fields[x]))
        faster = list(takewhile(lambda each: (bounds[id(each)] or (0.0,))[0] > 1, reversed(compared)))
        line = f"{label(group[0].fields, fields)} {group[0].direction}".strip()
        last = text(compared[-1].fields[x]) if compared else ""
        found[group[0].implementation, line] = (
            text(faster[-1].fields[x]) if faster else f"not to {last}" if last else ""
        )
    return found


def spans_one(interval: Interval | None) -> bool:
    """True if a ratio with this interval shows no difference."""
    return interval is not None and interval[0] <= 1 <= interval[1]


def mean_speed_up(ratios: Sequence[float], bounds: Sequence[Interval]) -> tuple[float, Interval]:
    """The geometric mean of speed-ups with these intervals, and its own interval. The noise of pairs counts as
    independent."""
    with np.errstate(all="ignore"):  # Interval of a pair with too few samples.
        logarithms = np.log(bounds)
        mean, reaches = logarithms.mean(), np.diff(logarithms)[:, 0] / 2
        error = np.sqrt((reaches**2).sum()) / len(bounds)
    if not isfinite(error):
        return geometric_mean(ratios), (0.0, inf)
    return float(np.exp(mean)), (float(np.exp(mean - error)), float(np.exp(mean + error)))


def _beside_reference(records: Sequence[Record], reference: str, column: str) -> list[tuple[Record, Record] | None]:
    """Pairs of a record and the record of its reference, if both have times."""

    def point(record: Record) -> tuple[str, str, str, str]:
        return record.environment, record.suite, record.case, record.direction

    timed = [record for record in records if column in record.timings and record.timings[column].samples]
    theirs = {point(record): record for record in timed if record.implementation == reference}
    own = {id(record): theirs.get(point(record)) for record in timed}
    return [(record, base) if (base := own.get(id(record))) else None for record in records]


def _intervals(several: Sequence[Sequence[float]]) -> list[Interval]:
    return [(float(low), float(high)) for low, high in intervals(several)]


def plus_minus(interval: Interval | None) -> str:
    """`±2%`: half of the width of an interval on the logarithmic scale; empty without one, `±?` if it is unknown."""
    if interval is None:
        return ""
    low, high = interval
    return f"±{100 * ((high / low) ** 0.5 - 1):.2g}%" if low > 0 and high < inf else "±?"


def format_ratio(ratio: float, interval: Interval | None) -> str:
    """`4x±2%`, or `0.9-1.1x` if the interval contains 1 and so shows no difference."""
    if interval and spans_one(interval):
        return f"{short(interval[0])}-{short(interval[1])}x"
    return f"{short(ratio)}x{plus_minus(interval)}"


def measured_under(environment: Mapping[str, Any], precision: int = len("2026-11-23T22:05")) -> str:
    """`2026-11-23 22:05 a900dda`: date and revision of a run, which sorts by time. A plus is for uncommitted changes.
    Empty if neither is known."""
    git = environment.get("git") or {}
    revision = f"{git['revision'][:7]}{'+' if git.get('dirty') else ''}" if git.get("revision") else ""
    return f"{environment.get('utc', '')[:precision].replace('T', ' ')} {revision}".strip()


def short(value: float) -> str:
    """Three digits, or all of those before the point, without an exponent for usual values."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if value >= 1e-3 or value == 0 else f"{value:.1e}"
