"""Figures of a suite, as PNG and SVG. The same records give the same files."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite
from pathlib import Path
from textwrap import fill
from typing import Any
from urllib.parse import quote

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from colt5_bench.files import atomic_write
from colt5_bench.records.columns import BANDWIDTH, GRADIENT_ERROR, time
from colt5_bench.records.derived import group_by, label, main_column, varying_fields, worst_gradient
from colt5_bench.records.results import Record
from colt5_bench.report.colours import colour, place
from colt5_bench.report.curves import curves
from colt5_bench.report.layout import (
    ERROR_DECADES,
    LIMIT_BANDWIDTH,
    LIMIT_TIME,
    MEMORY,
    PEAK_MEGABYTES,
    SAVED_MEGABYTES,
    Drawn,
    by_fields,
    combinations,
    decades,
    divergence_fields,
    error_on_scale,
    gigabytes_a_second,
    largest_error,
    milliseconds,
    panel_fields,
    reached,
    series,
    strokes,
    tick,
    traded,
)

MARKERS = "osD^vP*X"
"""Markers, by which implementations differ in grey, too."""

DASHES: Sequence[Any] = ("-", "--", "-.", (0, (6, 1)), (0, (4, 1, 1, 1, 1, 1)))
"""Strokes of the lines of one implementation."""

GREY = "0.35"
"""Colour of lines that belong to no implementation."""

PANELS_PER_ROW = 4
"""Most panels in a row. Rows have about the same number of panels."""

MOST_PANELS = 8
"""Most panels of one direction. Combinations beyond that are named below the figure."""

PANEL_WIDTH, PANEL_HEIGHT, LEGEND_WIDTH, TITLE_HEIGHT = 2.9, 2.4, 1.7, 0.4
"""Size of a panel in inches."""

WIDEST_LINEAR, WIDEST_LOGARITHMIC = 1e2, 1e9
"""Largest ratio of metrics other than 0 that an axis shows."""

MOST_TICKS = 8
"""Most values of x with one tick each, and most powers of ten on a vertical axis."""

MARGIN = 0.1
"""Margin of a logarithmic axis on either side, in powers of ten. It leaves room for markers."""

PLAIN = FuncFormatter(lambda value, place: f"{value:g}")
"""Format of numbers at ticks, because matplotlib writes powers of ten as formulas."""

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
    # Without it, identifiers within an SVG are random.
    "svg.hashsalt": "colt5-bench",
    # Labels may contain dollar signs, but no formulas.
    "text.parse_math": False,
}


def _from_decade_to_decade(ax: Axes, ends: tuple[int, int]) -> None:
    """A logarithmic axis between two powers of ten, with a number at each and none in between."""
    ax.set_yscale("log")
    ax.set_ylim(10.0 ** (ends[0] - MARGIN), 10.0 ** (ends[1] + MARGIN))
    ax.yaxis.set_major_locator(LogLocator(numticks=MOST_TICKS + 1))
    ax.yaxis.set_major_formatter(PLAIN)
    ax.yaxis.set_minor_formatter(NullFormatter())


def _scale_logarithmic(ax: Axes, values: Sequence[float]) -> None:
    _from_decade_to_decade(ax, decades(values))


@dataclass(frozen=True)
class _Panel:
    title: str
    records: Sequence[Record]


@dataclass(frozen=True)
class _Row:
    y_label: str
    quantities: Sequence[Drawn]
    panels: Sequence[_Panel]

    limit: Drawn | None = None
    """A limit that no implementation can exceed, drawn in grey."""

    scale: Callable[[Axes, Sequence[float]], None] = _scale_logarithmic
    """Sets the vertical axis for the drawn values."""


def write_plots(records: Sequence[Record], directory: Path, *, x: str = "n", lines: Sequence[str] = ()) -> list[Path]:
    """Draw the records of one suite. Plots are time, bandwidth, memory and metrics against a field of the case, time
    against memory where a field trades one for the other, divergence, and curves of training.

    Records that are not ok are named below the figure instead. Divergence of wrong records is drawn, too, with
    hollow markers. Bars are 95 % intervals. There is no figure without records.

    Args:
        records: records of one suite.
        directory: for `time`, `bandwidth`, `memory`, `trade-off`, `divergence`, `metrics` and `curves`, each as
            .png and .svg; `divergence-<dtype>` each, if there are several dtypes.
        x: the field along the horizontal axis. For divergence it is `n_iters`, if all have one and it varies.
        lines: fields whose combinations are lines in plots of metrics, not panels.

    Returns:
        The written files.
    """
    figures: dict[str, Figure] = {}
    ok = [record for record in records if record.status == "ok" and x in record.fields]
    main = main_column(ok)
    quantity = time(main)
    compared = [record for record in records if record.status in ("ok", "wrong") and worst_gradient(record)]
    with mpl.rc_context(STYLE):
        if timed := [record for record in ok if record.seconds(main)]:
            remark = f"{quantity.name} is {quantity.hint}."
            figures["time"] = _against(
                x, quantity.title, [milliseconds(timed, main)], timed, records, LIMIT_TIME, remark
            )
        if moved := [record for record in timed if record.minimum_bytes]:
            rates = [gigabytes_a_second(moved, main)]
            figures["bandwidth"] = _against(x, BANDWIDTH.title, rates, moved, records, LIMIT_BANDWIDTH)
        if sized := [record for record in ok if record.peak_bytes]:
            sizes = [PEAK_MEGABYTES, SAVED_MEGABYTES]
            remark = (
                "Memory in addition to the inputs: peak is the most at once, and saved is kept for the backward pass."
            )
            figures["memory"] = _against(x, "memory [MB]", sizes, sized, records, remark=remark)
        if trade := traded(timed):
            figures["trade-off"] = _against(MEMORY, quantity.title, [milliseconds(trade, main)], trade, records)
        for name, of_one_dtype in _by_dtype(compared).items():
            if any(map(largest_error, of_one_dtype)):
                figures[name] = _divergence(x, of_one_dtype, records)
        if described := [record for record in ok if record.metrics]:
            figures["metrics"] = _metrics(x, lines, described, records)
        if (trained := curves(ok)) is not None:
            figures["curves"] = trained
        return [path for name, figure in figures.items() for path in _save(figure, directory, name)]


def _against(
    x: str,
    y_label: str,
    quantities: Sequence[Drawn],
    drawn: Sequence[Record],
    records: Sequence[Record],
    limit: Drawn | None = None,
    remark: str = "",
) -> Figure:
    """A panel for each direction and each combination of the fields that vary in addition to x."""
    fields = panel_fields(x, (), drawn)
    shown, left_out = _with_room(fields, drawn, MOST_PANELS)
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
    return _figure(rows, x, records, " ".join(filter(None, (remark, left_out))))


def _metrics(x: str, lines: Sequence[str], drawn: Sequence[Record], records: Sequence[Record]) -> Figure:
    """A row for each metric, of the first direction, because metrics do not depend on the direction."""
    drawn = [record for record in drawn if record.direction == drawn[0].direction]
    varying, fields = varying_fields(drawn), panel_fields(x, lines, drawn)
    shown, remark = _with_room(fields, drawn, PANELS_PER_ROW)
    panels = [_Panel(name, [r for r in drawn if label(r.fields, fields) == name]) for name in shown]

    def of_metric(name: str) -> Drawn:
        return Drawn(lambda record: record.metrics.get(name))

    names = dict.fromkeys(name for record in drawn for name in record.metrics)
    rows = [_Row(name.replace("_", " "), [of_metric(name)], panels, scale=_scale_metric) for name in names]
    return _figure(rows, x, records, remark, [name for name in lines if name in varying])


def _with_room(fields: Sequence[str], drawn: Sequence[Record], most: int) -> tuple[list[str], str]:
    """The most frequent combinations of the fields, and a remark that names the others."""
    every = combinations(fields, drawn)
    left_out = every[most:]
    return every[:most], f"Measured, but not shown: {'; '.join(left_out)}." if left_out else ""


def _divergence(x: str, drawn: Sequence[Record], records: Sequence[Record]) -> Figure:
    """A panel for each spread of the scores and each schedule of temperatures. All other fields share a panel."""
    x, spread, schedule = divergence_fields(x, drawn)
    rows = [
        _Row(
            GRADIENT_ERROR.name,
            [Drawn(error_on_scale)],
            [_Panel(label(panel[0].fields, [*spread, *schedule]), panel) for panel in by_fields(row, spread)],
            scale=lambda ax, values: _from_decade_to_decade(ax, ERROR_DECADES),
        )
        for row in by_fields(drawn, schedule)
    ]
    pooled = [name for name in varying_fields(drawn) if name not in (x, *spread, *schedule)]
    remark = f"{GRADIENT_ERROR.hint.capitalize()}; errors beyond the scale are drawn at its end."
    remark += f" Lines connect the largest errors over all {', '.join(pooled)}." if pooled else ""
    return _figure(rows, x, records, remark)


def _figure(rows: Sequence[_Row], x: str, records: Sequence[Record], remark: str, lines: Sequence[str] = ()) -> Figure:
    """Panels, one legend, and below them remarks on what is not shown.

    All panels have the same vertical axis. If rows show several quantities, each row has its own axis.
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

    dashes = strokes(records, lines, DASHES)
    several = len({row.y_label for row in rows}) > 1
    grid = figure.subplots(len(rows), per_row, sharex=True, sharey="row" if several else True, squeeze=False)
    for ax in grid.flat:
        ax.set_visible(False)
    for axes, row in zip(grid, rows, strict=True):
        axes[0].set_ylabel(row.y_label)
        for ax, panel in zip(axes, row.panels, strict=False):
            ax.set_visible(True)
            ax.set_title("\n".join(fill(line, 44) for line in panel.title.splitlines()))
            _draw(ax, panel.records, x, row.quantities, dashes, lines)
            if row.limit:
                _draw_limit(ax, panel.records, x, row.limit)
        # An axis that all rows share has to show the values of each row.
        row.scale(axes[0], [value for each in ([row] if several else rows) for value in _reached(each)])
    for axes in grid.T:
        lowest = [ax for ax in axes if ax.get_visible()][-1]
        lowest.set_xlabel(x)
        lowest.tick_params(labelbottom=True)
    _scale_x(grid[0][0], [record.fields[x] for row in rows for panel in row.panels for record in panel.records])
    figure.legend(handles=_legend(rows, dashes, lines), loc="outside right upper")
    return figure


def _draw(
    ax: Axes,
    records: Sequence[Record],
    x: str,
    quantities: Sequence[Drawn],
    dashes: Mapping[str, Any],
    lines: Sequence[str],
) -> None:
    """Draw a marker for each record, hollow if it is wrong, its interval, and a line. The line goes through the largest
    value at each x."""
    for group in group_by(records, lambda record: series(record, lines)):
        shade, marker = colour(group[0].implementation), _marker(group[0].implementation)
        for quantity in quantities:
            dash = ":" if quantity is SAVED_MEGABYTES else dashes[label(group[0].fields, lines)]
            points: list[tuple[Any, float, str]] = [
                (record.fields[x], value, record.status)
                for record in group
                if (value := quantity.of(record)) is not None
            ]
            highest = {at: max(value for where, value, _ in points if where == at) for at, _, _ in points}
            ax.plot(sorted(highest), [highest[at] for at in sorted(highest)], ls=dash, color=shade, lw=1.2)
            for status, face in (("ok", shade), ("wrong", "none")):
                of_status = [(at, value) for at, value, which in points if which == status]
                places, values = zip(*of_status, strict=True) if of_status else ((), ())
                ax.plot(places, values, marker, color=shade, markerfacecolor=face)
            _draw_intervals(ax, group, x, quantity, shade)


def _draw_intervals(ax: Axes, records: Iterable[Record], x: str, quantity: Drawn, shade: str) -> None:
    """A bar for each record. A bar of an unknown interval spans the whole axis."""
    for record in records:
        if quantity.of(record) is None or (interval := quantity.interval(record)) is None:
            continue
        at: Any = record.fields[x]
        low, high = interval
        if low > 0 and high < inf:
            ax.vlines(at, low, high, color=shade, lw=1)
        else:
            ax.axvline(at, color=shade, lw=1, ls=":")


def _reached(row: _Row) -> list[float]:
    drawn = [*row.quantities, *([row.limit] if row.limit else [])]
    return reached([record for panel in row.panels for record in panel.records], drawn)


def _draw_limit(ax: Axes, records: Sequence[Record], x: str, limit: Drawn) -> None:
    points: dict[Any, float] = {r.fields[x]: value for r in records if (value := limit.of(r)) is not None}
    ax.plot(sorted(points), [points[at] for at in sorted(points)], "--", color=GREY, lw=1)


def _scale_metric(ax: Axes, values: Sequence[float]) -> None:
    """Linear if that shows all values, else logarithmic down to the smallest, and linear from there to 0."""
    sizes = [abs(value) for value in values if value and isfinite(value)]
    if sizes and max(sizes) > WIDEST_LINEAR * min(sizes):
        ax.set_yscale("symlog", linthresh=max(min(sizes), max(sizes) / WIDEST_LOGARITHMIC))
        ax.yaxis.set_major_formatter(PLAIN)


def _scale_x(ax: Axes, values: Sequence[Any]) -> None:
    """Logarithmic for numbers, with a tick for each if there are few. Names are written upwards."""
    distinct = sorted(set(values))
    if all(isinstance(value, int | float) and value > 0 for value in distinct):
        ax.set_xscale("log")
        if len(distinct) <= MOST_TICKS:
            ax.set_xticks(distinct, [tick(value) for value in distinct])
            ax.xaxis.set_minor_locator(NullLocator())
        else:
            lowest, highest = decades(distinct)
            ax.set_xlim(10.0**lowest, 10.0**highest)
            ax.xaxis.set_major_formatter(PLAIN)
            ax.xaxis.set_minor_formatter(NullFormatter())
    elif any(isinstance(value, str) for value in distinct):
        for each in ax.figure.axes:
            each.tick_params(axis="x", rotation=90)


def _marker(implementation: str) -> str:
    return MARKERS[place(implementation) % len(MARKERS)]


def _legend(rows: Sequence[_Row], dashes: Mapping[str, Any], lines: Sequence[str]) -> list[Line2D]:
    records = [record for row in rows for panel in row.panels for record in panel.records]
    handles = [
        Line2D(
            *([], []),
            color=colour(record.implementation),
            marker=_marker(record.implementation),
            ls=dashes[label(record.fields, lines)],
            label=name,
        )
        for name, record in {series(record, lines): record for record in records}.items()
    ]
    named = [each for each in rows[0].quantities if each.name]
    handles += [
        Line2D([], [], color=GREY, ls=":" if each is SAVED_MEGABYTES else "-", label=each.name) for each in named
    ]
    if rows[0].limit:
        handles.append(Line2D([], [], color=GREY, ls="--", label=rows[0].limit.name))
    if any(record.status == "wrong" for record in records):
        handles.append(Line2D([], [], color=GREY, ls="", marker="o", mfc="none", label="found wrong"))
    return handles


def _missing(records: Sequence[Record]) -> str:
    """A sentence with the records that are not ok."""
    counts = Counter((r.implementation, r.status) for r in records if r.status != "ok")
    parts = [f"{name} ({status.replace('_', ' ')}, {count})" for (name, status), count in counts.items()]
    return f"Not ok, with the number of cases: {', '.join(parts)}." if parts else ""


def _by_dtype(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by the name of the figure. Errors of different dtypes cannot be compared."""
    groups = by_fields(records, ["dtype"])
    # No dtype may name another directory.
    dtypes = [quote(str(group[0].fields.get("dtype")), safe="") for group in groups]
    names = [f"divergence-{dtype}" for dtype in dtypes] if len(groups) > 1 else ["divergence"]
    return dict(zip(names, groups, strict=False))


def _save(figure: Figure, directory: Path, name: str) -> list[Path]:
    """Save a figure without date and version, so that equal figures give equal files."""
    paths = [directory / f"{name}.png", directory / f"{name}.svg"]
    with atomic_write(paths[0]) as unfinished:
        figure.savefig(unfinished, format="png", metadata={"Software": None})
    # The layout is kept, because computing it takes as long as drawing.
    figure.set_layout_engine("none")
    with atomic_write(paths[1]) as unfinished:
        # `savefig` would draw the figure again for a layout.
        FigureCanvasSVG(figure).print_svg(unfinished, metadata={"Date": None, "Creator": None})
    return paths
