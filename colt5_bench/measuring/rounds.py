"""Rounds, in which each time column takes a sample of each call.

Graphs, too, are replayed after a flush of the L2 cache. Their inputs do not rotate over copies, for three reasons. Each
copy would need its own graph, with gigabytes of memory for a layer. Small inputs would need thousands of copies to fill
the cache. Tensors that are no inputs, such as the parameters of a layer, would stay warm. A flush needs one buffer of
twice the cache, and reaches everything.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from colt5_bench.measuring.refusal import RefusedError
from colt5_bench.process.garbage import no_garbage_collection
from colt5_bench.process.workspaces import clear_workspaces
from colt5_bench.texts import first_line

Call = Callable[[], Any]
Look = Callable[[Any, bool], None]
"""Takes the results of a timed call. The second argument is True if the replay of a graph wrote them."""

Round = Callable[[Sequence[str]], list[float]]
"""Runs the named calls in the order given and returns the seconds of each."""

GPU_TIME_COLUMNS = ("cold", "warm", "graph")
"""Columns that are timed by the clock of the GPU alone."""

GPU_COLUMNS, CPU_COLUMNS = (*GPU_TIME_COLUMNS, "wall", "eager"), ("wall",)
"""All columns. The first one gives the figure of a case."""

WARM_UP_CALLS = 2
"""The first call compiles and fills caches, and the second one may do so again."""

CALLS_IN_A_ROW, ROW_SECONDS = 10, 0.003
"""Limits of calls and, roughly, of seconds for a sample of host time on a GPU. Its queue of launches must not fill up,
because then the host waits."""

SHORT_ROW, LONGEST_ROW = 2, 0.02
"""Number of calls in a row if more calls would take the GPU longer. The next sample waits until the GPU is done."""

CALLS_IN_A_TRAIN, TRAIN_SECONDS = 50, 0.02
"""Limits of calls and, roughly, of seconds for a sample of the time that a caller waits. The GPU is idle at the start
and at the end of a train of calls; that share is small."""

SPIN_MARGIN, SPIN_EXTRA, LONGEST_SPIN = 1.5, 20e-6, 0.05
"""A spin lasts this many times the host time of the call and these seconds more. The last one limits the first length
of a spin in seconds; see `SPIN_GROWTH`."""

SPIN_GROWTH = 4
"""A spin that is too short is doubled, until it is this many times as long as at first. No spin is long enough for a
call that itself waits for the GPU."""

FLUSHED_CACHES = 2
"""Size of the buffer that is written and read to flush the L2, in L2s."""


@contextmanager
def rounds(
    column: str,
    calls: Mapping[str, Call],
    before: Mapping[str, Call],
    after: Mapping[str, Look],
    device: torch.device,
) -> Iterator[tuple[Round, dict[str, str]]]:
    """The round of a column, and the calls that it cannot time, with the reason."""
    if column == "wall":
        yield HostRound(calls, before, after, device), {}
    elif column == "eager":
        yield EagerRound(calls, before, after, device), {}
    elif column in ("cold", "warm"):
        yield GpuRound(calls, before, after, device, cold=column == "cold"), {}
    else:
        graphs, refused = _capture_all(calls, before, device)
        looks = {name: _look_at(graph, after[name]) for name, graph in graphs.items()}
        try:
            replays = {name: graph.replay for name, graph in graphs.items()}
            yield GpuRound(replays, before, looks, device, cold=True), refused
        finally:
            for graph in graphs.values():
                graph.reset()
            clear_workspaces()
            torch.cuda.empty_cache()


class HostRound:
    """Time until a call returns. On a GPU, it is the mean of several calls in a row that begin on an idle GPU, after
    one call that is not counted, because it finds the data of other calls in the caches of the CPU.

    The backward pass runs in the calling thread. PyTorch gives the one on a GPU to its own thread, once for the
    whole backward pass of a model. Waking this thread takes longer than a launch, and says nothing about the call.
    """

    def __init__(
        self, calls: Mapping[str, Call], before: Mapping[str, Call], after: Mapping[str, Look], device: torch.device
    ) -> None:
        self._calls, self._before, self._after, self._device = calls, before, after, device
        self._in_a_row = dict.fromkeys(calls, 1)
        if device.type == "cuda":
            self._in_a_row = {name: self._fitting(name) for name in calls}

    def _fitting(self, name: str) -> int:
        """Number of calls in a row. A call takes longer alone than in a row, so its duration is measured in a row."""
        self._in_a_row[name] = SHORT_ROW
        on_host, in_all = map(min, zip(*(self._seconds_of_both(name) for _ in range(3)), strict=True))
        count = int(min(ROW_SECONDS / on_host, max(LONGEST_ROW / in_all, SHORT_ROW)))
        return min(max(count, 1), CALLS_IN_A_ROW)

    def _seconds_of_both(self, name: str) -> tuple[float, float]:
        """Seconds of a call on the host, and until the GPU has done it."""
        _synchronize(self._device)
        start = perf_counter()
        on_host = self.seconds(name)
        _synchronize(self._device)
        # The first call is not counted on the host.
        return on_host, (perf_counter() - start) / (SHORT_ROW + 1)

    def __call__(self, order: Sequence[str]) -> list[float]:
        return [self.seconds(name) for name in order]

    def seconds(self, name: str) -> float:
        call, in_a_row = self._calls[name], self._in_a_row[name]
        self._before[name]()
        _synchronize(self._device)
        with torch.autograd.set_multithreading_enabled(False), no_garbage_collection():
            if in_a_row > 1:
                call()
            start = perf_counter()
            for _ in range(in_a_row - 1):
                call()
            result = call()
            seconds = (perf_counter() - start) / in_a_row
        # Freed after the clock is read: this time does not belong to the call.
        self._after[name](result, False)
        return seconds


class EagerRound:
    """Time that a caller waits per call in a train of calls. The train ends when the GPU has finished them all.
    Host and GPU work in parallel, and PyTorch runs backward passes in its own thread, as for any caller."""

    def __init__(
        self, calls: Mapping[str, Call], before: Mapping[str, Call], after: Mapping[str, Look], device: torch.device
    ) -> None:
        self._calls, self._before, self._after, self._device = calls, before, after, device
        self._in_train = dict.fromkeys(calls, 2)
        for name in calls:
            count = int(TRAIN_SECONDS / min(self.seconds(name) for _ in range(3)))
            self._in_train[name] = min(max(count, 1), CALLS_IN_A_TRAIN)

    def __call__(self, order: Sequence[str]) -> list[float]:
        return [self.seconds(name) for name in order]

    def seconds(self, name: str) -> float:
        call, in_train = self._calls[name], self._in_train[name]
        self._before[name]()
        _synchronize(self._device)
        with no_garbage_collection():
            start = perf_counter()
            for _ in range(in_train - 1):
                call()
            result = call()
            _synchronize(self._device)
            seconds = (perf_counter() - start) / in_train
        self._after[name](result, False)
        return seconds


class GpuRound:
    """Time between events around the launches of a call, which are all queued before the first one begins.

    Cold: the L2 cache has none of the data of the call. Warm: it has the data that the same call has just used.
    """

    def __init__(
        self,
        calls: Mapping[str, Call],
        before: Mapping[str, Call],
        after: Mapping[str, Look],
        device: torch.device,
        *,
        cold: bool,
    ) -> None:
        self._calls, self._before, self._after, self._device, self._cold = calls, before, after, device, cold
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._flushing = torch.empty(FLUSHED_CACHES * l2_bytes // 4, dtype=torch.float32, device=device)
        self._cycles_per_second = _spin_cycles_per_second()
        self._spin = {
            name: min(SPIN_MARGIN * median(self._host_seconds(name) for _ in range(3)) + SPIN_EXTRA, LONGEST_SPIN)
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
        """Host time of enqueuing one call."""
        self._before[name]()
        torch.cuda.synchronize(self._device)
        start = perf_counter()
        self._calls[name]()
        return perf_counter() - start

    def _enqueue(self, name: str) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._before[name]()
        if self._cold:
            # Written, then read: otherwise the GPU would write dirty lines back during the call, which would be slower.
            self._flushing.zero_()
            self._flushing.sum()
        else:
            self._calls[name]()
        torch.cuda._sleep(int(self._spin[name] * self._cycles_per_second))
        start.record()
        result = self._calls[name]()
        end.record()
        if start.query():
            # The GPU finished the spin before all kernels were launched.
            self._spin[name] = min(2 * self._spin[name], self._longest_spin[name])
        # The check is queued right after the call. Work on other streams that the call should have waited for is then
        # not in the copies.
        self._after[name](result, False)
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
) -> tuple[dict[str, "_Captured"], dict[str, str]]:
    """The graphs of calls that can be captured, and the reasons why others cannot."""
    graphs: dict[str, _Captured] = {}
    refused: dict[str, str] = {}
    for name, call in calls.items():
        try:
            graphs[name] = _capture(call, before[name])
        except (KeyboardInterrupt, RefusedError):
            raise
        except BaseException as error:
            refused[name] = first_line(error)
            _recover(device)
    return graphs, refused


def _look_at(graph: "_Captured", look: Look) -> Look:
    return lambda *_: look(graph.results(), True)


class _Captured:
    """The graph of a call, with the tensors that each replay writes again. A call may return them in any structure."""

    def __init__(self, graph: torch.cuda.CUDAGraph, results: Any) -> None:
        self._graph = graph
        self._results = [each.detach() for each in tree_leaves(results) if isinstance(each, torch.Tensor)]
        self.replay = graph.replay

    def results(self) -> list[torch.Tensor]:
        """Copies, because the next replay may write to the same memory."""
        return [each.clone() for each in self._results]

    def reset(self) -> None:
        self._results.clear()
        self._graph.reset()


def _capture(call: Call, before: Call) -> _Captured:
    side, current = torch.cuda.Stream(), torch.cuda.current_stream()
    side.wait_stream(current)
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_CALLS):
            before()
            call()
        before()
        torch.cuda.synchronize()
        clear_workspaces()
        try:
            graph.capture_begin(pool=pool)
            results = call()
            graph.capture_end()
        except BaseException:
            _abandon(graph, pool)
            raise
    current.wait_stream(side)
    return _Captured(graph, results)


_abandoned: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture failed. They stay alive, because PyTorch's allocators may still query them."""


def _abandon(graph: torch.cuda.CUDAGraph, pool: Any) -> None:
    """End a failed capture, so that no more memory is allocated from the pool of the graph."""
    with suppress(RuntimeError):
        graph.capture_end()
    with suppress(RuntimeError):
        # The end of the capture failed before this point.
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
    graph.reset()
    _abandoned.append(graph)


def _recover(device: torch.device) -> None:
    """Capture a trivial graph after a failed capture. Until a capture succeeds, PyTorch's random number generator
    behaves as if the failed one were still running, and raises errors."""
    torch.cuda.synchronize(device)
    something = torch.zeros(1, device=device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        something.add_(1)
    graph.reset()
    torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
