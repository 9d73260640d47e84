"""How the records of a suite are laid out in plots, whatever draws them: axes, lines, panels and colours."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TypeVar

from colt5_bench.report import label, varying_fields, worst_gradient
from colt5_bench.results import Record
from colt5_bench.suite import Suite

T = TypeVar("T")

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
"""Okabe and Ito's palette, which every kind of colour vision tells apart."""

COLUMN_LABELS = {
    "cold": "GPU time, cold L2",
    "warm": "GPU time, warm L2",
    "graph": "GPU time, CUDA graph",
    "wall": "wall time",
}
"""What the time columns of a record are called along an axis."""

SPREAD_FIELDS = ("score_std", "std")
"""Divergence is laid out by the first of these that varies."""

SCHEDULE_FIELD = "eps"
"""Divergence is laid out by this and the fields that begin with its name and `_`."""

TRADED_FIELD = "segments"
"""A field that trades time for memory: where it varies, the one is drawn against the other."""

RUN = "run"
"""The field that a history is drawn along: no field of a case."""

MEMORY = "peak memory [MB]"
"""The axis of that plot."""


@dataclass(frozen=True)
class View:
    """How a suite asks its records to be looked at."""

    x: str = "n"
    """The case field that plots are drawn against."""

    lines: Sequence[str] = ()
    """Case fields each combination of which is a line in plots of metrics, and no panel."""

    reference: str = "reference"
    """The implementation that speed-ups are over."""

    description: str = ""

    @classmethod
    def of(cls, suite: Suite) -> "View":
        """What a suite says of itself."""
        return cls(suite.x_axis, suite.lines, suite.reference, suite.description)


def series(record: Record, lines: Sequence[str] = ()) -> str:
    """Which line a record belongs to."""
    return " ".join(part for part in (record.implementation, label(record.fields, lines)) if part)


def places(records: Iterable[Record], lines: Sequence[str] = ()) -> dict[str, int]:
    """The lines, in order of appearance: who draws the same records gives each line the same place."""
    return {name: place for place, name in enumerate(dict.fromkeys(series(record, lines) for record in records))}


def colour(place: int) -> str:
    """The colour of a line; they begin anew after the last."""
    return COLOURS[place % len(COLOURS)]


def panel_fields(x: str, lines: Sequence[str], records: Sequence[Record]) -> list[str]:
    """The fields each combination of which has a panel of its own: what varies, and neither is nor goes with x."""
    along = (x, TRADED_FIELD) if x == MEMORY else (x,)
    return [
        name for name in varying_fields(records) if name not in (*along, *lines) and not _goes_with(x, name, records)
    ]


def combinations(fields: Sequence[str], records: Iterable[Record]) -> list[str]:
    """The combinations of the fields, the commonest first."""
    return [name for name, _ in Counter(label(record.fields, fields) for record in records).most_common()]


def divergence_fields(x: str, records: Sequence[Record]) -> tuple[str, list[str], list[str]]:
    """What divergence is drawn against, and the fields of its spread and of its schedule of temperatures.

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


def by(records: Iterable[T], key: Callable[[T], object]) -> list[list[T]]:
    """Records with the same key, or findings on them, in the order of the first of each."""
    groups: dict[object, list[T]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.values())


def by_fields(records: Iterable[Record], names: Sequence[str]) -> list[list[Record]]:
    """Records that agree in the named fields."""
    return by(records, lambda record: label(record.fields, names))


def tick(value: object) -> str:
    """Powers of two as they are said: 4k, 1M."""
    if not isinstance(value, int | float):
        return str(value)
    for unit, size in (("M", 2**20), ("k", 2**10)):
        if value >= size and value % size == 0:
            return f"{value // size:g}{unit}"
    return f"{value:g}"


def _goes_with(x: str, name: str, records: Iterable[Record]) -> bool:
    """Whether a field has a value of its own for each x, as the number of rows may have for each length.

    That runs measured different cases makes these no line: what differs between runs never goes with them.
    """
    if x == RUN:
        return False
    pairs = {(str(record.fields[x]), str(record.fields.get(name))) for record in records}
    return len(pairs) == len({at for at, _ in pairs}) == len({value for _, value in pairs})
