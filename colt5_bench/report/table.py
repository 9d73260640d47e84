"""The tables at the end of a run."""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from rich.console import Console
from rich.text import Text

from colt5_bench.case import TRAINING
from colt5_bench.records.columns import (
    BANDWIDTH,
    ERROR_AT_KINK,
    FRACTION_ABOVE,
    GRADIENT_ERROR,
    KINKS,
    LARGEST_ERROR,
    PEAK,
    RELATIVE_ERROR,
    SAVED,
    SHARE_OF_LIMIT,
    SPEED_UP,
    TIMES,
    error_of,
    time,
)
from colt5_bench.records.derived import (
    bandwidth,
    format_ratio,
    group_by,
    label,
    main_column,
    plus_minus,
    severity,
    share_of_limit,
    short,
    speed_up_intervals,
    speed_ups,
    time_intervals,
    varying_fields,
    worst,
    worst_gradient,
)
from colt5_bench.records.results import Divergence, Record
from colt5_bench.report import terminal
from colt5_bench.report.terminal import print_table
from colt5_bench.report.training import training_summary

MOST_CASES = 40
"""Most shown cases of a suite of divergence, which has hundreds. The worst ones are shown."""

STEADY_CLOCK = 0.01
"""Largest change of the clock of a GPU that counts as locked."""

NUMBER = re.compile(r"\b\d[\d.,]*(e[-+]?\d+)?")

NOTHING = "-"

STYLES = {"ok": "", "skipped": "dim", "wrong": "red", "refused": "red", "out_of_memory": "yellow", "error": "red"}

Group = list[Record]
"""The records of one case and direction."""

Column: TypeAlias = terminal.Column[Record]


def summary(records: Sequence[Record], reference: str, console: Console) -> None:
    """Print a table of all records of a suite, then their statuses and reasons.

    Times are medians, with 95 % intervals from the run alone. A speed-up whose interval contains 1 is shown as this
    interval. Speed-up, bandwidth (the fewest possible bytes over the time) and share of the limit are from the first
    time column: GPU time with a cold L2 on a GPU, wall time elsewhere. A suite without times shows its worst cases, and
    a suite that trains the means of its repeats.

    Args:
        records: records of one suite.
        reference: the implementation that others are compared with.
        console: the output.
    """
    if not records:
        endings(records, console)
        return
    if any(record.direction == TRAINING for record in records):
        training_summary(records, reference, console)
        endings(records, console)
        return
    groups, metrics = group_by(records, lambda record: (record.case, record.direction)), _metric_columns(records)
    if any(record.timings for record in records):
        _print(records, groups, [*_time_columns(records, reference), *metrics], console)
        main = time(main_column(records))
        console.print(f"{main.name} is {main.hint}; speed-up is over {reference}", highlight=False)
    else:
        shown = sorted(groups, key=_severity_of_group, reverse=True)[:MOST_CASES]
        _print(records, shown, [*_divergence_columns(records), *metrics], console)
        if len(shown) < len(groups):
            console.print(f"the {len(shown)} of {len(groups)} cases with the largest errors", highlight=False)
    endings(records, console)
    _print_clocks(records, console)


def _print(records: Sequence[Record], groups: Iterable[Group], columns: Sequence[Column], console: Console) -> None:
    """A line for each case and direction, followed by a line for each of its implementations."""
    varying = varying_fields(records)
    print_table(
        f"{records[0].suite} on {records[0].device}",
        [_implementation(), *columns],
        [terminal.Group(f"{label(group[0].fields, varying)} {group[0].direction}", group) for group in groups],
        console,
        style=lambda record: STYLES[record.status],
        elsewhere=", and so does the CSV of `bench.py report`",
    )
    if common := label(records[0].fields, (name for name in records[0].fields if name not in varying)):
        console.print(f"all with {common}", highlight=False, markup=False)


def _implementation() -> Column:
    return Column("implementation", lambda record: record.implementation, number=False)


def endings(records: Sequence[Record], console: Console) -> None:
    """Print the number of records of each status, and each reason once, with the first case that it applies to.

    Reasons that differ only in numbers count as one.
    """
    counts = Counter(record.status for record in records)
    counted = ", ".join(f"{count} {_status(status)}" for status, count in counts.items())
    console.print(counted or "nothing was measured", highlight=False)
    varying, totals = varying_fields(records), Counter(record.implementation for record in records)
    failed = (record for record in records if record.status != "ok")
    for group in group_by(failed, lambda each: (each.implementation, each.status, NUMBER.sub("", each.reason))):
        first, total = group[0], totals[group[0].implementation]
        line = f"  {first.implementation}: {_status(first.status)}"
        # The case explains nothing if it is the only one, or if all of them are skipped.
        if len(group) < total or (total > 1 and first.status != "skipped"):
            case = f"{label(first.fields, varying)} {first.direction}".strip()
            line += f" in {len(group)} of {total}, {'first ' if len(group) > 1 else ''}{case}"
        line += f": {first.reason or 'no reason given'}"
        console.print(Text(line, style=STYLES[first.status]), soft_wrap=True)


def _print_clocks(records: Iterable[Record], console: Console) -> None:
    """Print a note if clocks changed. Records have the clocks; this program does not lock them."""
    ranges = [
        timing.sm_clock_range_mhz
        for record in records
        for timing in record.timings.values()
        if timing.sm_clock_range_mhz is not None
    ]
    if not ranges:
        return
    lowest, highest = min(low for low, _ in ranges), max(high for _, high in ranges)
    if lowest < (1 - STEADY_CLOCK) * highest:
        console.print(
            f"the SM clock was between {lowest:.0f} and {highest:.0f} MHz during the measurement: it is not locked",
            highlight=False,
            soft_wrap=True,
        )


def _severity_of_group(group: Group) -> float:
    return max((severity(divergence) for record in group if (divergence := worst(record))), default=0.0)


def _time_columns(records: Sequence[Record], reference: str) -> list[Column]:
    main = main_column(records)
    ratios, bounds = speed_ups(records, reference, main), speed_up_intervals(records, reference, main)
    over = {id(record): each for record, each in zip(records, zip(ratios, bounds, strict=True), strict=True)}
    times = {name: _milliseconds(records, name) for name in TIMES}

    def time_or_status(record: Record) -> str:
        return times[main](record) if record.status == "ok" else _status(record.status)

    def speed_up(record: Record) -> str:
        ratio, interval = over[id(record)]
        return NOTHING if ratio is None else format_ratio(ratio, interval)

    def gigabytes_a_second(record: Record) -> str:
        return NOTHING if (rate := bandwidth(record, main)) is None else short(rate / 1e9)

    def percent_of_limit(record: Record) -> str:
        return NOTHING if (share := share_of_limit(record, main)) is None else f"{short(100 * share)}"

    others = [name for name in TIMES if name != main and any(name in record.timings for record in records)]
    return [
        Column(time(main).title, time_or_status),
        Column(SPEED_UP.title, speed_up, 1),
        Column(BANDWIDTH.title, gigabytes_a_second, 5),
        Column(SHARE_OF_LIMIT.title, percent_of_limit, 4),
        *(Column(time(name).title, times[name], 7 + place) for place, name in enumerate(others)),
        Column(PEAK.title, lambda record: _megabytes(record.peak_bytes), 3),
        Column(SAVED.title, lambda record: _megabytes(record.saved_bytes), 6),
        Column(LARGEST_ERROR.title, lambda record: _error(worst(record)), 2),
    ]


def _divergence_columns(records: Iterable[Record]) -> list[Column]:
    def of_gradient(figure: Callable[[Divergence], str]) -> Callable[[Record], str]:
        return lambda record: figure(divergence) if (divergence := worst_gradient(record)) else NOTHING

    gradients: list[Column] = [
        Column(GRADIENT_ERROR.title, of_gradient(_error), 1),
        Column(RELATIVE_ERROR.title, of_gradient(lambda divergence: f"{divergence.relative:.1e}"), 3),
        Column(FRACTION_ABOVE.title, of_gradient(lambda divergence: short(100 * divergence.fraction_above)), 4),
        Column(KINKS.title, of_gradient(lambda divergence: str(divergence.kinks)), 6),
        Column(ERROR_AT_KINK.title, of_gradient(lambda divergence: f"{divergence.largest_at_kink:.1e}"), 5),
    ]
    return [
        Column("status", lambda record: _status(record.status)),
        *(gradients if any(worst_gradient(record) for record in records) else []),
        Column(error_of("output").title, lambda record: _error(record.accuracy.get("output")), 2),
    ]


def _metric_columns(records: Iterable[Record]) -> list[Column]:
    def of_metric(name: str) -> Callable[[Record], str]:
        return lambda record: short(record.metrics[name]) if name in record.metrics else NOTHING

    names = dict.fromkeys(name for record in records for name in record.metrics)
    return [Column(name.replace("_", " "), of_metric(name), 10 + place) for place, name in enumerate(names)]


def _status(status: str) -> str:
    return status.replace("_", " ")


def _milliseconds(records: Sequence[Record], column: str) -> Callable[[Record], str]:
    bounds = dict(zip(map(id, records), time_intervals(records, column), strict=True))

    def cell(record: Record) -> str:
        seconds = record.seconds(column)
        return NOTHING if seconds is None else f"{short(1e3 * seconds)}{plus_minus(bounds[id(record)])}"

    return cell


def _megabytes(size: int | None) -> str:
    return NOTHING if size is None else short(size / 1e6)


def _error(divergence: Divergence | None) -> str:
    return NOTHING if divergence is None else f"{divergence.largest:.1e}"
