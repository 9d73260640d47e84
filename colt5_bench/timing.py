"""How long calls take: interleaved, until the median is certain enough, on three clocks.

- `cold`: GPU time of the launches of one call, from event to event. The stream is kept busy by a spin kernel while the
  host launches, so that the GPU never waits for the host, and the L2 cache holds nothing of the call's data.
- `graph`: the same for the replay of a CUDA graph that the call was captured into.
- `wall`: host time. Of a call on a CPU that is all of it; of a call on a GPU it is what the host needs to launch it,
  among others of its kind and in one thread.
"""

import gc
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from math import inf
from statistics import median
from time import perf_counter
from typing import Any

import torch
from scipy.stats import binom

from colt5_bench.environment import GpuState, gpu_state
from colt5_bench.results import Timing

Call = Callable[[], object]
Round = Callable[[Sequence[str]], list[float]]
"""Runs the named calls in the order given and returns the seconds of each."""

CONFIDENCE = 0.95

WARM_UP_CALLS = 2
"""The first compiles and fills caches, the second may do so once more."""

FEWEST_SAMPLES = 3
"""Of a call that takes longer than all samples together should."""

CALLS_IN_A_ROW, ROW_SECONDS = 10, 0.003
"""Most calls, and about the longest that they take, for a sample of host time on a GPU: its queue of launches must not
fill up, for then the host waits."""

SPIN_MARGIN, SPIN_EXTRA, LONGEST_SPIN = 1.5, 20e-6, 0.05
"""A spin lasts this many times the host time of the call and these seconds more, and at most so many seconds."""

SPIN_GROWTH = 4
"""A spin that turns out too short is doubled, until it is this many times as long as at first: no spin is long enough
for a call that waits for the GPU itself."""

FLUSHED_CACHES = 2
"""Size of the buffer that is written and read to flush the L2, in L2s."""


def time_interleaved(
    calls: Mapping[str, Call],
    *,
    device: torch.device,
    columns: Sequence[str],
    before: Mapping[str, Callable[[], None]] | None = None,
    target: float = 0.01,
    min_samples: int = 10,
    max_samples: int = 200,
    max_seconds: float = 2.0,
) -> dict[str, dict[str, Timing]]:
    """Time calls side by side: round after round, each call once a round, in an order shuffled anew for each round.

    A call leaves when the 95 % confidence interval of its median, relative to the median, is at most `target`, and it
    has `min_samples`; or when it has `max_samples`; or when a column has taken `max_seconds` for all its calls, but
    not before it has `min_samples` (3, if the median of one call is longer than `max_seconds`).

    On a GPU a round during which the hardware was slowed down by heat or a power brake is repeated, within the same
    bounds on number and time: what then lacks samples has `throttled`. Running at the power limit is a GPU's normal
    state under load and voids nothing. No setting of it is touched.

    Args:
        calls: what is timed, by name. Each is run a few times beforehand, untimed.
        device: where the calls run.
        columns: `cold`, `graph` and `wall` on a GPU, `wall` on a CPU.
        before: by name, what runs untimed before each sample, and before a call is captured.
        target: relative width of the interval at which a call is known well enough.
        min_samples: fewest samples of a call. An interval exists from six.
        max_samples: most samples of a call, and most rounds that are repeated.
        max_seconds: time for one column, all calls together, warming up not counted.

    Returns:
        By name and column. What cannot be captured into a graph has a `graph` column without samples, and `stopped`
        says why.

    Raises:
        ValueError: a column is unknown, or the device has none of that name.
        Exception: whatever a call raises, other than in capture.
    """
    offered = ("cold", "graph", "wall") if device.type == "cuda" else ("wall",)
    if unknown := set(columns) - set(offered):
        raise ValueError(f"columns on {device.type} are {', '.join(offered)}, got {', '.join(sorted(unknown))}")
    prepare = {name: (before or {}).get(name, _nothing) for name in calls}
    timings: dict[str, dict[str, Timing]] = {name: {} for name in calls}
    with _current(device):
        for name in calls:
            for _ in range(WARM_UP_CALLS):
                prepare[name]()
                calls[name]()
        for column in columns:
            with _rounds(column, calls, prepare, device) as (take, refused):
                taken = _sample(
                    take,
                    [name for name in calls if name not in refused],
                    column=column,
                    state=lambda: gpu_state(device),
                    target=target,
                    min_samples=min_samples,
                    max_samples=max_samples,
                    max_seconds=max_seconds,
                )
            for name in calls:
                timings[name][column] = (
                    Timing(column, [], f"not capturable: {refused[name]}", inf) if name in refused else taken[name]
                )
    return timings


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """A 95 % confidence interval of the median: two of the samples, whatever distribution they are from.

    The count of samples below the true median is binomial, which says how far from the ends of the sorted samples one
    may go. Fewer than six samples bound nothing.
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
    """Which sample from either end bounds the interval, counted from 1; 0 if none does."""
    return int(binom.ppf((1 - CONFIDENCE) / 2, count, 0.5)) if count else 0


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
    clocks: list[int] = []
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

    began, earlier = perf_counter(), state()
    while active := [name for name in names if name not in stopped]:
        order = shuffle.sample(active, len(active))
        seconds = take(order)
        now = state()
        states = [each for each in (earlier, now) if each is not None]
        earlier = now
        if any(each.throttled for each in states):
            for name in order:
                discarded[name] += 1
        else:
            clocks += [each.sm_clock_mhz for each in states]
            for name, sample in zip(order, seconds, strict=True):
                samples[name].append(sample)
        for name in active:
            if reason := reason_to_stop(name, perf_counter() - began):
                stopped[name] = reason

    clock = median(clocks) if clocks else None
    return {
        name: Timing(column, taken, stopped[name], relative_interval(taken), discarded[name], clock)
        for name, taken in samples.items()
    }


@contextmanager
def _rounds(
    column: str, calls: Mapping[str, Call], before: Mapping[str, Call], device: torch.device
) -> Iterator[tuple[Round, dict[str, str]]]:
    """How a column takes a round, and the calls that it cannot take, with the reason."""
    if column == "wall":
        yield _HostRound(calls, before, device), {}
    elif column == "cold":
        yield _GpuRound(calls, before, device), {}
    else:
        graphs, refused = _capture_all(calls, before, device)
        try:
            yield _GpuRound({name: graph.replay for name, graph in graphs.items()}, before, device), refused
        finally:
            for graph in graphs.values():
                graph.reset()
            torch.cuda.empty_cache()


class _HostRound:
    """Time until a call returns. On a GPU, of one among several calls in a row, begun when the GPU was idle: a call on
    its own would pay for the caches of the CPU that others filled.

    The backward pass runs in the calling thread. PyTorch hands that of a GPU to a thread of its own, once for the
    whole backward pass of a model: to wake it takes longer than to launch a kernel, and says nothing about the call.
    """

    def __init__(self, calls: Mapping[str, Call], before: Mapping[str, Call], device: torch.device) -> None:
        self._calls, self._before, self._device = calls, before, device
        self._in_a_row = dict.fromkeys(calls, 1)
        if device.type == "cuda":
            self._in_a_row = {name: self._fitting(name) for name in calls}

    def _fitting(self, name: str) -> int:
        """How many: a call on its own takes longer than one in a row, so that it is measured in a row."""
        self._in_a_row[name] = CALLS_IN_A_ROW
        count = int(ROW_SECONDS / min(self.seconds(name) for _ in range(3)))
        return min(max(count, 1), CALLS_IN_A_ROW)

    def __call__(self, order: Sequence[str]) -> list[float]:
        return [self.seconds(name) for name in order]

    def seconds(self, name: str) -> float:
        call, in_a_row = self._calls[name], self._in_a_row[name]
        self._before[name]()
        _synchronize(self._device)
        with torch.autograd.set_multithreading_enabled(False), _no_garbage_collection():
            start = perf_counter()
            for _ in range(in_a_row - 1):
                call()
            result = call()
            seconds = (perf_counter() - start) / in_a_row
        # Only now: what it takes to free the last result is not the call's.
        del result
        return seconds


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """As in `timeit`: what is collected is whatever was left behind since, by whomever."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _GpuRound:
    """Time between events around the launches of a call that all lie in the stream's queue before the first begins."""

    def __init__(self, calls: Mapping[str, Call], before: Mapping[str, Call], device: torch.device) -> None:
        self._calls, self._before, self._device = calls, before, device
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flushing = torch.empty(FLUSHED_CACHES * l2_bytes // 4, dtype=torch.float32, device=device)
        self._cycles_per_second = _spin_cycles_per_second()
        self._spin = {
            name: min(SPIN_MARGIN * max(self._host_seconds(name) for _ in range(3)) + SPIN_EXTRA, LONGEST_SPIN)
            for name in calls
        }
        self._longest_spin = {name: SPIN_GROWTH * spin for name, spin in self._spin.items()}
        for _ in range(2):
            self(list(calls))

    def __call__(self, order: Sequence[str]) -> list[float]:
        events = [self._enqueue(name) for name in order]
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) * 1e-3 for start, end in events]

    def _host_seconds(self, name: str) -> float:
        """Of a call on its own, as it is enqueued."""
        self._before[name]()
        torch.cuda.synchronize(self._device)
        start = perf_counter()
        self._calls[name]()
        return perf_counter() - start

    def _enqueue(self, name: str) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._before[name]()
        # Written, then read: the GPU would write dirty lines back while the call runs, and at its expense.
        self._flushing.zero_()
        self._flushing.sum()
        torch.cuda._sleep(int(self._spin[name] * self._cycles_per_second))
        start.record()
        self._calls[name]()
        end.record()
        if start.query():
            # The GPU got there before all was launched.
            self._spin[name] = min(2 * self._spin[name], self._longest_spin[name])
        return start, end


def _spin_cycles_per_second() -> float:
    cycles = 10_000_000
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(cycles)
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return cycles / (start.elapsed_time(end) * 1e-3)


def _capture_all(
    calls: Mapping[str, Call], before: Mapping[str, Call], device: torch.device
) -> tuple[dict[str, torch.cuda.CUDAGraph], dict[str, str]]:
    """The graphs of the calls that can be captured, and why the others cannot."""
    graphs: dict[str, torch.cuda.CUDAGraph] = {}
    refused: dict[str, str] = {}
    for name, call in calls.items():
        try:
            graphs[name] = _capture(call, before[name])
        except Exception as error:
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            _recover(device)
    return graphs, refused


def _capture(call: Call, before: Call) -> torch.cuda.CUDAGraph:
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            before()
            call()
        before()
        torch.cuda.synchronize()
        try:
            graph.capture_begin(pool=pool)
            call()
            graph.capture_end()
        except Exception:
            _abandon(graph, pool)
            raise
    current.wait_stream(side)
    return graph


_abandoned: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed: PyTorch's allocators may go on to ask them whether they are being captured."""


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a capture that failed, and with it that memory is allocated from the pool of the graph."""
    with suppress(RuntimeError):
        graph.capture_end()
    with suppress(RuntimeError):
        # Ending the capture was an error, before it came to this.
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
    graph.reset()
    _abandoned.append(graph)


def _recover(device: torch.device) -> None:
    """Capture what can be captured: until then the default random number generator of PyTorch takes a capture that
    failed for one that goes on, and refuses to work.
    """
    torch.cuda.synchronize(device)
    something = torch.zeros(1, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        something.add_(1)
    graph.reset()
    torch.cuda.empty_cache()


def _nothing() -> None:
    pass


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    """Make a GPU the current one: streams, events and spins are made on that."""
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        yield
