"""Axes of the interactive plots, in the format of plotly.js."""

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

from colt5_bench.report.layout import MEMORY, RUN, decades, tick

WIDEST_LINEAR = 1e2
"""Largest ratio of metrics other than 0 that a linear axis shows."""

MARGIN = 0.04
"""Margin of a logarithmic axis on either side, as a share of its length. It leaves room for markers."""

MOST_TICKS = 8
"""Most values of x with one tick each."""


def across(x: str, values: Sequence[Any]) -> dict[str, Any]:
    """Logarithmic for numbers, with a tick for each if there are few. Names are in order."""
    distinct = sorted({plain(value) for value in values}, key=sortable)
    if not all(isinstance(value, int | float) and value > 0 for value in distinct):
        # The revision of a run is enough, because the text at the pointer also has its time.
        short = {"tickvals": distinct, "ticktext": [name.split()[-1] for name in distinct]} if x == RUN else {}
        return {"type": "category", "categoryorder": "array", "categoryarray": distinct, **short}
    if len(distinct) > MOST_TICKS or x == MEMORY:
        return logarithmic(distinct)
    return {"type": "log", "tickvals": distinct, "ticktext": [tick(value) for value in distinct]}


def logarithmic(values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis over whole decades, so that noise is not magnified. There is a number at each decade, and
    lines without numbers in between."""
    lowest, highest = decades(values)
    margin = MARGIN * (highest - lowest)
    return {
        "type": "log",
        "range": [lowest - margin, highest + margin],
        **_ticks(lowest, highest),
        "minor": {"dtick": "D1", "showgrid": highest - lowest <= MOST_TICKS, "griddash": "dot"},
    }


def of_metric(values: Sequence[float]) -> tuple[dict[str, Any], float]:
    """An axis that is linear if that shows all values, else logarithmic, and the place of 0."""
    sizes = [value for value in values if value and isfinite(value)]
    if not sizes or min(sizes) < 0 or max(sizes) <= WIDEST_LINEAR * min(sizes):
        return {"type": "linear"}, 0.0
    return with_zero(values)


def with_zero(values: Iterable[float]) -> tuple[dict[str, Any], float]:
    """A logarithmic axis with 0 a decade below the smallest value, and the place of 0."""
    lowest, highest = decades(values)
    zero, ticks = 10.0 ** (lowest - 1), _ticks(lowest, highest)
    ticks = {"tickvals": [zero, *ticks["tickvals"]], "ticktext": ["0", *ticks["ticktext"]]}
    return {"type": "log", **ticks}, zero


def _ticks(lowest: int, highest: int) -> dict[str, list[Any]]:
    """Ticks at powers of ten, at each one unless there are many."""
    powers = range(lowest, highest + 1, max(1, (highest - lowest) // MOST_TICKS))
    return {"tickvals": [10.0**at for at in powers], "ticktext": [f"{10.0**at:,g}" for at in powers]}


def plain(value: Any) -> Any:
    """A number itself, or any other value as text."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def sortable(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then names."""
    value = plain(value)
    return (True, 0.0, value) if isinstance(value, str) else (False, value, "")
