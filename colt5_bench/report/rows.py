"""The table of all records: columns, rows, details of a row, and commands that repeat a measurement."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from colt5_bench.records.columns import (
    BANDWIDTH,
    LARGEST_ERROR,
    PEAK,
    SAVED,
    SHARE_OF_LIMIT,
    SPEED_UP,
    Quantity,
    error_of,
    time,
)
from colt5_bench.records.derived import (
    Interval,
    bandwidth,
    format_ratio,
    group_by,
    label,
    main_column,
    measured_under,
    plus_minus,
    share_of_limit,
    short,
    speed_up_intervals,
    speed_ups,
    text,
    time_intervals,
    varying_fields,
    worst,
)
from colt5_bench.records.results import Record
from colt5_bench.report.layout import View

Cell = str | int | float | None | tuple[float, str]
"""A cell with an interval: the figure for sorting, and its text."""


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    title: str
    hint: str
    number: bool = False

    @classmethod
    def of(cls, quantity: Quantity, more: str = "") -> "Column":
        return cls(quantity.title, quantity.hint + more, number=True)


@dataclass(frozen=True)
class Section:
    """A table of the details of a record."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def columns(records: Sequence[Record]) -> list[Column]:
    """The columns of a table of these records, from any suites."""
    times = [Column.of(time(name), "; median of the samples and its 95 % interval") for name in _time_columns(records)]
    return [
        Column("suite", ""),
        Column("implementation", ""),
        Column("case", "the fields that differ within the suite; open a row for all of them"),
        Column("direction", ""),
        Column("status", ""),
        *times,
        Column.of(SPEED_UP, "; only its 95 % interval if there is no significant difference"),
        *map(Column.of, (BANDWIDTH, SHARE_OF_LIMIT, PEAK, SAVED, LARGEST_ERROR)),
        Column("measured", "date, revision (a plus: with uncommitted changes) and machine"),
    ]


def rows(
    records: Sequence[Record], views: Mapping[str, View], environments: Mapping[str, Mapping[str, Any]]
) -> list[list[Cell]]:
    """The cells of each record, in the order of the columns.

    Args:
        records: records of any suites.
        views: the view of each suite, by its name.
        environments: environments of the records, by their keys.
    """
    times = _time_columns(records)
    cells: dict[int, list[Cell]] = {}
    for group in group_by(records, lambda record: record.suite):
        varying, main = varying_fields(group), main_column(group)
        reference = views.get(group[0].suite, View()).reference
        ratios, bounds = speed_ups(group, reference, main), speed_up_intervals(group, reference, main)
        by_column = [time_intervals(group, name) for name in times]
        of_main = time_intervals(group, main)
        for at, record in enumerate(group):
            divergence, ratio = worst(record), ratios[at]
            environment = environments.get(record.environment, {})
            cells[id(record)] = [
                record.suite,
                record.implementation,
                label(record.fields, varying),
                record.direction,
                record.status.replace("_", " "),
                *(_noisy(record.seconds(name), 1e3, by_column[each][at]) for each, name in enumerate(times)),
                None if ratio is None else (ratio, format_ratio(ratio, bounds[at])),
                _noisy(bandwidth(record, main), 1e-9, of_main[at]),
                _noisy(share_of_limit(record, main), 100, of_main[at]),
                _scaled(record.peak_bytes, 1e-6),
                _scaled(record.saved_bytes, 1e-6),
                json_value(divergence.largest if divergence else None),
                " · ".join(filter(None, (measured_under(environment), record.device))),
            ]
    return [cells[id(record)] for record in records]


def details(record: Record, environment: Mapping[str, Any]) -> list[Section]:
    """All content of a record, except single samples, and its environment."""
    sections = [
        Section("Measured", ("", ""), _measured(record, environment)),
        Section("Case", ("field", "value"), [(name, text(value)) for name, value in record.fields.items()]),
    ]
    if record.timings:
        sections.append(_times_of(record))
    sections += [
        _table(title, by_name)
        for title, by_name in (
            (
                "Distance from fp64",
                {error_of(name).name: asdict(divergence) for name, divergence in record.accuracy.items()},
            ),
            ("Kernels", {str(kernel.get("name")): _without(kernel, "name") for kernel in record.kernels}),
        )
        if by_name
    ]
    if record.metrics:
        rows = [(name, json_value(value)) for name, value in record.metrics.items()]
        sections.append(Section("Metrics", ("metric", "value"), rows))
    least = {
        "bytes": record.minimum_bytes,
        "exponentials": record.minimum_exponentials,
        "floating-point operations": record.minimum_flops,
        "seconds": record.limit_seconds,
    }
    known = [(name, value) for name, value in least.items() if value is not None]
    return [*sections, *([Section("Least work", ("", ""), known)] if known else [])]


def _measured(record: Record, environment: Mapping[str, Any]) -> list[tuple[str, Cell]]:
    """Date, revision and machine of a record."""
    git = environment.get("git") or {}
    changed = " with uncommitted changes" if git.get("dirty") else ""
    facts = {
        "date": environment.get("utc"),
        "revision": f"{git['revision']}{changed}" if git.get("revision") else None,
        "device": record.device,
        "processor": environment.get("cpu"),
        "platform": environment.get("platform"),
        "torch": environment.get("torch"),
    }
    return [(name, "unknown" if value is None else str(value)) for name, value in facts.items()]


def command(record: Record, environments: Mapping[str, Mapping[str, Any]]) -> str:
    """The command that repeats the measurement of a record, with its preset."""
    environment = environments.get(record.environment, {})
    preset = re.search(r"--preset[ =](\w+)", str(environment.get("command", "")))
    words = ["python", "bench.py", "--suite", record.suite]
    words += ["--preset", preset[1]] if preset else []
    words += ["--impl", record.implementation, "-k", record.case]
    words += ["--device", "cpu"] if environment and not environment.get("gpu") else []
    return shlex.join(words)


def json_value(value: Cell) -> Cell:
    """The value as JSON can represent it, with NaN and infinities as strings."""
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _time_columns(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.timings))


def _times_of(record: Record) -> Section:
    """The samples of each column in short, and the other fields of the column."""
    table = {}
    for name, timing in record.timings.items():
        samples = sorted(timing.samples)
        low, high = time_intervals([record], name)[0] or (None, None)
        table[time(name).name] = {
            "median [ms]": _scaled(record.seconds(name), 1e3),
            "interval from [ms]": _scaled(low, 1e3),
            "interval to [ms]": _scaled(high, 1e3),
            "shortest [ms]": _scaled(samples[0], 1e3) if samples else None,
            "longest [ms]": _scaled(samples[-1], 1e3) if samples else None,
            "samples": len(samples),
            **_without(asdict(timing), "column", "samples"),
        }
    return _table("Times", table)


def _table(title: str, by_name: Mapping[str, Mapping[str, Any]]) -> Section:
    """A column for each name, and a line for each key of any of them."""
    lines = dict.fromkeys(key for values in by_name.values() for key in values)
    rows = [[key.replace("_", " "), *(_cell(values.get(key)) for values in by_name.values())] for key in lines]
    return Section(title, ["", *by_name], rows)


def _cell(value: Any) -> Cell:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {each}" for name, each in value.items()) or None
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value)) or None
    return json_value(value) if isinstance(value, float | int | None) and not isinstance(value, bool) else str(value)


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _noisy(value: float | None, unit: float, interval: Interval | None) -> Cell:
    """A time, or a figure computed from it, with the same relative interval."""
    return None if value is None else (value * unit, f"{short(value * unit)}{plus_minus(interval)}")


def _scaled(value: float | None, unit: float) -> Cell:
    return None if value is None else json_value(value * unit)
