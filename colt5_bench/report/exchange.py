"""A run in the formats of other tools. Only pytest-benchmark has to be installed."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import isfinite, nan
from types import MappingProxyType
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from pytest_benchmark.stats import Stats

from colt5_bench.records import provenance
from colt5_bench.records.columns import LARGEST_ERROR, time
from colt5_bench.records.derived import Interval, main_column, plus_minus, summarised, time_intervals, worst
from colt5_bench.records.lines import encode
from colt5_bench.records.results import Record, Run
from colt5_bench.report.layout import View
from colt5_bench.selection import SelectionError

LATENCY = "latency"
"""Name of Bencher's measure of time, in ns."""

LONGEST_NAME, LONGEST_MEASURE = 1024, 64
"""Most characters of a name of a benchmark and of a measure in Bencher."""


@dataclass(frozen=True)
class _Figure:
    """A figure of a record whose smaller values are better."""

    name: str
    unit: str
    value: float
    interval: Interval | None = None


def pytest_benchmark(run: Run) -> bytes:
    """The file of `--benchmark-json`: samples of the first time column, and all other figures as `extra_info`.

    Tests have the same names as with `pytest suites/`, so that the files can be compared.
    """
    column, environment = main_column(run.records), _environment(run, run.records[0])
    revision = provenance.named(environment.get("git"))
    return encode(
        {
            "machine_info": {
                "node": "",
                "cpu": {"brand_raw": run.records[0].device},
                "python_version": environment.get("python", ""),
                "system": environment.get("platform", ""),
            },
            "commit_info": {"id": revision or "unversioned", "dirty": "+" in (revision or "")},
            "benchmarks": [_benchmark(record, column) for record in _ok(run.records) if record.seconds(column)],
            "datetime": environment.get("utc", ""),
            "version": version("pytest-benchmark"),
        }
    )


def github_action_benchmark(run: Run) -> bytes:
    """The input of its tool `customSmallerIsBetter`: times, peak memory and the largest error of each record."""
    return encode(
        [
            {
                "name": f"{_title(record)} {figure.name}",
                "unit": figure.unit,
                "value": figure.value,
                **({"range": plus_minus(figure.interval)} if figure.interval else {}),
                "extra": record.device,
            }
            for record, figures in _figures(run.records)
            for figure in figures
        ]
    )


def bencher(run: Run) -> bytes:
    """Bencher Metric Format: the first time column as `latency` in ns, and other figures by their names."""
    main = main_column(run.records)

    def measures(record: Record, figures: Sequence[_Figure]) -> dict[str, dict[str, float]]:
        metrics = [_Figure(name, "", value) for name, value in record.metrics.items() if isfinite(value)]
        return {
            LATENCY if each.name == main else _slug(f"{each.name} {each.unit}"): _metric(each, each.name == main)
            for each in (*figures, *metrics)
        }

    return encode(
        {_title(record)[:LONGEST_NAME]: measures(record, figures) for record, figures in _figures(run.records)}
    )


def flashinfer_bench(run: Run, views: Mapping[str, View]) -> bytes:
    """Traces of flashinfer-bench, one per line. Skipped or untimed records have none.

    A definition is a suite with the text fields of its case; axes are the integer fields.

    Args:
        views: the views of suites by name, with their references.
    """
    column = main_column(run.records)
    reference = {
        record.group: record.seconds(column)
        for record in _ok(run.records)
        if record.implementation == views.get(record.suite, View()).reference
    }
    shown = [each for each in run.records if each.status != "skipped" and (each.status != "ok" or each.seconds(column))]
    return b"".join(
        encode(
            {
                "definition": _definition(record),
                "workload": _workload(record),
                "solution": record.implementation,
                "evaluation": _evaluation(record, column, reference.get(record.group), _environment(run, record)),
            }
        )
        for record in shown
    )


FORMATS: Mapping[str, Callable[[Run, Mapping[str, View]], bytes]] = {
    "pytest-benchmark": lambda run, views: pytest_benchmark(run),
    "github-action-benchmark": lambda run, views: github_action_benchmark(run),
    "bencher": lambda run, views: bencher(run),
    "flashinfer-bench": flashinfer_bench,
}


def export(run: Run, form: str, views: Mapping[str, View] = MappingProxyType({})) -> bytes:
    """The run in one of `FORMATS`.

    Args:
        views: the view of each suite, by its name.

    Raises:
        SelectionError: the run has no records, is of several machines, or has several records of one point.
    """
    if not run.records:
        raise SelectionError(f"{run.path} contains no records.")
    devices = list(dict.fromkeys(record.device for record in run.records))
    if len(devices) > 1:
        raise SelectionError(f"{run.path} was measured on {' and '.join(devices)}: export the run of one machine.")
    key, count = Counter(record.key for record in run.records).most_common(1)[0]
    if count > 1:
        raise SelectionError(f"{run.path} contains {count} records of {' '.join(key)}: export one run.")
    return FORMATS[form](run, views)


def _ok(records: Sequence[Record]) -> Iterator[Record]:
    return (record for record in records if record.status == "ok")


def _environment(run: Run, record: Record) -> dict[str, Any]:
    return run.environments.get(record.environment, {})


def _title(record: Record) -> str:
    return " ".join(record.key)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:LONGEST_MEASURE]


def _figures(records: Sequence[Record]) -> Iterator[tuple[Record, list[_Figure]]]:
    """Finite figures of all records that are ok."""
    ok = list(_ok(records))
    columns = list(dict.fromkeys(column for record in ok for column in record.timings))
    intervals = {column: time_intervals(ok, column) for column in columns}
    for place, record in enumerate(ok):
        found = [
            _Figure(column, time(column).unit, 1e3 * seconds, (1e3 * bounds[0], 1e3 * bounds[1]))
            for column in columns
            if (seconds := record.seconds(column)) is not None and (bounds := intervals[column][place])
        ]
        if record.peak_bytes is not None:
            found.append(_Figure("peak", "bytes", record.peak_bytes))
        if divergence := worst(record):
            found.append(_Figure(LARGEST_ERROR.name, LARGEST_ERROR.unit, divergence.largest))
        yield record, [figure for figure in found if isfinite(figure.value)]


def _metric(figure: _Figure, in_nanoseconds: bool) -> dict[str, float]:
    factor = 1e6 if in_nanoseconds else 1.0
    bounds = zip(("lower_value", "upper_value"), figure.interval or (), strict=False)
    return {"value": factor * figure.value, **{name: factor * bound for name, bound in bounds if isfinite(bound)}}


def _benchmark(record: Record, column: str) -> dict[str, Any]:
    stats = Stats()
    for sample in record.timings[column].samples:
        stats.update(sample)
    name = f"test_{record.suite}[{record.case}-{record.direction}-{record.implementation}]"
    return {
        "group": f"{record.case} {record.direction}",
        "name": name,
        "fullname": f"suites/{record.suite}.py::{name}",
        "params": {"direction": record.direction, "implementation": record.implementation},
        "param": name[name.index("[") + 1 : -1],
        "extra_info": {**summarised(record), "column": column},
        "options": {},
        "stats": {**stats.as_dict(), "data": stats.data, "iterations": 1},
    }


def _definition(record: Record) -> str:
    words = [value for value in record.fields.values() if isinstance(value, str)]
    return "_".join(re.sub(r"\W+", "_", word) for word in (record.suite, record.direction, *words))


def _workload(record: Record) -> dict[str, Any]:
    numbers = {name: value for name, value in record.fields.items() if isinstance(value, int | float)}
    axes = {name: value for name, value in numbers.items() if type(value) is int and value >= 0}
    return {
        "axes": axes,
        "inputs": {name: {"type": "scalar", "value": numbers[name]} for name in numbers if name not in axes},
        "uuid": str(uuid5(NAMESPACE_URL, f"colt5-bench:{record.suite}:{record.case}")),
    }


def _evaluation(record: Record, column: str, reference: float | None, environment: Mapping[str, Any]) -> dict[str, Any]:
    libraries = {
        **{name: environment.get(name) for name in ("torch", "triton", "cuda")},
        **environment.get("packages", {}),
    }
    statuses = {"ok": "PASSED", "wrong": "INCORRECT_NUMERICAL"}
    evaluation = {
        "status": statuses.get(record.status, "RUNTIME_ERROR"),
        "environment": {"hardware": record.device, "libs": {name: value for name, value in libraries.items() if value}},
        "timestamp": environment.get("utc") or "unknown",
        "log": record.reason,
    }
    if record.status in statuses:
        divergence = worst(record)
        # Records do not have the largest relative error of an element.
        evaluation["correctness"] = {
            "max_relative_error": nan,
            "max_absolute_error": divergence.largest if divergence else nan,
            "extra": {"relative_norm": divergence.relative if divergence else nan},
        }
    if record.status == "ok":
        seconds = record.seconds(column) or nan
        evaluation["performance"] = {
            "latency_ms": 1e3 * seconds,
            "reference_latency_ms": 1e3 * (reference or 0.0),
            "speedup_factor": (reference or 0.0) / seconds,
        }
    return evaluation
