"""Interactive plots of a suite, for the page: drawings of plotly.js, and choices between them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from math import inf, isfinite, log10
from textwrap import wrap
from typing import Any

import plotly.graph_objects as go

from colt5_bench.records.columns import BANDWIDTH, GRADIENT_ERROR, time
from colt5_bench.records.derived import Interval, group_by, label, plus_minus, text, varying_fields, worst_gradient
from colt5_bench.records.results import Record
from colt5_bench.report import axes
from colt5_bench.report.colours import colour, place
from colt5_bench.report.layout import (
    ERROR_DECADES,
    LIMIT_BANDWIDTH,
    LIMIT_TIME,
    MEMORY,
    PEAK_MEGABYTES,
    RUN,
    SAVED_MEGABYTES,
    TRADED_FIELD,
    Drawn,
    View,
    by_fields,
    combinations,
    divergence_fields,
    error_on_scale,
    gigabytes_a_second,
    milliseconds,
    panel_fields,
    reached,
    series,
    strokes,
    tick,
    traded,
)

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "x")
"""Markers, by which implementations differ in grey, too."""

GREY = "#888888"
"""Colour of lines that belong to no implementation, visible on light and on dark."""

HEIGHT, ROW_HEIGHT = 400, 36
"""Height of a plot, and of a row of a heat map, in pixels."""

HOVER_WIDTH = 44
"""Characters of a line in the text at the pointer."""

DASHES = ("solid", "dash", "dashdot", "longdash", "longdashdot", "dot")
"""Strokes of the lines of one implementation."""

BEYOND = 1e6
"""End of the bar of an unknown interval, over the value. It is beyond any axis."""


@dataclass(frozen=True)
class Drawing:
    """A drawing of plotly.js."""

    when: Mapping[str, str]
    """The choices that select this drawing: `{"direction": "forward"}`."""

    data: Sequence[dict[str, Any]]
    layout: Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """A plot with several drawings, one of which is chosen."""

    title: str
    note: str
    drawings: Sequence[Drawing]


@dataclass(frozen=True)
class _Plot:
    """Common part of drawings of one kind."""

    x: str
    y: str
    """The title of the vertical axis."""

    unit: str
    lines: Sequence[str] = ()
    dashes: Mapping[str, str] = field(default_factory=lambda: {"": "solid"})
    """Strokes by combination of the fields that make lines."""

    limit: Drawn | None = None
    """A limit that no implementation can exceed."""

    axis: Mapping[str, Any] = field(default_factory=dict)
    """The vertical axis, if it is not a logarithmic axis of the drawn values."""

    zero: float = 0.0
    """Place of 0, which a logarithmic axis does not have."""


def cards(records: Sequence[Record], view: View) -> list[Card]:
    """The plots of the records of one suite. Quantities without records have no plot."""
    ok = [record for record in records if record.status == "ok" and view.x in record.fields]
    time_plot = _Plot(view.x, "", "ms", limit=LIMIT_TIME)
    drawn = [
        Card(
            "Time",
            f"Medians with their 95 % intervals. {_hints(ok)} Grey is the least time that the device needs, by its "
            "measured ceilings.",
            _over_columns(time_plot, ok, milliseconds),
        ),
        Card(
            "Bandwidth",
            f"{BANDWIDTH.hint.capitalize()}, with 95 % intervals. Grey is the roofline. It is below the bandwidth of "
            "memory where exponentials or matrix products take longer.",
            _over_columns(_Plot(view.x, BANDWIDTH.title, "GB/s", limit=LIMIT_BANDWIDTH), ok, gigabytes_a_second),
        ),
        Card(
            "Memory",
            "Memory in addition to the inputs: its peak and, dotted, the part that is saved for the backward pass.",
            _memory(view.x, ok),
        ),
        Card(
            "Time against memory",
            f"Each point is a number of {TRADED_FIELD}. Down and to the left is better.",
            _over_columns(_Plot(MEMORY, "", "ms"), traded(ok), milliseconds),
        ),
        Card(
            "Divergence",
            f"{GRADIENT_ERROR.name.capitalize()}: {GRADIENT_ERROR.hint}. A cell shows the worst of its cases. "
            "Colours are the same on all charts of errors. A cross marks wrong results.",
            _divergence(view.x, records),
        ),
        *_metrics(view, ok),
    ]
    return [card for card in drawn if card.drawings]


def _time_columns(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(column for record in records for column in record.timings))


def _hints(records: Sequence[Record]) -> str:
    """Explanation of each time column."""
    return "; ".join(f"{name}: {time(name).hint}" for name in _time_columns(records) if time(name).hint) + "."


def _over_columns(
    plot: _Plot, records: Sequence[Record], of: Callable[[Sequence[Record], str], Drawn]
) -> list[Drawing]:
    """A drawing for each time column, direction and panel."""
    drawings = []
    for column in _time_columns(records):
        own = plot if plot.y else replace(plot, y=time(column).title)
        drawings += _panels(own, records, [of(records, column)], {"time": column})
    return drawings


def _memory(x: str, records: Sequence[Record]) -> list[Drawing]:
    quantities = [replace(PEAK_MEGABYTES, name=""), SAVED_MEGABYTES]
    values = [value for record in records for each in quantities if (value := each.of(record)) is not None]
    axis, zero = axes.with_zero(values) if 0 in values else ({}, 0.0)
    return _panels(_Plot(x, "memory [MB]", "MB", axis=axis, zero=zero), records, quantities, {})


def _metrics(view: View, records: Sequence[Record]) -> list[Card]:
    """A plot for each metric, of the first direction, because metrics do not depend on the direction."""
    described = [record for record in records if record.metrics]
    described = [record for record in described if record.direction == described[0].direction]
    dashes = strokes(described, view.lines, DASHES)
    made = []
    for name in dict.fromkeys(name for record in described for name in record.metrics):
        axis, zero = axes.of_metric([record.metrics[name] for record in described if name in record.metrics])
        plot = _Plot(view.x, name.replace("_", " "), "", view.lines, dashes, axis=axis, zero=zero)
        drawings = _panels(plot, described, [Drawn(partial(_metric, name))], {})
        title = name.replace("_", " ").capitalize()
        made.append(Card(title, f"The metric {name} of the suite, which its file explains.", drawings))
    return made


def _metric(name: str, record: Record) -> float | None:
    return record.metrics.get(name)


def _panels(
    plot: _Plot,
    records: Sequence[Record],
    quantities: Sequence[Drawn],
    when: Mapping[str, str],
) -> list[Drawing]:
    """A drawing for each direction and each combination of the fields other than x."""
    drawn = [record for record in records if any(each.of(record) is not None for each in quantities)]
    fields = panel_fields(plot.x, plot.lines, drawn)
    drawings = []
    for direction, combination in product(_directions(drawn), combinations(fields, drawn)):
        own = [r for r in drawn if r.direction == direction and label(r.fields, fields) == combination]
        if not own:
            continue
        data = [trace for each in quantities for trace in _lines(plot, own, each)]
        if plot.limit:
            data += _limit_line(plot, own, plot.limit)
        choices = {**when, "direction": direction, **({", ".join(fields): combination} if fields else {})}
        shown = [*quantities, *([plot.limit] if plot.limit else [])]
        layout = go.Layout(
            height=HEIGHT,
            xaxis={"title": {"text": plot.x}, **axes.across(plot.x, [record.fields[plot.x] for record in own])},
            yaxis={"title": {"text": plot.y}, **(plot.axis or axes.logarithmic(reached(own, shown)))},
        )
        drawings.append(Drawing(choices, data, layout.to_plotly_json()))
    return drawings


def _directions(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record.direction for record in records))


def _lines(plot: _Plot, records: Sequence[Record], drawn: Drawn) -> list[dict[str, Any]]:
    """A line for each implementation and each combination of the fields that make lines."""
    traces = []
    for group in group_by(records, lambda record: series(record, plot.lines)):
        points = [(record, value) for record in group if (value := drawn.of(record)) is not None]
        points.sort(key=lambda point: axes.sortable(point[0].fields[plot.x]))
        if not points:
            continue
        line, implementation = series(group[0], plot.lines), group[0].implementation
        shade, symbol = colour(implementation), SYMBOLS[place(implementation) % len(SYMBOLS)]
        dash = "dot" if drawn.name else plot.dashes[label(group[0].fields, plot.lines)]
        x = [axes.plain(record.fields[plot.x]) for record, _ in points]
        trace = go.Scatter(
            x=x,
            y=[(value or plot.zero) if isfinite(value) else None for _, value in points],
            mode="lines+markers" if _joined(plot.x, x) else "markers",
            name=line,
            legendgroup=line,
            showlegend=not drawn.name,
            line={"color": shade, "width": 2, "dash": dash},
            marker={"color": shade, "symbol": symbol, "size": 8},
            error_y=_bars(points, drawn),
            hovertext=[
                _hover(line, record, f"{value:.4g}{plus_minus(drawn.interval(record))} {plot.unit} {drawn.name}")
                for record, value in points
            ],
            hovertemplate="%{hovertext}<extra></extra>",
        )
        if plot.x == MEMORY:
            labels = [text(record.fields[TRADED_FIELD]) for record, _ in points]
            trace.update(mode="lines+markers+text", text=labels, textposition="top center")
        traces.append(trace.to_plotly_json())
    return traces


def _bars(points: Sequence[tuple[Record, float]], drawn: Drawn) -> dict[str, Any] | None:
    """The intervals of the points. An unknown interval exceeds both ends of the axis."""
    reaches = [_reach(value, drawn.interval(record)) for record, value in points]
    if not any(map(any, reaches)):
        return None
    below, above = zip(*reaches, strict=True)
    return {"symmetric": False, "array": above, "arrayminus": below, "thickness": 1.5, "width": 3}


def _reach(value: float, interval: Interval | None) -> tuple[float, float]:
    """Distances from the value to the lower and upper end of its interval."""
    low, high = interval or (value, value)
    return max(value - low, 0.0), max(min(high, BEYOND * value) - value, 0.0)


def _joined(x: str, values: Iterable[Any]) -> bool:
    """True if a line between neighbours has a meaning. Between names it has none."""
    return x == RUN or not any(isinstance(value, str) for value in values)


def _limit_line(plot: _Plot, records: Sequence[Record], limit: Drawn) -> list[dict[str, Any]]:
    points = {axes.plain(record.fields[plot.x]): value for record in records if (value := limit.of(record)) is not None}
    if not points:
        return []
    trace = go.Scatter(
        x=sorted(points, key=axes.sortable),
        y=[points[at] for at in sorted(points, key=axes.sortable)],
        mode="lines" if len(points) > 1 and _joined(plot.x, points) else "markers",
        marker={"symbol": "line-ew-open", "size": 18, "color": GREY},
        name=limit.name,
        line={"color": GREY, "width": 2, "dash": "dash"},
        hovertemplate=f"limit: %{{y:.4g}} {plot.unit}<extra></extra>",
    )
    return [trace.to_plotly_json()]


def _divergence(x: str, records: Sequence[Record]) -> list[Drawing]:
    """A heat map for each dtype, as their errors cannot be compared. It has a row per line, spread and schedule."""
    compared = [r for r in records if r.status in ("ok", "wrong") and worst_gradient(r) and x in r.fields]
    if not compared:
        return []
    x, spread, schedule = divergence_fields(x, compared)
    several = "dtype" in varying_fields(compared)
    implementations = list(dict.fromkeys(record.implementation for record in compared))
    drawings = []
    for group in by_fields(compared, ["dtype"]):
        rows = group_by(group, lambda record: (record.implementation, label(record.fields, [*spread, *schedule])))
        rows.sort(key=lambda row: implementations.index(row[0].implementation))
        when = {"dtype": str(group[0].fields.get("dtype"))} if several else {}
        drawings.append(_heat_map(when, x, [*spread, *schedule], rows))
    return drawings


def _heat_map(when: Mapping[str, str], x: str, fields: Sequence[str], rows: Sequence[Sequence[Record]]) -> Drawing:
    across = sorted({record.fields[x] for row in rows for record in row}, key=axes.sortable)
    worst = [[max((r for r in row if r.fields[x] == at), key=_error, default=None) for at in across] for row in rows]
    powers = list(range(ERROR_DECADES[0], ERROR_DECADES[1] + 1))
    trace = go.Heatmap(
        x=[tick(at) for at in across],
        y=[f"<b>{row[0].implementation}</b><br>{label(row[0].fields, fields)}" for row in rows],
        z=[[log10(error) if cell and (error := error_on_scale(cell)) else None for cell in row] for row in worst],
        text=[[_cell(cell) for cell in row] for row in worst],
        texttemplate="%{text}",
        textfont={"size": 11},
        hovertext=[[_hover(cell.implementation, cell, _cell(cell)) if cell else "" for cell in row] for row in worst],
        hovertemplate="%{hovertext}<extra></extra>",
        colorscale="Cividis",
        zmin=ERROR_DECADES[0],
        zmax=ERROR_DECADES[1],
        colorbar={
            "title": {"text": GRADIENT_ERROR.name, "side": "right"},
            "tickvals": powers,
            "ticktext": [f"≤ 1e{powers[0]}", *(f"1e{power}" for power in powers[1:-1]), f"≥ 1e{powers[-1]}"],
            "thickness": 12,
        },
        xgap=2,
        ygap=2,
    )
    layout = go.Layout(
        height=100 + ROW_HEIGHT * len(rows),
        xaxis={"title": {"text": x}, "type": "category", "showgrid": False},
        yaxis={"type": "category", "autorange": "reversed", "showgrid": False, "tickfont": {"size": 11}},
    )
    return Drawing(when, [trace.to_plotly_json()], layout.to_plotly_json())


def _error(record: Record) -> float:
    gradient = worst_gradient(record)
    return inf if gradient is None or gradient.largest != gradient.largest else gradient.largest


def _cell(record: Record | None) -> str:
    if record is None or (gradient := worst_gradient(record)) is None:
        return ""
    return f"{gradient.largest:.1e}{' ✕' if record.status == 'wrong' else ''}"


def _hover(line: str, record: Record, value: str) -> str:
    case = wrap(label(record.fields, record.fields), HOVER_WIDTH)
    return "<br>".join([f"<b>{line}</b>", value, record.direction, *case])
