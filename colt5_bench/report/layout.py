"""Layout of the records of a suite in plots of any kind: axes, lines, panels and figures."""

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
"""Fields for the layout of divergence. The first one that varies is used."""

SCHEDULE_FIELD = "eps"
"""Field for the layout of divergence, together with fields that begin with its name and `_`."""

TRADED_FIELD = "segments"
"""A field that trades time for memory. If it varies, time is drawn against memory."""

RUN = "run"
"""The field along the axis of a history. Cases do not have it."""

MEMORY = PEAK.title
"""The axis of the plot of time against memory."""


ERROR_DECADES = (-8, 2)
"""Powers of ten that bound every chart of errors, so that charts can be compared."""


@dataclass(frozen=True)
class View:
    """Options of a suite for the plots of its records."""

    x: str = "n"
    """The case field that plots are drawn against."""

    lines: Sequence[str] = ()
    """Case fields whose combinations are lines in plots of metrics, not panels."""

    reference: str = "reference"
    """The implementation that others are compared with."""

    description: str = ""

    crossover: bool = False
    """True if the page shows from which x on each implementation is faster than the reference."""

    @classmethod
    def of(cls, suite: Grid) -> "View":
        """The view of a suite."""
        return cls(suite.x_axis, suite.lines, suite.reference, suite.description, suite.crossover)


@dataclass(frozen=True)
class Drawn:
    """A figure of records that is drawn."""

    of: Callable[[Record], float | None]

    interval: Callable[[Record], Interval | None] = lambda record: None
    """The 95 % interval of the figure; None if it has no noise."""

    name: str = ""
    """Name in the legend, if there are several."""


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
"""The bandwidth at the least time that the device needs, in GB/s."""

PEAK_MEGABYTES = Drawn(lambda record: times(record.peak_bytes, 1e-6), name="peak")
SAVED_MEGABYTES = Drawn(lambda record: times(record.saved_bytes, 1e-6), name="saved")


def times(value: float | None, unit: float) -> float | None:
    """The value in another unit, if there is one."""
    return None if value is None else value * unit


def series(record: Record, lines: Sequence[str] = ()) -> str:
    """Name of the line that a record belongs to."""
    return " ".join(part for part in (record.implementation, label(record.fields, lines)) if part)


def strokes(records: Iterable[Record], lines: Sequence[str], kinds: Sequence[T]) -> dict[str, T]:
    """Stroke of each line. Lines of an implementation have the same colour, and differ in their strokes."""
    several = dict.fromkeys(label(record.fields, lines) for record in records)
    return {name: kinds[place % len(kinds)] for place, name in enumerate(several)}


def panel_fields(x: str, lines: Sequence[str], records: Sequence[Record]) -> list[str]:
    """The fields whose combinations are panels. They vary, and are neither x nor determined by it."""
    along = (x, TRADED_FIELD) if x == MEMORY else (x,)
    return [
        name for name in varying_fields(records) if name not in (*along, *lines) and not _goes_with(x, name, records)
    ]


def combinations(fields: Sequence[str], records: Iterable[Record]) -> list[str]:
    """The combinations of the fields, the most frequent first."""
    return [name for name, _ in Counter(label(record.fields, fields) for record in records).most_common()]


def divergence_fields(x: str, records: Sequence[Record]) -> tuple[str, list[str], list[str]]:
    """The x field of divergence, and the fields of spread and of the schedule of temperatures.

    The x field is `n_iters` if all records have it and it varies, except in a history.
    """
    varying = varying_fields(records)
    if x != RUN and "n_iters" in varying and all(record.fields["n_iters"] is not None for record in records):
        x = "n_iters"
    schedule = [name for name in varying if name == SCHEDULE_FIELD or name.startswith(f"{SCHEDULE_FIELD}_")]
    return x, [name for name in SPREAD_FIELDS if name in varying and name != x][:1], schedule


def traded(records: Iterable[Record]) -> list[Record]:
    """Records with a field that trades time for memory, and their peak memory as the x field."""
    sized = [record for record in records if record.peak_bytes and TRADED_FIELD in record.fields]
    if TRADED_FIELD not in varying_fields(sized):
        return []
    return [replace(record, fields={**record.fields, MEMORY: (record.peak_bytes or 0) / 1e6}) for record in sized]


def largest_error(record: Record) -> float | None:
    """The value, or None if a logarithmic axis cannot show it: zero, infinity, NaN."""
    gradient = worst_gradient(record)
    return gradient.largest if gradient and 0 < gradient.largest < inf else None


def error_on_scale(record: Record) -> float | None:
    """The largest error as charts draw it. Errors beyond the scale are drawn at its end."""
    error = largest_error(record)
    return None if error is None else min(max(error, 10.0 ** ERROR_DECADES[0]), 10.0 ** ERROR_DECADES[1])


def reached(records: Sequence[Record], drawn: Sequence[Drawn]) -> list[float]:
    """The values and interval ends that a vertical axis has to show. Noise may span many decades, and would leave no
    room for the plot. So interval ends are at most a decade beyond all values."""
    pairs = [(record, each) for record in records for each in drawn]
    values = [value for record, each in pairs if (value := each.of(record)) is not None]
    ends = [end for record, each in pairs for end in each.interval(record) or () if 0 < end < inf]
    shown = [value for value in values if 0 < value < inf]
    return [*values, *(min(max(end, min(shown) / 10), 10 * max(shown)) for end in ends if shown)]


def decades(values: Iterable[float]) -> tuple[int, int]:
    """The powers of ten that bound all values, at least one apart: the ends of a logarithmic axis."""
    logarithms = [log10(value) for value in values if 0 < value < inf] or [0.0]
    lowest = floor(min(logarithms))
    return lowest, max(ceil(max(logarithms)), lowest + 1)


def by_fields(records: Iterable[Record], names: Sequence[str]) -> list[list[Record]]:
    """Records grouped by the named fields."""
    return group_by(records, lambda record: label(record.fields, names))


def tick(value: object) -> str:
    """Powers of two in short form: 4k, 1M."""
    if not isinstance(value, int | float):
        return str(value)
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if value >= size and value % size == 0:
            return f"{value // size:g}{unit}"
    return f"{value:g}"


def _goes_with(x: str, name: str, records: Iterable[Record]) -> bool:
    """True if a field has a different value for each x, as the number of rows may have.

    In a history, a field that differs between runs does not count.
    """
    if x == RUN:
        return False
    pairs = {(str(record.fields[x]), str(record.fields.get(name))) for record in records}
    return len(pairs) == len({at for at, _ in pairs}) == len({value for _, value in pairs})
