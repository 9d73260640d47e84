"""Tests of times on a machine that other programs use."""

from collections.abc import Callable
from statistics import median
from typing import TypeVar

T = TypeVar("T")


def first_good(measure: Callable[[], T], is_good: Callable[[T], bool], attempts: int = 4) -> T:
    """The first good measurement of a cost with an upper limit, or else the last one.

    Code that costs too much does so in all attempts, but other programs on the machine affect only some.
    """
    for _ in range(attempts - 1):
        if is_good(measured := measure()):
            return measured
    return measure()


def typical(measure: Callable[[], float], is_good: Callable[[float], bool], attempts: int = 5) -> float:
    """A first measurement if it is good, else the median of several. The figure has limits on both sides."""
    first = measure()
    return first if is_good(first) else median([first, *(measure() for _ in range(attempts - 1))])
