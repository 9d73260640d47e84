"""The tables at the end of a run."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import inf
from textwrap import wrap

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from colt5_bench.report import (
    Interval,
    bandwidth,
    label,
    main_column,
    severity,
    share_of_limit,
    short,
    spans_one,
    speed_up_intervals,
    speed_ups,
    time_interval,
    varying_fields,
    worst,
    worst_gradient,
)
from colt5_bench.results import Divergence, Record

CASE_WIDTH = 26

MOST_CASES = 40
"""Of a suite of divergence, which has hundreds: the worst are shown."""

STEADY_CLOCK = 0.01
"""By how much the clock of a GPU may move and still be called locked."""

NOTHING = "-"

HEADERS = {
    "cold": "GPU ms\ncold L2",
    "warm": "GPU ms\nwarm",
    "graph": "GPU ms\ngraph",
    "host": "host\nms",
    "wall": "wall\nms",
}

STYLES = {"ok": "", "skipped": "dim", "wrong": "red", "out_of_memory": "yellow", "error": "red"}

Group = list[Record]
"""The records of one case and direction."""

Column = tuple[str, Callable[[Record], str]]
"""Header, and the cell of a record."""


def summary(records: Sequence[Record], reference: str, console: Console) -> None:
    """Print one table of all records of one suite, then how they ended and why.

    Times are medians, with the 95 % interval that the run itself can tell; a speed-up whose interval spans 1 is shown
    by that interval alone. Speed-up, bandwidth (the least bytes over the time) and share of the limit go by the first
    time column: GPU time with a cold L2 on a GPU, wall time elsewhere. Of a suite without times the worst cases are
    shown.

    Args:
        records: of one suite.
        reference: the implementation that speed-ups are over.
        console: where to.
    """
    if not records:
        endings(records, console)
        return
    groups, metrics = _by_case(records), _metric_columns(records)
    if any(record.timings for record in records):
        print_whole(_table(records, groups, [*_time_columns(records, reference), *metrics]), console)
    else:
        shown = sorted(groups, key=_severity_of_group, reverse=True)[:MOST_CASES]
        print_whole(_table(records, shown, [*_divergence_columns(records), *metrics]), console)
        if len(shown) < len(groups):
            console.print(f"the {len(shown)} of {len(groups)} cases that are farthest from fp64", highlight=False)
    endings(records, console)
    _print_clocks(records, console)


def _table(records: Sequence[Record], groups: Iterable[Group], columns: Sequence[Column]) -> Table:
    """A row a group and a line a record, so that the case has room beside its implementations."""
    varying = varying_fields(records)
    table = Table(
        title=f"{records[0].suite} on {records[0].device}",
        title_justify="left",
        caption=label(records[0].fields, (name for name in records[0].fields if name not in varying)),
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_lines=True,
        pad_edge=False,
    )
    table.add_column("case")
    table.add_column("implementation")
    for header, _ in columns:
        table.add_column(header, justify="right", no_wrap=True)
    for group in groups:
        case = [*wrap(label(group[0].fields, varying), CASE_WIDTH), group[0].direction]
        cells = ([cell(record) for record in group] for _, cell in columns)
        lines = ([record.implementation for record in group], *cells)
        styles = [STYLES[record.status] for record in group]
        table.add_row("\n".join(case), *(_styled(column, styles) for column in lines))
    return table


def _styled(lines: Sequence[str], styles: Sequence[str]) -> Text:
    return Text("\n").join(Text(line, style=style) for line, style in zip(lines, styles, strict=True))


def print_whole(table: Table, console: Console) -> None:
    """At full width, whatever that of the console: a line that it breaks is complete, a column cut short is not."""
    table.width = console.measure(table, options=console.options.update(max_width=1000)).maximum
    console.print(table, crop=False, overflow="ignore", no_wrap=True)


def endings(records: Sequence[Record], console: Console) -> None:
    """How many ended how, and each reason once."""
    counts = Counter(record.status for record in records)
    counted = ", ".join(f"{count} {_status(status)}" for status, count in counts.items())
    console.print(counted or "nothing was measured", highlight=False)
    reasons = Counter((r.implementation, r.status, r.reason) for r in records if r.status != "ok")
    for (implementation, status, reason), count in reasons.items():
        times = f" ({count} times)" if count > 1 else ""
        line = f"  {implementation}{times}: {_status(status)}: {reason or 'no reason given'}"
        console.print(Text(line, style=STYLES[status]), soft_wrap=True)


def _print_clocks(records: Iterable[Record], console: Console) -> None:
    """That clocks moved: what they were is in the records, and to lock them is the owner's business."""
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
            f"the SM clock was between {lowest:.0f} and {highest:.0f} MHz while times were taken: it is not locked",
            highlight=False,
            soft_wrap=True,
        )


def _by_case(records: Iterable[Record]) -> list[Group]:
    groups: dict[tuple[str, str], Group] = {}
    for record in records:
        groups.setdefault((record.case, record.direction), []).append(record)
    return list(groups.values())


def _severity_of_group(group: Group) -> float:
    return max((severity(divergence) for record in group if (divergence := worst(record))), default=0.0)


def _time_columns(records: Sequence[Record], reference: str) -> list[Column]:
    main = main_column(records)
    on_gpu = main == "cold"
    ratios, bounds = speed_ups(records, reference, main), speed_up_intervals(records, reference, main)
    over = {id(record): each for record, each in zip(records, zip(ratios, bounds, strict=True), strict=True)}

    def time(record: Record) -> str:
        return _milliseconds(record, main) if record.status == "ok" else _status(record.status)

    def speed_up(record: Record) -> str:
        ratio, interval = over[id(record)]
        if ratio is None:
            return NOTHING
        if interval and spans_one(interval):
            return f"{short(interval[0])}-{short(interval[1])}x"
        return f"{short(ratio)}x{_plus_minus(interval)}"

    def gigabytes_a_second(record: Record) -> str:
        return NOTHING if (rate := bandwidth(record, main)) is None else short(rate / 1e9)

    def of_limit(record: Record) -> str:
        return NOTHING if (share := share_of_limit(record, main)) is None else f"{short(100 * share)}%"

    more_times: list[Column] = [
        (HEADERS["warm"], lambda record: _milliseconds(record, "warm")),
        (HEADERS["graph"], lambda record: _milliseconds(record, "graph")),
        (HEADERS["host"], lambda record: _milliseconds(record, "wall")),
    ]
    return [
        (HEADERS[main], time),
        (f"over\n{reference}", speed_up),
        ("GB/s", gigabytes_a_second),
        ("of\nlimit", of_limit),
        *(more_times if on_gpu else []),
        ("peak\nMB", lambda record: _megabytes(record.peak_bytes)),
        ("saved\nMB", lambda record: _megabytes(record.saved_bytes)),
        ("largest\nerror", lambda record: _error(worst(record))),
    ]


def _divergence_columns(records: Iterable[Record]) -> list[Column]:
    def of_gradient(figure: Callable[[Divergence], str]) -> Callable[[Record], str]:
        return lambda record: figure(divergence) if (divergence := worst_gradient(record)) else NOTHING

    gradients: list[Column] = [
        ("gradient:\nlargest", of_gradient(_error)),
        ("\nrelative", of_gradient(lambda divergence: f"{divergence.relative:.1e}")),
        ("\nabove 1e-3", of_gradient(lambda divergence: f"{short(100 * divergence.fraction_above)}%")),
        ("\nkinks", of_gradient(lambda divergence: str(divergence.kinks))),
        ("largest\nat kink", of_gradient(lambda divergence: f"{divergence.largest_at_kink:.1e}")),
    ]
    return [
        ("status", lambda record: _status(record.status)),
        *(gradients if any(worst_gradient(record) for record in records) else []),
        ("output:\nlargest", lambda record: _error(record.accuracy.get("output"))),
    ]


def _metric_columns(records: Iterable[Record]) -> list[Column]:
    def of_metric(name: str) -> Callable[[Record], str]:
        return lambda record: short(record.metrics[name]) if name in record.metrics else NOTHING

    names = dict.fromkeys(name for record in records for name in record.metrics)
    return [(name.replace("_", "\n"), of_metric(name)) for name in names]


def _status(status: str) -> str:
    return status.replace("_", " ")


def _milliseconds(record: Record, column: str) -> str:
    seconds = record.seconds(column)
    return NOTHING if seconds is None else f"{short(1e3 * seconds)}{_plus_minus(time_interval(record, column))}"


def _plus_minus(interval: Interval | None) -> str:
    """`±2%`: half the width of an interval of ratios, on the logarithmic scale."""
    if interval is None:
        return ""
    low, high = interval
    return f"±{100 * ((high / low) ** 0.5 - 1):.2g}%" if low > 0 and high < inf else "±?"


def _megabytes(size: int | None) -> str:
    return NOTHING if size is None else short(size / 1e6)


def _error(divergence: Divergence | None) -> str:
    return NOTHING if divergence is None else f"{divergence.largest:.1e}"
