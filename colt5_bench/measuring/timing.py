"""Times of calls: interleaved, until the median is certain enough, in five columns.

- `cold`: GPU time of the launches of one call, from event to event. The stream is kept busy by a spin kernel while the
  host launches, so that the GPU never waits for the host. The L2 cache has none of the data of the call.
- `warm`: the same right after another call, so that the L2 cache has the data that it used.
- `graph`: the same as `cold` for the replay of a CUDA graph of the call.
- `wall`: host time. On a CPU this is the whole call. On a GPU it is the time that the host needs for the launch,
  in a row of such calls and in one thread.
- `eager`: time that a caller waits per call in a train of calls on a GPU, with host and GPU in parallel.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate, takewhile
from math import comb, inf
from statistics import median
from time import perf_counter
from typing import Any

import torch

from colt5_bench.measuring.rounds import (
    CPU_COLUMNS,
    GPU_COLUMNS,
    GPU_TIME_COLUMNS,
    WARM_UP_CALLS,
    Call,
    Look,
    Round,
    rounds,
)
from colt5_bench.records.environment import GpuState, gpu_state
from colt5_bench.records.results import Timing

CONFIDENCE = 0.95

HOST_SHARE = 0.25
"""Share of the time limit of a column that columns of host time on a GPU get. Such times differ more between processes
than within one, so more samples of one process do not make them more certain."""

FEWEST_SAMPLES = 3
"""Fewest samples of a call that alone takes longer than the time limit of all samples."""


def time_interleaved(
    calls: Mapping[str, Call],
    *,
    device: torch.device,
    columns: Sequence[str],
    before: Mapping[str, Callable[[], None]] | None = None,
    after: Mapping[str, Look] | None = None,
    target: float = 0.01,
    min_samples: int = 10,
    max_samples: int = 200,
    max_seconds: float = 2.0,
) -> dict[str, dict[str, Timing]]:
    """Time calls side by side: once per round each, in a new random order for each round.

    A call is finished when it has `min_samples` and the 95 % confidence interval of its median is at most `target`,
    relative to the median. It is also finished when it has `max_samples`, or when a column has taken `max_seconds` for
    all its calls, but not before it has `min_samples` (3 if the median of one call is longer than `max_seconds`).

    On a GPU, a round is repeated if heat or a power brake slowed down the hardware. The same limits of number and time
    apply; a call that lacks samples then has `throttled`. The power limit is normal under load, and no reason to repeat
    a round. No setting of the GPU is changed.

    Args:
        calls: the calls to time, by name. Each is first called a few times without timing.
        device: where the calls run.
        columns: `cold`, `warm`, `graph`, `wall` and `eager` on a GPU, `wall` on a CPU.
        before: functions by name. They are called without timing before each sample, and before a capture.
        after: functions by name. They are called without timing after each sample, with the results of a call, and
            with True if the replay of a graph wrote them.
        target: relative width of the interval at which a call is finished.
        min_samples: fewest samples of a call. An interval exists from six.
        max_samples: most samples of a call, and most rounds that are repeated.
        max_seconds: time for one column and all calls together, without warming up; a quarter of it for `wall` and
            `eager` on a GPU.

    Returns:
        By name and column. A call that cannot be captured has a `graph` column without samples, and `stopped`
        says why.

    Raises:
        ValueError: a column is unknown, or the device has none of that name.
        Exception: any error of a call, except during capture.
    """
    offered = GPU_COLUMNS if device.type == "cuda" else CPU_COLUMNS
    if unknown := set(columns) - set(offered):
        raise ValueError(
            f"columns on {device.type} must be among {', '.join(offered)}, got {', '.join(sorted(unknown))}"
        )
    prepare = {name: (before or {}).get(name, _nothing) for name in calls}
    look = {name: (after or {}).get(name, _nothing) for name in calls}
    timings: dict[str, dict[str, Timing]] = {name: {} for name in calls}
    with current(device):
        for name in calls:
            for _ in range(WARM_UP_CALLS):
                prepare[name]()
                look[name](calls[name](), False)
        for column in columns:
            on_host = device.type == "cuda" and column not in GPU_TIME_COLUMNS
            with rounds(column, calls, prepare, look, device) as (take, refused):
                taken = _sample(
                    take,
                    [name for name in calls if name not in refused],
                    column=column,
                    state=lambda: gpu_state(device),
                    target=target,
                    min_samples=min_samples,
                    max_samples=max_samples,
                    max_seconds=max_seconds * (HOST_SHARE if on_host else 1),
                )
            for name in calls:
                timings[name][column] = (
                    Timing(column, [], f"not capturable: {refused[name]}", inf) if name in refused else taken[name]
                )
    return timings


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the median: two of the samples, valid for any distribution.

    The number of samples below the true median is binomial. This gives the ranks of the two samples. Fewer than six
    samples give no interval.
    """
    rank = _rank(len(samples))
    if rank == 0:
        return -inf, inf
    ordered = sorted(samples)
    return ordered[rank - 1], ordered[-rank]


def relative_interval(samples: Sequence[float]) -> float:
    """Width of the confidence interval of the median over the median."""
    low, high = median_interval(samples)
    return (high - low) / median(samples) if high - low < inf else inf


@cache
def _rank(count: int) -> int:
    """Rank of the samples that bound the interval, counted from 1 from either end. 0 if there is no interval."""
    # A quantile of the binomial distribution, in integers: SciPy takes long to import.
    below = accumulate(comb(count, rank) for rank in range(count))
    return sum(1 for _ in takewhile(lambda ways: ways / 2**count < (1 - CONFIDENCE) / 2, below))


def _sample(
    take: Round,
    names: Sequence[str],
    *,
    column: str,
    state: Callable[[], GpuState | None],
    target: float,
    min_samples: int,
    max_samples: int,
    max_seconds: float,
) -> dict[str, Timing]:
    """Take rounds until each call has a reason to stop."""
    samples: dict[str, list[float]] = {name: [] for name in names}
    discarded = dict.fromkeys(names, 0)
    stopped: dict[str, str] = {}
    shuffle = random.Random(0)

    def reason_to_stop(name: str, seconds: float) -> str:
        taken = samples[name]
        late = seconds >= max_seconds
        enough = FEWEST_SAMPLES if taken and median(taken) > max_seconds else min_samples
        if len(taken) >= min_samples and relative_interval(taken) <= target:
            return "confident"
        if len(taken) >= max_samples:
            return "max_samples"
        if late and len(taken) >= enough:
            return "max_seconds"
        return "throttled" if discarded[name] >= (1 if late else max_samples) else ""

    began, watch = perf_counter(), _Watch(state)
    while active := [name for name in names if name not in stopped]:
        order = shuffle.sample(active, len(active))
        seconds = take(order)
        if watch.throttled():
            for name in order:
                discarded[name] += 1
        else:
            for name, sample in zip(order, seconds, strict=True):
                samples[name].append(sample)
        for name in active:
            if reason := reason_to_stop(name, perf_counter() - began):
                stopped[name] = reason

    seen = watch.summary()
    return {
        name: Timing(column, taken, stopped[name], relative_interval(taken), discarded[name], **seen)
        for name, taken in samples.items()
    }


class _Watch:
    """State of the GPU before, between and after the rounds of a column."""

    def __init__(self, read: Callable[[], GpuState | None]) -> None:
        self._read = read
        self._last = read()
        self._valid: list[GpuState] = []
        self._reasons: Counter[str] = Counter()

    def throttled(self) -> bool:
        """True if the last round is not valid: the GPU was slowed down at its beginning or at its end."""
        now = self._read()
        states = [state for state in (self._last, now) if state is not None]
        self._last = now
        self._reasons.update(now.reasons if now is not None else ())
        if any(state.throttled for state in states):
            return True
        self._valid += states
        return False

    def summary(self) -> dict[str, Any]:
        """The fields of a `Timing` for the state of the GPU during the samples."""
        clocks = [state.sm_clock_mhz for state in self._valid]
        powers = [state.power_w for state in self._valid if state.power_w is not None]
        temperatures = [state.temperature_c for state in self._valid if state.temperature_c is not None]
        return {
            "sm_clock_mhz": median(clocks) if clocks else None,
            "sm_clock_range_mhz": [min(clocks), max(clocks)] if clocks else None,
            "power_w": median(powers) if powers else None,
            "temperature_c": max(temperatures, default=None),
            "throttle_reasons": dict(self._reasons),
        }


def _nothing(*_: Any) -> None:
    pass


@contextmanager
def current(device: torch.device) -> Iterator[None]:
    """Make a GPU current, because streams, events and spins are made on the current one."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
