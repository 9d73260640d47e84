"""Figures of a suite, as PNG and SVG. The same records give the same files."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, isfinite
from pathlib import Path
from textwrap import fill
from typing import Any
from urllib.parse import quote

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from colt5_bench.files import whole
from colt5_bench.report import bandwidth, label, main_column, varying_fields, worst_gradient
from colt5_bench.report.layout import (
    COLUMN_LABELS,
    MEMORY,
    by,
    by_fields,
    colour,
    combinations,
    divergence_fields,
    largest_error,
    panel_fields,
    places,
    series,
    tick,
    traded,
)
from colt5_bench.results import Record

MARKERS = "osD^vP*X"
"""Tell implementations apart in grey."""

GREY = "0.35"
"""Of what belongs to no implementation."""

PANELS_PER_ROW = 4
"""At most, and as even as rows can be."""

MOST_PANELS = 8
"""Of one direction; what combinations there are beyond that is said below the figure."""

PANEL_WIDTH, PANEL_HEIGHT, LEGEND_WIDTH, TITLE_HEIGHT = 2.9, 2.4, 1.7, 0.4
"""In inches."""

WIDEST_LINEAR, WIDEST_LOGARITHMIC = 1e2, 1e9
"""Largest over smallest metric other than 0 that an axis of either kind shows."""

MOST_TICKS = 8
"""Values of x that are each given a tick."""

STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8,
    "font.size": 8,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "lines.markersize": 4,
    "savefig.dpi": 160,
    # Identifiers within an SVG would be drawn at random without it.
    "svg.hashsalt": "colt5-bench",
    # A label may have dollar signs in it, and none of ours has a formula.
    "text.parse_math": False,
}


@dataclass(frozen=True)
class _Quantity:
    """What is drawn of a record."""

    of: Callable[[Record], float | None]
    line: str = "-"

    name: str = ""
    """For the legend, where there are several."""


@dataclass(frozen=True)
class _Panel:
    title: str
    records: Sequence[Record]


@dataclass(frozen=True)
class _Row:
    y_label: str
    quantities: Sequence[_Quantity]
    panels: Sequence[_Panel]

    limit: _Quantity | None = None
    """What no implementation can pass, drawn in grey."""

    scale: Callable[[Axes, Sequence[float]], None] = lambda ax, values: ax.set_yscale("log")
    """Sets the vertical axis, given what is drawn."""


_ROOFLINE = _Quantity(
    lambda record: (
        record.minimum_bytes / record.limit_seconds / 1e9 if record.minimum_bytes and record.limit_seconds else None
    ),
    "--",
    "limit",
)
"""The bandwidth of what takes the least time that the device needs."""


def write_plots(records: Sequence[Record], directory: Path, *, x: str = "n", lines: Sequence[str] = ()) -> list[Path]:
    """Draw what the records of one suite hold: time, bandwidth, memory and metrics against a field of the case, time
    against memory where a field trades one for the other, and divergence.

    What did not end ok is not drawn but named below the figure; divergence that was found wrong is drawn all the same,
    hollow. There is no figure of what no record has.

    Args:
        records: of one suite.
        directory: where `time`, `bandwidth`, `memory`, `trade-off`, `divergence` and `metrics` go, each as .png and
            .svg; `divergence-<dtype>` each, if there are several dtypes.
        x: the field along the horizontal axis; that of divergence is `n_iters`, if all have one and it varies.
        lines: fields each combination of which is a line of its own among the metrics, and no panel.

    Returns:
        The files written.
    """
    figures: dict[str, Figure] = {}
    ok = [record for record in records if record.status == "ok" and x in record.fields]
    main = main_column(ok)
    time_label = f"{COLUMN_LABELS.get(main, main)} [ms]"
    milliseconds = _Quantity(lambda record: _times(record.seconds(main), 1e3))
    compared = [record for record in records if record.status in ("ok", "wrong") and worst_gradient(record)]
    with mpl.rc_context(STYLE):
        if timed := [record for record in ok if record.seconds(main)]:
            limit = _Quantity(lambda record: _times(record.limit_seconds, 1e3), "--", "limit")
            figures["time"] = _against(x, time_label, [milliseconds], timed, records, limit)
        if moved := [record for record in timed if record.minimum_bytes]:
            rate = _Quantity(lambda record: _times(bandwidth(record, main), 1e-9))
            figures["bandwidth"] = _against(x, "bandwidth [GB/s]", [rate], moved, records, _ROOFLINE)
        if sized := [record for record in ok if record.peak_bytes]:
            quantities = [
                _Quantity(lambda record: _times(record.peak_bytes, 1e-6), name="peak"),
                _Quantity(lambda record: _times(record.saved_bytes, 1e-6), ":", "saved for backward"),
            ]
            figures["memory"] = _against(x, "memory beyond the inputs [MB]", quantities, sized, records)
        if trade := traded(timed):
            figures["trade-off"] = _against(MEMORY, time_label, [milliseconds], trade, records)
        for name, of_one_dtype in _by_dtype(compared).items():
            if any(map(largest_error, of_one_dtype)):
                figures[name] = _divergence(x, of_one_dtype, records)
        if described := [record for record in ok if record.metrics]:
            figures["metrics"] = _metrics(x, lines, described, records)
        return [path for name, figure in figures.items() for path in _save(figure, directory, name)]


def _against(
    x: str,
    y_label: str,
    quantities: Sequence[_Quantity],
    drawn: Sequence[Record],
    records: Sequence[Record],
    limit: _Quantity | None = None,
) -> Figure:
    """A panel for each direction and each combination of the fields that vary along with x."""
    fields = panel_fields(x, (), drawn)
    shown, remark = _with_room(fields, drawn, MOST_PANELS)
    rows = []
    for direction in dict.fromkeys(record.direction for record in drawn):
        of_direction = [record for record in drawn if record.direction == direction]
        panels = [
            _Panel(f"{direction}\n{combination}", [r for r in of_direction if label(r.fields, fields) == combination])
            for combination in shown
        ]
        per_row = ceil(len(panels) / ceil(len(panels) / PANELS_PER_ROW))
        parts = (panels[start : start + per_row] for start in range(0, len(panels), per_row))
        rows += [_Row(y_label, quantities, part, limit) for part in parts]
    return _figure(rows, x, records, remark)


def _metrics(x: str, lines: Sequence[str], drawn: Sequence[Record], records: Sequence[Record]) -> Figure:
    """A row for each metric, of the first direction: they are not a matter of direction."""
    drawn = [record for record in drawn if record.direction == drawn[0].direction]
    varying, fields = varying_fields(drawn), panel_fields(x, lines, drawn)
    shown, remark = _with_room(fields, drawn, PANELS_PER_ROW)
    panels = [_Panel(name, [r for r in drawn if label(r.fields, fields) == name]) for name in shown]

    def of_metric(name: str) -> _Quantity:
        return _Quantity(lambda record: record.metrics.get(name))

    names = dict.fromkeys(name for record in drawn for name in record.metrics)
    rows = [_Row(name.replace("_", " "), [of_metric(name)], panels, scale=_scale_metric) for name in names]
    return _figure(rows, x, records, remark, [name for name in lines if name in varying])


def _with_room(fields: Sequence[str], drawn: Sequence[Record], most: int) -> tuple[list[str], str]:
    """The commonest combinations of the fields, and a remark that names the others."""
    every = combinations(fields, drawn)
    left_out = every[most:]
    return every[:most], f"Measured, with no room here: {'; '.join(left_out)}." if left_out else ""


def _divergence(x: str, drawn: Sequence[Record], records: Sequence[Record]) -> Figure:
    """A panel for each spread of the scores and each schedule of temperatures; all else that varies is one cloud."""
    x, spread, schedule = divergence_fields(x, drawn)
    rows = [
        _Row(
            "largest error of the gradient",
            [_Quantity(largest_error)],
            [_Panel(label(panel[0].fields, [*spread, *schedule]), panel) for panel in by_fields(row, spread)],
        )
        for row in by_fields(drawn, schedule)
    ]
    pooled = [name for name in varying_fields(drawn) if name not in (x, *spread, *schedule)]
    remark = f"Lines go through the largest of all {', '.join(pooled)}." if pooled else ""
    return _figure(rows, x, records, remark)


def _figure(rows: Sequence[_Row], x: str, records: Sequence[Record], remark: str, lines: Sequence[str] = ()) -> Figure:
    """Panels, one legend, and below them what they do not show.

    All have one vertical axis; if rows are of several quantities, each row has its own.
    """
    per_row = max(len(row.panels) for row in rows)
    width = per_row * PANEL_WIDTH + LEGEND_WIDTH
    caption = fill(" ".join(part for part in (remark, _missing(records)) if part), int(17 * width))
    below = 0.15 * (caption.count("\n") + 2) if caption else 0.0
    height = len(rows) * PANEL_HEIGHT + TITLE_HEIGHT + below
    figure = Figure(
        figsize=(width, height), layout=ConstrainedLayoutEngine(rect=(0, below / height, 1, 1 - below / height))
    )
    figure.text(0.01, 0.05 / height, caption, fontsize="small", color=GREY, va="bottom")
    figure.suptitle(f"{records[0].suite} on {records[0].device}", x=0.01, ha="left", weight="bold")

    styles = _styles(records, lines)
    several = len({row.y_label for row in rows}) > 1
    grid = figure.subplots(len(rows), per_row, sharex=True, sharey="row" if several else True, squeeze=False)
    for ax in grid.flat:
        ax.set_visible(False)
    for axes, row in zip(grid, rows, strict=True):
        axes[0].set_ylabel(row.y_label)
        for ax, panel in zip(axes, row.panels, strict=False):
            ax.set_visible(True)
            ax.set_title("\n".join(fill(line, 44) for line in panel.title.splitlines()))
            _draw(ax, panel.records, x, row.quantities, styles, lines)
            if row.limit:
                _draw_limit(ax, panel.records, x, row.limit)
        row.scale(
            axes[0], [v for p in row.panels for r in p.records for q in row.quantities if (v := q.of(r)) is not None]
        )
    for axes in grid.T:
        lowest = [ax for ax in axes if ax.get_visible()][-1]
        lowest.set_xlabel(x)
        lowest.tick_params(labelbottom=True)
    _scale_x(grid[0][0], [record.fields[x] for row in rows for panel in row.panels for record in panel.records])
    figure.legend(handles=_legend(rows, styles, lines), loc="outside right upper")
    return figure


def _draw(
    ax: Axes,
    records: Sequence[Record],
    x: str,
    quantities: Sequence[_Quantity],
    styles: Mapping[str, tuple[str, str]],
    lines: Sequence[str],
) -> None:
    """A marker a record, hollow for one that is wrong, and a line through the largest at each x."""
    for own in by(records, lambda record: series(record, lines)):
        colour, marker = styles[series(own[0], lines)]
        for quantity in quantities:
            points: list[tuple[Any, float, str]] = [
                (record.fields[x], value, record.status) for record in own if (value := quantity.of(record)) is not None
            ]
            highest = {at: max(value for where, value, _ in points if where == at) for at, _, _ in points}
            ax.plot(sorted(highest), [highest[at] for at in sorted(highest)], quantity.line, color=colour, lw=1.2)
            for status, face in (("ok", colour), ("wrong", "none")):
                of_status = [(at, value) for at, value, which in points if which == status]
                places, values = zip(*of_status, strict=True) if of_status else ((), ())
                ax.plot(places, values, marker, color=colour, markerfacecolor=face)


def _draw_limit(ax: Axes, records: Sequence[Record], x: str, limit: _Quantity) -> None:
    points: dict[Any, float] = {r.fields[x]: value for r in records if (value := limit.of(r)) is not None}
    ax.plot(sorted(points), [points[at] for at in sorted(points)], limit.line, color=GREY, lw=1)


def _scale_metric(ax: Axes, values: Sequence[float]) -> None:
    """Linear if that shows all values, else logarithmic down to the smallest, and linear from there to 0."""
    sizes = [abs(value) for value in values if value and isfinite(value)]
    if sizes and max(sizes) > WIDEST_LINEAR * min(sizes):
        ax.set_yscale("symlog", linthresh=max(min(sizes), max(sizes) / WIDEST_LOGARITHMIC))


def _scale_x(ax: Axes, values: Sequence[Any]) -> None:
    """Logarithmic for numbers, with a tick for each if these are few; names are written upwards."""
    distinct = sorted(set(values))
    if all(isinstance(value, int | float) and value > 0 for value in distinct):
        ax.set_xscale("log")
        if len(distinct) <= MOST_TICKS:
            ax.set_xticks(distinct, [tick(value) for value in distinct])
            ax.xaxis.set_minor_locator(NullLocator())
    elif any(isinstance(value, str) for value in distinct):
        for each in ax.figure.axes:
            each.tick_params(axis="x", rotation=90)


def _styles(records: Sequence[Record], lines: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker by line, the same in all figures that have the same lines."""
    return {name: (colour(place), MARKERS[place % len(MARKERS)]) for name, place in places(records, lines).items()}


def _legend(rows: Sequence[_Row], styles: Mapping[str, tuple[str, str]], lines: Sequence[str]) -> list[Line2D]:
    records = [record for row in rows for panel in row.panels for record in panel.records]
    drawn = {series(record, lines) for record in records}
    handles = [
        Line2D([], [], color=colour, marker=marker, label=name)
        for name, (colour, marker) in styles.items()
        if name in drawn
    ]
    named = [each for each in (*rows[0].quantities, rows[0].limit) if each and each.name]
    handles += [Line2D([], [], color=GREY, ls=each.line, label=each.name) for each in named]
    if any(record.status == "wrong" for record in records):
        handles.append(Line2D([], [], color=GREY, ls="", marker="o", mfc="none", label="found wrong"))
    return handles


def _missing(records: Sequence[Record]) -> str:
    """What did not end ok, in one sentence."""
    counts = Counter((r.implementation, r.status) for r in records if r.status != "ok")
    parts = [f"{name} ({status.replace('_', ' ')}, {count})" for (name, status), count in counts.items()]
    return f"Not ok, with the number of cases: {', '.join(parts)}." if parts else ""


def _by_dtype(records: Sequence[Record]) -> dict[str, list[Record]]:
    """By the name of the figure: errors of different dtypes have nothing in common."""
    groups = by_fields(records, ["dtype"])
    # Whatever a dtype is called, it leads into no other directory.
    dtypes = [quote(str(group[0].fields.get("dtype")), safe="") for group in groups]
    names = [f"divergence-{dtype}" for dtype in dtypes] if len(groups) > 1 else ["divergence"]
    return dict(zip(names, groups, strict=False))


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit


def _save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Without the date and the version that would make each file new."""
    paths = [directory / f"{name}.png", directory / f"{name}.svg"]
    with whole(paths[0]) as unfinished:
        figure.savefig(unfinished, format="png", metadata={"Software": None})
    # What is laid out stays so; it takes as long as drawing does.
    figure.set_layout_engine("none")
    with whole(paths[1]) as unfinished:
        figure.savefig(unfinished, format="svg", metadata={"Date": None, "Creator": None})
    return paths
