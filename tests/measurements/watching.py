"""Share of the time of a run that goes into watching what is timed, so that nobody cheats.

`python -m tests.measurements.watching --suite coor_descent --preset smoke` takes the arguments of `bench.py` and says
it at the end. Watching is all that a harness without suspicion would leave out: drawing other values for timed calls,
putting them in and looking at what a call leaves behind, and judging results once more after the times are taken. The
GPU is waited for before and after, so that its part is counted; the run itself takes longer for that.
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
    """Seconds by part. A part that is called by another one belongs to that."""

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
        """The function, whose time counts."""

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
    """The exit status of a run, the seconds that it took, and those of them that went into each part."""
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
