"""Axes of the interactive plots, as plotly.js takes them."""

from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Any

from colt5_bench.report.layout import MEMORY, RUN, decades, tick

WIDEST_LINEAR = 1e2
"""Largest over smallest metric other than 0 that a linear axis shows."""

MARGIN = 0.04
"""Margin of a logarithmic axis on either side, as a share of its length. A marker on its end is seen whole."""

MOST_TICKS = 8
"""Values of x that are each given a tick."""


def across(x: str, values: Sequence[Any]) -> dict[str, Any]:
    """Logarithmic for numbers, with a tick for each if these are few; names stand in order."""
    distinct = sorted({plain(value) for value in values}, key=sortable)
    if not all(isinstance(value, int | float) and value > 0 for value in distinct):
        # The revision of a run is enough, since the text under the pointer has its time, too.
        short = {"tickvals": distinct, "ticktext": [name.split()[-1] for name in distinct]} if x == RUN else {}
        return {"type": "category", "categoryorder": "array", "categoryarray": distinct, **short}
    if len(distinct) > MOST_TICKS or x == MEMORY:
        return logarithmic(distinct)
    return {"type": "log", "tickvals": distinct, "ticktext": [tick(value) for value in distinct]}


def logarithmic(values: Iterable[float]) -> dict[str, Any]:
    """A logarithmic axis from decade to decade, so that noise looks like what it is. There is a figure a decade, and
    lines without one between."""
    lowest, highest = decades(values)
    margin = MARGIN * (highest - lowest)
    return {
        "type": "log",
        "range": [lowest - margin, highest + margin],
        **_ticks(lowest, highest),
        "minor": {"dtick": "D1", "showgrid": highest - lowest <= MOST_TICKS, "griddash": "dot"},
    }


def of_metric(values: Sequence[float]) -> tuple[dict[str, Any], float]:
    """Linear if that shows all values, else logarithmic; and where 0 is."""
    sizes = [value for value in values if value and isfinite(value)]
    if not sizes or min(sizes) < 0 or max(sizes) <= WIDEST_LINEAR * min(sizes):
        return {"type": "linear"}, 0.0
    return with_zero(values)


def with_zero(values: Iterable[float]) -> tuple[dict[str, Any], float]:
    """Logarithmic, with 0 a decade below the smallest; and where that is."""
    lowest, highest = decades(values)
    zero, ticks = 10.0 ** (lowest - 1), _ticks(lowest, highest)
    ticks = {"tickvals": [zero, *ticks["tickvals"]], "ticktext": ["0", *ticks["ticktext"]]}
    return {"type": "log", **ticks}, zero


def _ticks(lowest: int, highest: int) -> dict[str, list[Any]]:
    """At powers of ten: at each, unless these are many."""
    powers = range(lowest, highest + 1, max(1, (highest - lowest) // MOST_TICKS))
    return {"tickvals": [10.0**at for at in powers], "ticktext": [f"{10.0**at:,g}" for at in powers]}


def plain(value: Any) -> Any:
    """A number as it is, everything else by its name."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def sortable(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then names."""
    value = plain(value)
    return (True, 0.0, value) if isinstance(value, str) else (False, value, "")
