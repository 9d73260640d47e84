"""The names of quantities, which are the same in records, CSV, terminal, plots, pages and comparisons.

In records and CSV, the unit follows the name: `cold_ms`, `peak_bytes`. Elsewhere it is `cold [ms]`.
"""

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Quantity:
    """A quantity as it is shown."""

    name: str
    unit: str = ""
    hint: str = ""
    """Explanation of the measurement in one line."""

    @property
    def title(self) -> str:
        """`cold [ms]`, for a column or an axis."""
        return f"{self.name} [{self.unit}]" if self.unit else self.name


TIMES = {
    quantity.name: quantity
    for quantity in (
        Quantity("cold", "ms", "GPU time of a call, L2 cache flushed before it"),
        Quantity("warm", "ms", "GPU time of a call right after another one"),
        Quantity("graph", "ms", "GPU time of the call replayed from a CUDA graph, L2 cache flushed before it"),
        Quantity("wall", "ms", "host time until a call returns"),
        Quantity("eager", "ms", "time that a caller waits per call in a train of calls, host and GPU together"),
    )
}
"""By their names in records, in the order of tables."""

SPEED_UP = Quantity("speed-up", "x", "time of the reference over the time, from the first time column")
BANDWIDTH = Quantity("bandwidth", "GB/s", "each input read once and each output written once, over the time")
SHARE_OF_LIMIT = Quantity("share of limit", "%", "the least time that the device needs, over the time")
PEAK = Quantity("peak", "MB", "most memory allocated during the call, in addition to the memory before it")
SAVED = Quantity("saved", "MB", "memory that stays for the backward pass")
LARGEST_ERROR = Quantity("largest error", "", "largest distance from fp64, of the output or of a gradient")
GRADIENT_ERROR = Quantity("gradient error", "", "largest distance of a gradient from fp64, without elements at a kink")
RELATIVE_ERROR = Quantity("relative gradient error", "", "norm of the gradient's distance from fp64 over its norm")
FRACTION_ABOVE = Quantity("above 1e-3", "%", "elements of the gradient that are off by more than 1e-3")
KINKS = Quantity("kinks", "", "elements of the gradient at a kink")
ERROR_AT_KINK = Quantity("error at kink", "", "largest distance of these elements from fp64")


def time(column: str) -> Quantity:
    """The quantity of a time column. A column that is not listed is in milliseconds, too."""
    return TIMES.get(column, Quantity(column, "ms"))


def error_of(tensor: str) -> Quantity:
    """The largest distance of a tensor from fp64: `output error`."""
    return Quantity(f"{tensor} error", "", f"largest distance of {tensor} from fp64, without elements at a kink")


@lru_cache
def time_in_csv(column: str) -> str:
    """`cold_ms`."""
    return f"{column}_{time(column).unit}"


@lru_cache
def error_in_csv(tensor: str) -> str:
    """`output_error`."""
    return error_of(tensor).name.replace(" ", "_")
