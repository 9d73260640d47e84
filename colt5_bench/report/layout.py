"""Layout of the records of a suite in plots, whatever draws them: axes, lines, panels and figures."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor, inf, log10
from typing import TypeVar

from colt5_bench.records.columns import PEAK
from colt5_bench.records.derived import (
    Interval,
    bandwidth,
    group_by,
    label,
    time_intervals,
    varying_fields,
    worst_gradient,
)
from colt5_bench.records.results import Record
from colt5_bench.suite import Grid

T = TypeVar("T")

SPREAD_FIELDS = ("score_std", "std")
"""Divergence is laid out by the first of these that varies."""

SCHEDULE_FIELD = "eps"
"""Divergence is laid out by this and the fields that begin with its name and `_`."""

TRADED_FIELD = "segments"
"""A field that trades time for memory: where it varies, the one is drawn against the other."""

RUN = "run"
"""The field that a history is drawn along: no field of a case."""

MEMORY = PEAK.title
"""The axis of that plot."""


ERROR_DECADES = (-8, 2)
"""The powers of ten between which every chart of errors lies, so that any two can be compared."""


@dataclass(frozen=True)
class View:
    """A suite's wishes for the plots of its records."""

    x: str = "n"
    """The case field that plots are drawn against."""

    lines: Sequence[str] = ()
    """Case fields each combination of which is a line in plots of metrics, and no panel."""

    reference: str = "reference"
    """The implementation that speed-ups are over."""

    description: str = ""

    crossover: bool = False
    """True if the page says from which x on each implementation is faster than the reference."""

    @classmethod
    def of(cls, suite: Grid) -> "View":
        """The view that a suite asks for."""
        return cls(suite.x_axis, suite.lines, suite.reference, suite.description, suite.crossover)


@dataclass(frozen=True)
class Drawn:
    """A figure of records that is drawn."""

    of: Callable[[Record], float | None]

    interval: Callable[[Record], Interval | None] = lambda record: None
    """The 95 % interval of the figure; None for what has no noise."""

    name: str = ""
    """For the legend, where there are several."""


def milliseconds(records: Sequence[Record], column: str) -> Drawn:
    """A time column of these records."""
    bounds = dict(zip(map(id, records), time_intervals(records, column), strict=True))

    def interval(record: Record) -> Interval | None:
        own = bounds[id(record)]
        return own and (1e3 * own[0], 1e3 * own[1])

    return Drawn(lambda record: times(record.seconds(column), 1e3), interval)


def gigabytes_a_second(records: Sequence[Record], column: str) -> Drawn:
    """The bandwidth of these records by a time column."""
    time = milliseconds(records, column)

    def interval(record: Record) -> Interval | None:
        own, size = time.interval(record), record.minimum_bytes or 0
        return own and (size / own[1] / 1e6, size / own[0] / 1e6 if own[0] else inf)

    return Drawn(lambda record: times(bandwidth(record, column), 1e-9), interval)


LIMIT_TIME = Drawn(lambda record: times(record.limit_seconds, 1e3), name="limit of the device")
"""The least time that the device needs, in milliseconds."""

LIMIT_BANDWIDTH = Drawn(
    lambda record: (
        record.minimum_bytes / record.limit_seconds / 1e9 if record.minimum_bytes and record.limit_seconds else None
    ),
    name="limit of the device",
)
"""The bandwidth of what takes the least time that the device needs, in GB/s."""

PEAK_MEGABYTES = Drawn(lambda record: times(record.peak_bytes, 1e-6), name="peak")
SAVED_MEGABYTES = Drawn(lambda record: times(record.saved_bytes, 1e-6), name="saved")


def times(value: float | None, unit: float) -> float | None:
    """The value in another unit, if there is one."""
    return None if value is None else value * unit


def series(record: Record, lines: Sequence[str] = ()) -> str:
    """Name of the line that a record belongs to."""
    return " ".join(part for part in (record.implementation, label(record.fields, lines)) if part)


def strokes(records: Iterable[Record], lines: Sequence[str], kinds: Sequence[T]) -> dict[str, T]:
    """Kind of stroke of each line. All lines of an implementation have its colour, and are told apart by this."""
    several = dict.fromkeys(label(record.fields, lines) for record in records)
    return {name: kinds[place % len(kinds)] for place, name in enumerate(several)}


def panel_fields(x: str, lines: Sequence[str], records: Sequence[Record]) -> list[str]:
    """The fields each combination of which has a panel of its own. They vary, and none is x or goes with it."""
    along = (x, TRADED_FIELD) if x == MEMORY else (x,)
    return [
        name for name in varying_fields(records) if name not in (*along, *lines) and not _goes_with(x, name, records)
    ]


def combinations(fields: Sequence[str], records: Iterable[Record]) -> list[str]:
    """The combinations of the fields, the commonest first."""
    return [name for name, _ in Counter(label(record.fields, fields) for record in records).most_common()]


def divergence_fields(x: str, records: Sequence[Record]) -> tuple[str, list[str], list[str]]:
    """The field that divergence is drawn against, and the fields of its spread and of its schedule of temperatures.

    It is drawn against `n_iters`, if all records have one and it varies, unless it is a history.
    """
    varying = varying_fields(records)
    if x != RUN and "n_iters" in varying and all(record.fields["n_iters"] is not None for record in records):
        x = "n_iters"
    schedule = [name for name in varying if name == SCHEDULE_FIELD or name.startswith(f"{SCHEDULE_FIELD}_")]
    return x, [name for name in SPREAD_FIELDS if name in varying and name != x][:1], schedule


def traded(records: Iterable[Record]) -> list[Record]:
    """Records with a field that trades time for memory, with their peak memory as a field to be drawn against."""
    sized = [record for record in records if record.peak_bytes and TRADED_FIELD in record.fields]
    if TRADED_FIELD not in varying_fields(sized):
        return []
    return [replace(record, fields={**record.fields, MEMORY: (record.peak_bytes or 0) / 1e6}) for record in sized]


def largest_error(record: Record) -> float | None:
    """None where there is nothing that a logarithmic axis could show: zero, infinity, NaN."""
    gradient = worst_gradient(record)
    return gradient.largest if gradient and 0 < gradient.largest < inf else None


def error_on_scale(record: Record) -> float | None:
    """The largest error as charts draw it: one that is beyond the scale lies on its end."""
    error = largest_error(record)
    return None if error is None else min(max(error, 10.0 ** ERROR_DECADES[0]), 10.0 ** ERROR_DECADES[1])


def reached(records: Sequence[Record], drawn: Sequence[Drawn]) -> list[float]:
    """All that a vertical axis has to show: values, and the ends of intervals near them. Noise may span many decades,
    and figures for these leave no room for the plot. So ends go a decade beyond all values at most."""
    pairs = [(record, each) for record in records for each in drawn]
    values = [value for record, each in pairs if (value := each.of(record)) is not None]
    ends = [end for record, each in pairs for end in each.interval(record) or () if 0 < end < inf]
    shown = [value for value in values if 0 < value < inf]
    return [*values, *(min(max(end, min(shown) / 10), 10 * max(shown)) for end in ends if shown)]


def decades(values: Iterable[float]) -> tuple[int, int]:
    """The powers of ten that all values lie between, one apart at least: the ends of a logarithmic axis."""
    logarithms = [log10(value) for value in values if 0 < value < inf] or [0.0]
    lowest = floor(min(logarithms))
    return lowest, max(ceil(max(logarithms)), lowest + 1)


def by_fields(records: Iterable[Record], names: Sequence[str]) -> list[list[Record]]:
    """Records that agree in the named fields."""
    return group_by(records, lambda record: label(record.fields, names))


def tick(value: object) -> str:
    """Powers of two as they are said: 4k, 1M."""
    if not isinstance(value, int | float):
        return str(value)
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if value >= size and value % size == 0:
            return f"{value // size:g}{unit}"
    return f"{value:g}"


def _goes_with(x: str, name: str, records: Iterable[Record]) -> bool:
    """True if a field has a value of its own for each x, as the number of rows may have.

    That runs measured different cases makes these no line: what differs between runs never goes with them.
    """
    if x == RUN:
        return False
    pairs = {(str(record.fields[x]), str(record.fields.get(name))) for record in records}
    return len(pairs) == len({at for at, _ in pairs}) == len({value for _, value in pairs})
