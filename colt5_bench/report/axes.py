"""Axes of the interactive plots, as plotly.js takes them."""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil, floor, isfinite, log10
from typing import Any

from colt5_bench.report.layout import MEMORY, RUN, tick

WIDEST_LINEAR = 1e2
"""Largest over smallest metric other than 0 that a linear axis shows."""

FEW_DECADES = 2
"""Up to which an axis has ticks between the powers of ten."""

MOST_TICKS = 8
"""Values of x that are each given a tick."""


def across(x: str, values: Sequence[Any]) -> dict[str, Any]:
    """Logarithmic for numbers, with a tick for each if these are few; names stand in order."""
    distinct = sorted({plain(value) for value in values}, key=sortable)
    if not all(isinstance(value, int | float) and value > 0 for value in distinct):
        # Of a run the revision is enough: what is under the pointer has its time, too.
        short = {"tickvals": distinct, "ticktext": [name.split()[-1] for name in distinct]} if x == RUN else {}
        return {"type": "category", "categoryorder": "array", "categoryarray": distinct, **short}
    if len(distinct) > MOST_TICKS or x == MEMORY:
        return {"type": "log"}
    return {"type": "log", "tickvals": distinct, "ticktext": [tick(value) for value in distinct]}


def logarithmic(data: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """At least a decade, so that noise looks like what it is; a tick a decade, or finer ones if few are drawn."""
    values = [log10(value) for trace in data for value in trace["y"] if value]
    lowest, highest = min(values, default=0.0), max(values, default=0.0)
    margin = max(0.06 * (highest - lowest), (1 - (highest - lowest)) / 2)
    return {
        "type": "log",
        "range": [lowest - margin, highest + margin],
        "dtick": 1 if highest - lowest > FEW_DECADES else "D2",
    }


def of_metric(values: Sequence[float]) -> tuple[dict[str, Any], float]:
    """Linear if that shows all values, else logarithmic; and where 0 is."""
    sizes = [value for value in values if value and isfinite(value)]
    if not sizes or min(sizes) < 0 or max(sizes) <= WIDEST_LINEAR * min(sizes):
        return {"type": "linear"}, 0.0
    return with_zero(values)


def with_zero(values: Iterable[float]) -> tuple[dict[str, Any], float]:
    """Logarithmic, with 0 a decade below the smallest; and where that is."""
    sizes = [value for value in values if value and isfinite(value)] or [1.0]
    lowest, highest = floor(log10(min(sizes))), ceil(log10(max(sizes)))
    decades = range(lowest, highest + 1, max(1, (highest - lowest) // MOST_TICKS))
    zero = 10.0 ** (lowest - 1)
    ticks = {"tickvals": [zero, *(10.0**at for at in decades)], "ticktext": ["0", *(f"{10.0**at:g}" for at in decades)]}
    return {"type": "log", **ticks}, zero


def plain(value: Any) -> Any:
    """A number as it is, everything else by its name."""
    return value if isinstance(value, int | float) and not isinstance(value, bool) else str(value)


def sortable(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then names."""
    value = plain(value)
    return (True, 0.0, value) if isinstance(value, str) else (False, value, "")
