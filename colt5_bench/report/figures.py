"""Interactive plots of a suite, for the page: what plotly.js is to draw, and the choices that lead there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from math import inf, isfinite, log10
from textwrap import wrap
from typing import Any

import plotly.graph_objects as go

from colt5_bench.report import axes, bandwidth, label, text, varying_fields, worst_gradient
from colt5_bench.report.layout import (
    COLUMN_LABELS,
    MEMORY,
    RUN,
    TRADED_FIELD,
    View,
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

SYMBOLS = ("circle", "square", "diamond", "triangle-up", "triangle-down", "cross", "star", "x")
"""Tell implementations apart in grey."""

GREY = "#888888"
"""Of what belongs to no implementation: seen on light and on dark."""

HEIGHT, ROW_HEIGHT = 400, 36
"""Of a plot, and of a row of a heat map, in pixels."""

HOVER_WIDTH = 44
"""Characters of a line of what is shown under the pointer."""

Quantity = Callable[[Record], float | None]


@dataclass(frozen=True)
class Drawing:
    """What plotly.js draws."""

    when: Mapping[str, str]
    """The choices that lead here, by what is chosen: `{"direction": "forward"}`."""

    data: Sequence[dict[str, Any]]
    layout: Mapping[str, Any]


@dataclass(frozen=True)
class Card:
    """One plot, drawn in several ways that are chosen among."""

    title: str
    note: str
    drawings: Sequence[Drawing]


@dataclass(frozen=True)
class _Plot:
    """What drawings of one kind have in common."""

    x: str
    unit: str
    """The title of the vertical axis."""

    places: Mapping[str, int]
    lines: Sequence[str] = ()
    limit: Quantity | None = None
    """What no implementation can pass."""

    axis: Mapping[str, Any] = field(default_factory=dict)
    """The vertical one, if it is not to be a logarithmic one of what is drawn."""

    zero: float = 0.0
    """Where 0 is drawn: a logarithmic axis has no place for it."""


def cards(records: Sequence[Record], view: View) -> list[Card]:
    """The plots of the records of one suite; there is none of what no record has."""
    ok = [record for record in records if record.status == "ok" and view.x in record.fields]
    order = places(records)
    drawn = [
        Card(
            "Time",
            "Medians. Grey is the least time that the device needs, from what it was seen to do.",
            _over_columns(_Plot(view.x, "ms", order, limit=_limit_milliseconds), ok, _milliseconds),
        ),
        Card(
            "Bandwidth",
            "The least bytes over the time. Grey is the roofline, below what memory allows where exponentials or "
            "matrix products take longer.",
            _over_columns(_Plot(view.x, "GB/s", order, limit=_limit_bandwidth), ok, _gigabytes_a_second),
        ),
        Card(
            "Memory",
            "Beyond the inputs: the most at once, and, dotted, what stays for the backward pass.",
            _memory(view.x, order, ok),
        ),
        Card(
            "Time against memory",
            f"Each point is a number of {TRADED_FIELD}. Down and to the left is better.",
            _over_columns(_Plot(MEMORY, "ms", order), traded(ok), _milliseconds),
        ),
        Card(
            "Divergence",
            "The largest error of a gradient against fp64, elements at a kink left out; of all cases in a cell the "
            "worst. A cross marks what was found wrong.",
            _divergence(view.x, records),
        ),
        *_metrics(view, ok),
    ]
    return [card for card in drawn if card.drawings]


def _over_columns(plot: _Plot, records: Sequence[Record], of: Callable[[Record, str], float | None]) -> list[Drawing]:
    """A drawing for each time column, direction and panel."""
    drawings = []
    for column in dict.fromkeys(column for record in records for column in record.timings):
        when = {"time": COLUMN_LABELS.get(column, column)}
        drawings += _panels(plot, records, {"": partial(_of_column, of, column)}, when)
    return drawings


def _of_column(of: Callable[[Record, str], float | None], column: str, record: Record) -> float | None:
    return of(record, column)


def _memory(x: str, order: Mapping[str, int], records: Sequence[Record]) -> list[Drawing]:
    quantities: dict[str, Quantity] = {
        "": lambda record: _times(record.peak_bytes, 1e-6),
        "saved": lambda record: _times(record.saved_bytes, 1e-6),
    }
    values = [value for record in records for of in quantities.values() if (value := of(record)) is not None]
    axis, zero = axes.with_zero(values) if 0 in values else ({}, 0.0)
    return _panels(_Plot(x, "MB", order, axis=axis, zero=zero), records, quantities, {})


def _metrics(view: View, records: Sequence[Record]) -> list[Card]:
    """A plot a metric, of the first direction: they are not a matter of direction."""
    described = [record for record in records if record.metrics]
    described = [record for record in described if record.direction == described[0].direction]
    order = places(described, view.lines)
    made = []
    for name in dict.fromkeys(name for record in described for name in record.metrics):
        axis, zero = axes.of_metric([record.metrics[name] for record in described if name in record.metrics])
        plot = _Plot(view.x, "", order, view.lines, axis=axis, zero=zero)
        drawings = _panels(plot, described, {"": partial(_metric, name)}, {})
        title = name.replace("_", " ").capitalize()
        made.append(Card(title, f"The suite's metric {name}, which its file explains.", drawings))
    return made


def _metric(name: str, record: Record) -> float | None:
    return record.metrics.get(name)


def _panels(
    plot: _Plot,
    records: Sequence[Record],
    quantities: Mapping[str, Quantity],
    when: Mapping[str, str],
) -> list[Drawing]:
    """A drawing for each direction and each combination of the fields that do not lie along x."""
    drawn = [record for record in records if any(of(record) is not None for of in quantities.values())]
    fields = panel_fields(plot.x, plot.lines, drawn)
    drawings = []
    for direction, combination in product(_directions(drawn), combinations(fields, drawn)):
        own = [r for r in drawn if r.direction == direction and label(r.fields, fields) == combination]
        if not own:
            continue
        data = [trace for name, of in quantities.items() for trace in _lines(plot, own, of, name)]
        if plot.limit:
            data += _limit_line(plot, own, plot.limit)
        choices = {**when, "direction": direction, **({", ".join(fields): combination} if fields else {})}
        layout = go.Layout(
            height=HEIGHT,
            xaxis={"title": {"text": plot.x}, **axes.across(plot.x, [record.fields[plot.x] for record in own])},
            yaxis={"title": {"text": plot.unit}, **(plot.axis or axes.logarithmic(data))},
        )
        drawings.append(Drawing(choices, data, layout.to_plotly_json()))
    return drawings


def _directions(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(record.direction for record in records))


def _lines(plot: _Plot, records: Sequence[Record], of: Quantity, name: str) -> list[dict[str, Any]]:
    """A line an implementation."""
    traces = []
    for own in by(records, lambda record: series(record, plot.lines)):
        points = [(record, value) for record in own if (value := of(record)) is not None]
        points.sort(key=lambda point: axes.sortable(point[0].fields[plot.x]))
        if not points:
            continue
        line = series(own[0], plot.lines)
        place = plot.places[line]
        x = [axes.plain(record.fields[plot.x]) for record, _ in points]
        trace = go.Scatter(
            x=x,
            y=[(value or plot.zero) if isfinite(value) else None for _, value in points],
            mode="lines+markers" if _joined(plot.x, x) else "markers",
            name=line,
            legendgroup=line,
            showlegend=not name,
            line={"color": colour(place), "width": 2, "dash": "dot" if name else "solid"},
            marker={"color": colour(place), "symbol": SYMBOLS[place % len(SYMBOLS)], "size": 8},
            hovertext=[_hover(line, record, f"{value:.4g} {plot.unit} {name}") for record, value in points],
            hovertemplate="%{hovertext}<extra></extra>",
        )
        if plot.x == MEMORY:
            labels = [text(record.fields[TRADED_FIELD]) for record, _ in points]
            trace.update(mode="lines+markers+text", text=labels, textposition="top center")
        traces.append(trace.to_plotly_json())
    return traces


def _joined(x: str, values: Iterable[Any]) -> bool:
    """Whether there is anything between neighbours for a line to say: not between the names of different things."""
    return x == RUN or not any(isinstance(value, str) for value in values)


def _limit_line(plot: _Plot, records: Sequence[Record], of: Quantity) -> list[dict[str, Any]]:
    points = {axes.plain(record.fields[plot.x]): value for record in records if (value := of(record)) is not None}
    if not points:
        return []
    trace = go.Scatter(
        x=sorted(points, key=axes.sortable),
        y=[points[at] for at in sorted(points, key=axes.sortable)],
        mode="lines" if len(points) > 1 and _joined(plot.x, points) else "markers",
        marker={"symbol": "line-ew-open", "size": 18, "color": GREY},
        name="limit of the device",
        line={"color": GREY, "width": 2, "dash": "dash"},
        hovertemplate=f"limit: %{{y:.4g}} {plot.unit}<extra></extra>",
    )
    return [trace.to_plotly_json()]


def _divergence(x: str, records: Sequence[Record]) -> list[Drawing]:
    """A heat map for each dtype, whose errors have nothing in common: a row a line, spread and schedule."""
    compared = [r for r in records if r.status in ("ok", "wrong") and worst_gradient(r) and x in r.fields]
    if not compared:
        return []
    x, spread, schedule = divergence_fields(x, compared)
    several = "dtype" in varying_fields(compared)
    drawings = []
    for group in by_fields(compared, ["dtype"]):
        rows = by(group, lambda record: (record.implementation, label(record.fields, [*spread, *schedule])))
        rows.sort(key=lambda row: places(compared)[row[0].implementation])
        when = {"dtype": str(group[0].fields.get("dtype"))} if several else {}
        drawings.append(_heat_map(when, x, [*spread, *schedule], rows))
    return drawings


def _heat_map(when: Mapping[str, str], x: str, fields: Sequence[str], rows: Sequence[Sequence[Record]]) -> Drawing:
    across = sorted({record.fields[x] for row in rows for record in row}, key=axes.sortable)
    worst = [[max((r for r in row if r.fields[x] == at), key=_error, default=None) for at in across] for row in rows]
    trace = go.Heatmap(
        x=[tick(at) for at in across],
        y=[f"<b>{row[0].implementation}</b><br>{label(row[0].fields, fields)}" for row in rows],
        z=[[log10(error) if cell and (error := largest_error(cell)) else None for cell in row] for row in worst],
        text=[[_cell(cell) for cell in row] for row in worst],
        texttemplate="%{text}",
        textfont={"size": 11},
        hovertext=[[_hover(cell.implementation, cell, _cell(cell)) if cell else "" for cell in row] for row in worst],
        hovertemplate="%{hovertext}<extra></extra>",
        colorscale="Cividis",
        showscale=False,
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


def _milliseconds(record: Record, column: str) -> float | None:
    return _times(record.seconds(column), 1e3)


def _gigabytes_a_second(record: Record, column: str) -> float | None:
    return _times(bandwidth(record, column), 1e-9)


def _limit_milliseconds(record: Record) -> float | None:
    return _times(record.limit_seconds, 1e3)


def _limit_bandwidth(record: Record) -> float | None:
    """Of what takes the least time that the device needs."""
    return record.minimum_bytes / record.limit_seconds / 1e9 if record.minimum_bytes and record.limit_seconds else None


def _times(value: float | None, unit: float) -> float | None:
    return None if value is None else value * unit
