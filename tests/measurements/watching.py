"""Share of the time of a run that goes into watching for cheats.

`python -m tests.measurements.watching --suite coor_descent --preset smoke` takes the arguments of `bench.py` and prints
the share at the end. Watching is all work that a harness without suspicion would omit: drawing other values for timed
calls, setting them and checking the effects of a call, and judging results once more after the timing. The command
waits for the GPU before and after each part, so that its time is counted; the run itself takes longer for that.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from time import perf_counter
from typing import Any
from unittest.mock import patch

import torch

from colt5_bench.case import other_values
from colt5_bench.cli import main
from colt5_bench.measuring import fairness, oracle
from colt5_bench.measuring.watch import Watch

PARTS: tuple[tuple[Any, str], ...] = (
    *((Watch, name) for name in ("__init__", "before", "after", "finish", "wait", "look_around")),
    *((fairness, name) for name in ("_timed_fault", "_refuse_unfair")),
)
"""Functions that watch, by their owner."""


class Stopwatch:
    """Seconds by part. The time of a part that is called by another one belongs to the caller."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running = False

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        if self._running:
            yield
            return
        self._running = True
        began = _now()
        try:
            yield
        finally:
            self.seconds[part] += _now() - began
            self._running = False

    def taking(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """A version of the function whose time is counted."""

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.of(part):
                return function(*args, **kwargs)

        return timed


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter()


def watched(arguments: list[str]) -> tuple[int, float, Counter[str]]:
    """The exit status of a run, its time in seconds, and the time of each part."""
    stopwatch = Stopwatch()

    @contextmanager
    def drawing(secret: str) -> Iterator[None]:
        with stopwatch.of("other_values"), other_values(secret):
            yield

    with ExitStack() as stack:
        for owner, name in PARTS:
            part = name if owner is fairness else f"Watch.{name}"
            stack.enter_context(patch.object(owner, name, stopwatch.taking(part, getattr(owner, name))))
        stack.enter_context(patch.object(oracle, "other_values", drawing))
        began = perf_counter()
        status = main(arguments)
    return status, perf_counter() - began, stopwatch.seconds


if __name__ == "__main__":
    status, whole, seconds = watched(sys.argv[1:])
    for part, took in seconds.most_common():
        print(f"{part:24} {took:7.2f} s")
    print(f"watching takes {sum(seconds.values()):.1f} s of {whole:.1f} s, {100 * sum(seconds.values()) / whole:.1f} %")
    sys.exit(status)
