"""One HTML page of several runs: the fastest implementation of each point on each machine."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colt5_bench.files import atomic_write
from colt5_bench.records.columns import time
from colt5_bench.records.derived import (
    Interval,
    format_ratio,
    group_by,
    label,
    main_column,
    measured_under,
    plus_minus,
    short,
    time_intervals,
    varying_fields,
)
from colt5_bench.records.results import FAILED, Group, Record, Run
from colt5_bench.records.samples import beside, intervals
from colt5_bench.report.layout import View
from colt5_bench.report.page import template

LEADERBOARD = "leaderboard.html"
"""Name of the page."""

FIRST, TIED, BEHIND, BESIDE = "first", "tied", "", "beside"
"""Places. The fastest is first. If others do not differ significantly from it, all of these are tied. An
implementation of other work, such as a lower bound, has no place."""

Environments = Mapping[str, Mapping[str, Any]]
"""Environments by their keys."""


@dataclass(frozen=True)
class Entry:
    """An implementation at a point on a machine."""

    implementation: str
    place: str
    """A place, or the status of a record that failed."""

    time: str = ""
    """The median with half of its interval."""

    behind: str = ""
    """The time over the time of the fastest, with its interval."""


@dataclass(frozen=True)
class Row:
    """A case in a direction."""

    case: str
    direction: str
    cells: Sequence[Sequence[Entry]]
    """Entries on each machine, the fastest first."""


@dataclass(frozen=True)
class Standing:
    """An implementation of a suite."""

    implementation: str
    counts: Sequence[str]
    """Text for each machine: how often it is first and how often tied."""


@dataclass(frozen=True)
class Board:
    """The points of a suite."""

    suite: str
    description: str
    machines: Sequence[str]
    columns: Sequence[str]
    """Titles of the time columns, one for each machine."""

    standings: Sequence[Standing]
    rows: Sequence[Row]


def write_leaderboard(path: Path, runs: Sequence[Run], views: Mapping[str, View]) -> Path:
    """Write the page.

    Args:
        path: the file. Missing directories are created.
        runs: the runs to rank. If several runs of a machine have times of a point, the newest one counts.
        views: the view of each suite, by its name.
    """
    environments = {key: environment for run in runs for key, environment in run.environments.items()}
    distinct = {(record.environment, *record.key): record for run in runs for record in run.records}
    records = _newest(distinct.values(), environments)
    suites = [group for group in group_by(records, lambda each: each.suite) if any(record.timings for record in group)]
    measured = {record.environment: machine(record, environments) for group in suites for record in group}
    page = template("leaderboard.html").render(
        title="Leaderboard",
        subtitle=", ".join(dict.fromkeys(measured.values())),
        boards=[_board(group, environments, views.get(group[0].suite, View())) for group in suites],
        runs=sorted(f"{measured_under(environments.get(key, {}))} {name}" for key, name in measured.items()),
        cut_off=[file.name for run in runs for file in run.cut_off],
    )
    with atomic_write(path) as unfinished:
        unfinished.write_text(page, encoding="utf-8")
    return path


def machine(record: Record, environments: Environments) -> str:
    """The device model of a record; for a CPU, with the number of threads."""
    environment = environments.get(record.environment, {})
    threads = environment.get("threads")
    if environment.get("gpu") or not threads:
        return record.device
    return f"{record.device}, {threads} thread{'s' if threads > 1 else ''}"


def _newest(records: Iterable[Record], environments: Environments) -> list[Record]:
    """The records of each point and machine, from one run, because times of different runs are not compared."""

    def age(group: Sequence[Record]) -> tuple[bool, str]:
        return any(record.timings for record in group), str(environments.get(group[0].environment, {}).get("utc", ""))

    points = group_by(records, lambda record: (record.group, machine(record, environments)))
    return [record for point in points for record in max(group_by(point, lambda each: each.environment), key=age)]


def _board(records: Sequence[Record], environments: Environments, view: View) -> Board:
    machines = group_by(records, lambda record: machine(record, environments))
    by_machine = {machine(group[0], environments): group for group in machines}
    columns = [main_column(group) for group in by_machine.values()]
    ranked = [rank(group, column) for group, column in zip(by_machine.values(), columns, strict=True)]
    fields = varying_fields(records)
    rows = [
        Row(label(point.fields, fields), point.direction, [entries.get(point.group, []) for entries in ranked])
        for point, *_ in group_by(records, lambda record: record.group)
    ]
    names = list(dict.fromkeys(record.implementation for record in records))
    return Board(
        suite=records[0].suite,
        description=view.description,
        machines=list(by_machine),
        columns=[time(column).title for column in columns],
        standings=[Standing(name, [_count(name, entries.values()) for entries in ranked]) for name in names],
        rows=rows,
    )


def _count(name: str, points: Iterable[Sequence[Entry]]) -> str:
    """`3 first, 1 tied, of 5`: places of an implementation, and its number of ranked points."""
    places = Counter(entry.place for entries in points for entry in entries if entry.implementation == name)
    total = places[FIRST] + places[TIED] + places[BEHIND]
    return f"{places[FIRST]} first, {places[TIED]} tied, of {total}" if total else ""


def rank(records: Sequence[Record], column: str) -> dict[Group, list[Entry]]:
    """Entries of each point of a machine, by time, then failed ones. Skipped records have none."""
    timed = [record for record in records if record.seconds(column) is not None]
    timed.sort(key=lambda record: record.seconds(column) or 0.0)
    uncertain = dict(zip(map(id, timed), time_intervals(timed, column), strict=True))
    fastest = {first.group: first for first, *_ in group_by(filter(_has_a_place, timed), lambda record: record.group)}
    behind = _behind(timed, fastest, column)
    tied = {record.group for record in timed if _has_a_place(record) and _is_tied(behind.get(id(record)))}

    def entry(record: Record) -> Entry:
        seconds, factor = record.seconds(column), behind.get(id(record))
        if seconds is None:
            return Entry(record.implementation, record.status.replace("_", " "))
        place = BEHIND
        if not _has_a_place(record):
            place = BESIDE
        elif factor is None or _is_tied(factor):
            place = TIED if record.group in tied else FIRST
        shown = f"{short(1e3 * seconds)}{plus_minus(uncertain[id(record)])}"
        return Entry(record.implementation, place, shown, format_ratio(*factor) if factor else "")

    failed = [record for record in records if record.status in FAILED]
    points = group_by([*timed, *failed], lambda record: record.group)
    return {point[0].group: [entry(record) for record in point] for point in points}


def _has_a_place(record: Record) -> bool:
    """True if it does the whole operation. Only then the least cost applies to it."""
    return record.minimum_bytes is not None


def _is_tied(factor: tuple[float, Interval] | None) -> bool:
    return factor is not None and factor[1][0] <= 1


def _behind(timed: Sequence[Record], fastest: Mapping[Group, Record], column: str) -> dict[int, tuple[float, Interval]]:
    """Times over the time of the fastest at the same point, with intervals by rounds."""
    pairs = [(each, first) for each in timed if (first := fastest.get(each.group)) and first is not each]
    ratios = [beside(*(record.timings[column].samples for record in pair)) for pair in pairs]
    bounds = intervals(ratios).tolist() if ratios else []
    return {
        id(each): ((each.seconds(column) or 0.0) / (first.seconds(column) or 1.0), (low, high))
        for (each, first), (low, high) in zip(pairs, bounds, strict=True)
    }
