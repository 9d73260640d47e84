"""The table of all records: its columns, a row a record, what a row opens, and the command that measures it anew."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from colt5_bench.report import bandwidth, label, main_column, share_of_limit, speed_ups, text, varying_fields, worst
from colt5_bench.report.layout import COLUMN_LABELS, View, by
from colt5_bench.results import Record

Cell = str | int | float | None


@dataclass(frozen=True)
class Column:
    """A column of the table."""

    title: str
    hint: str
    number: bool = False


@dataclass(frozen=True)
class Section:
    """A table of what one record holds besides its row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


def columns(records: Sequence[Record]) -> list[Column]:
    """The columns of a table of these records, whatever their suites."""
    times = [
        Column(f"{COLUMN_LABELS.get(name, name)} [ms]", "median of the samples", number=True)
        for name in _time_columns(records)
    ]
    return [
        Column("suite", ""),
        Column("implementation", ""),
        Column("case", "the fields that differ within the suite; open a row for all of them"),
        Column("direction", ""),
        Column("status", ""),
        *times,
        Column("speed-up", "over the reference of the suite, by the first column of times", number=True),
        Column("GB/s", "each input read once and each output written once, over the time", number=True),
        Column("of limit [%]", "the least time that the device needs, over the time", number=True),
        Column("peak [MB]", "most memory allocated during the call, beyond what was there before", number=True),
        Column("saved [MB]", "what stays for the backward pass", number=True),
        Column("largest error", "largest distance from fp64, of the output or of a gradient", number=True),
    ]


def rows(records: Sequence[Record], views: Mapping[str, View]) -> list[list[Cell]]:
    """The cells of each record, in the order of the columns."""
    times = _time_columns(records)
    cells: dict[int, list[Cell]] = {}
    for own in by(records, lambda record: record.suite):
        varying, main = varying_fields(own), main_column(own)
        reference = views.get(own[0].suite, View()).reference
        for record, ratio in zip(own, speed_ups(own, reference, main), strict=True):
            divergence = worst(record)
            cells[id(record)] = [
                record.suite,
                record.implementation,
                label(record.fields, varying),
                record.direction,
                record.status.replace("_", " "),
                *(_scaled(record.seconds(name), 1e3) for name in times),
                ratio,
                _scaled(bandwidth(record, main), 1e-9),
                _scaled(share_of_limit(record, main), 100),
                _scaled(record.peak_bytes, 1e-6),
                _scaled(record.saved_bytes, 1e-6),
                sayable(divergence.largest if divergence else None),
            ]
    return [cells[id(record)] for record in records]


def details(record: Record) -> list[Section]:
    """All that a record holds, but for the samples themselves."""
    sections = [Section("Case", ("field", "value"), [(name, text(value)) for name, value in record.fields.items()])]
    if record.timings:
        sections.append(_times_of(record))
    sections += [
        _table(title, by_name)
        for title, by_name in (
            ("Distance from fp64", {name: asdict(divergence) for name, divergence in record.accuracy.items()}),
            ("Kernels", {str(kernel.get("name")): _without(kernel, "name") for kernel in record.kernels}),
        )
        if by_name
    ]
    if record.metrics:
        rows = [(name, sayable(value)) for name, value in record.metrics.items()]
        sections.append(Section("Metrics", ("metric", "value"), rows))
    least = {
        "bytes": record.minimum_bytes,
        "exponentials": record.minimum_exponentials,
        "floating-point operations": record.minimum_flops,
        "seconds": record.limit_seconds,
    }
    known = [(name, value) for name, value in least.items() if value is not None]
    return [*sections, *([Section("The least that it takes", ("", ""), known)] if known else [])]


def command(record: Record, environments: Mapping[str, Mapping[str, Any]]) -> str:
    """What measures a record anew, with the preset that it was measured with."""
    environment = environments.get(record.environment, {})
    preset = re.search(r"--preset[ =](\w+)", str(environment.get("command", "")))
    words = ["python", "bench.py", "--suite", record.suite]
    words += ["--preset", preset[1]] if preset else []
    words += ["--impl", record.implementation, "-k", record.case]
    words += ["--device", "cpu"] if environment and not environment.get("gpu") else []
    return shlex.join(words)


def sayable(value: Cell) -> Cell:
    """JSON has no NaN and no infinity: they are said by name."""
    return str(value) if isinstance(value, float) and not isfinite(value) else value


def _time_columns(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.timings))


def _times_of(record: Record) -> Section:
    """The samples of each column in short, and everything else that stands beside them."""
    table = {}
    for name, timing in record.timings.items():
        samples = sorted(timing.samples)
        table[COLUMN_LABELS.get(name, name)] = {
            "median [ms]": _scaled(record.seconds(name), 1e3),
            "shortest [ms]": _scaled(samples[0], 1e3) if samples else None,
            "longest [ms]": _scaled(samples[-1], 1e3) if samples else None,
            "samples": len(samples),
            **_without(asdict(timing), "column", "samples"),
        }
    return _table("Times", table)


def _table(title: str, by_name: Mapping[str, Mapping[str, Any]]) -> Section:
    """A column for each name, and a line for whatever any of them has."""
    lines = dict.fromkeys(key for values in by_name.values() for key in values)
    rows = [[key.replace("_", " "), *(_cell(values.get(key)) for values in by_name.values())] for key in lines]
    return Section(title, ["", *by_name], rows)


def _cell(value: Any) -> Cell:
    if isinstance(value, dict):
        return ", ".join(f"{name}: {each}" for name, each in value.items()) or None
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value)) or None
    return sayable(value) if isinstance(value, float | int | None) and not isinstance(value, bool) else str(value)


def _without(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _scaled(value: float | None, unit: float) -> Cell:
    return None if value is None else sayable(value * unit)
