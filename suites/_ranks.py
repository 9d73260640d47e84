"""Calls that all ranks of a `torchrun` make together, as a function that the first rank calls.

The first rank measures, and sends commands to the others, which serve until the first has ended.
"""

import atexit
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import count
from resource import RUSAGE_SELF, getrusage
from typing import Any, NamedTuple, TypeVar
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from colt5_bench.records.environment import gpu_state

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
"""Number of processes that `torchrun` has started."""


@dataclass
class Part:
    """One rank's part of a function's calls."""

    module: nn.Module
    inputs: dict[str, Tensor] = field(default_factory=dict)
    upstream: Tensor | None = None
    """grad_output. The first rank gets its own, and its inputs, with each call."""

    around: Callable[[], AbstractContextManager[None]] = nullcontext
    """Makes a context for forward and backward passes."""

    warm: set[str] = field(default_factory=set)
    """Passes that ran before. The first run compiles, so it is not timed."""


MakePart = Callable[[Any, ProcessGroup | None, torch.device], Part]
"""Makes a rank's part from a case, a group and a device. There is no group for one process.

It is a function in a file, possibly with bound arguments, so that it can be sent to other ranks."""


class Graph(NamedTuple):
    """A forward pass that may be differentiated."""

    output: Tensor
    leaves: list[Tensor]
    """Inputs that have a gradient."""


T = TypeVar("T")


@dataclass
class Rank:
    """One of the processes, and its current call."""

    groups: dict[int, ProcessGroup | None]
    """Groups of the first ranks, by number of ranks."""

    control: ProcessGroup | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    case: Any = None
    parts: dict[int, tuple[int, Part | None]] = field(default_factory=dict)
    """Functions of the case, by number, because their calls may alternate. Each has its number of ranks; ranks beyond
    have no part."""

    given: dict[str, Tensor] = field(default_factory=dict)
    """Inputs of the first rank for the next call."""

    upstream: Tensor | None = None
    """grad_output of the first rank."""

    graph: "Graph | None" = None
    gradients: list[Tensor] = field(default_factory=list)
    """Gradients of the leaves."""

    passes: "list[tuple[Moment, Moment]]" = field(default_factory=list)
    """Begin and end of each pass of the latest call, forward or backward."""

    bytes_sent: int = 0
    """Bytes from this rank to others, since the latest forward pass began."""

    def prepare(self, number: int, make: MakePart, case: Any, ranks: int, device_type: str) -> None:
        """Prepare the calls of one more function. Functions of another case are forgotten."""
        if case != self.case:
            self.parts.clear()
        self.case, self.device = case, _device(device_type)
        if device_type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.parts[number] = ranks, make(case, self.groups[ranks], self.device) if self.number < ranks else None

    @property
    def number(self) -> int:
        """Rank of this process."""
        return dist.get_rank() if WORLD > 1 else 0

    def forward(self, number: int, wanted: tuple[str, ...]) -> None:
        """Call the module. Inputs in `wanted` get gradients."""
        ranks, part = self.parts[number]
        if part is None:
            return
        self.bytes_sent, self.passes = 0, []
        inputs, self.given = self.given or part.inputs, {}
        leaves = {name: each.detach().requires_grad_(name in wanted) for name, each in inputs.items()}
        with part.around(), torch.set_grad_enabled(bool(wanted)):
            output = self._timed("forward", ranks, part, lambda: part.module(**leaves))
        self.graph = Graph(output, [leaves[name] for name in wanted])

    def backward(self, number: int) -> None:
        """Gradients of inputs and parameters. Those of parameters are summed over ranks, as in training."""
        ranks, part = self.parts[number]
        if part is None:
            return
        assert self.graph is not None
        output, leaves = self.graph
        upstream = part.upstream if self.upstream is None else self.upstream
        sources = [*leaves, *part.module.parameters()]

        def differentiate() -> list[Tensor]:
            retain = "backward" not in part.warm
            grads = torch.autograd.grad(output, sources, upstream, retain_graph=retain)
            if ranks > 1:
                flat = torch.cat([each.flatten() for each in grads[len(leaves) :]])
                dist.all_reduce(flat, group=self.groups[ranks])
            return [*grads[: len(leaves)]]

        with part.around():
            self.gradients = self._timed("backward", ranks, part, differentiate)
        self.graph, self.upstream = None, None

    def _timed(self, name: str, ranks: int, part: Part, compute: Callable[[], T]) -> T:
        if name not in part.warm:
            compute()
            part.warm.add(name)
        with self._watched(ranks):
            return compute()

    def taken(self) -> tuple[Tensor, ...]:
        """Gradients of the latest call. They are not kept here, because they may be as large as a GPU's memory."""
        gradients, self.gradients = self.gradients, []
        return tuple(gradients)

    def figures(self) -> list[dict[str, float]]:
        """Figures of all ranks, for the first rank."""
        on_gpu = self.device.type == "cuda"
        state = gpu_state(self.device) if on_gpu else None
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
        own = {
            "seconds": sum(_seconds(begin, end) for begin, end in self.passes),
            "bytes_sent": float(self.bytes_sent),
            "process_peak_bytes": float(peak),
        }
        own |= {} if state is None else {"sm_clock_mhz": float(state.sm_clock_mhz)}
        every: list[Any] = [None] * WORLD
        dist.all_gather_object(every, own, group=self.control)
        return every

    def end(self) -> None:
        """Leave the other ranks. Threads of groups that are still held could end the interpreter with an error."""
        self.groups.clear()
        self.parts.clear()
        self.control = None
        dist.destroy_process_group()

    @contextmanager
    def _watched(self, ranks: int) -> Iterator[None]:
        """Measure the time, and count the bytes sent to other ranks."""
        gather, to_all = dist.all_gather, dist.all_to_all_single

        def counted_gather(parts: list[Tensor], x: Tensor, **options: Any) -> Any:
            self.bytes_sent += (ranks - 1) * x.nbytes
            return gather(parts, x, **options)

        def counted_to_all(taken: Tensor, sent: Tensor, takes: list[int], sends: list[int], **options: Any) -> Any:
            self.bytes_sent += (sent.numel() - sends[self.number]) * sent.itemsize
            return to_all(taken, sent, takes, sends, **options)

        with patch.object(dist, "all_gather", counted_gather), patch.object(dist, "all_to_all_single", counted_to_all):
            begin = _moment(self.device)
            yield
            self.passes.append((begin, _moment(self.device)))


Moment = float | torch.cuda.Event
"""On a GPU an event in its stream, because a pass may end after its host code."""


def _moment(device: torch.device) -> Moment:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(begin: Moment, end: Moment) -> float:
    if isinstance(begin, float) or isinstance(end, float):
        assert isinstance(begin, float)
        assert isinstance(end, float)
        return end - begin
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def _device(device_type: str) -> torch.device:
    """The device of this process, by type."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if device_type == "cuda" else torch.device("cpu")
    )


@cache
def rank() -> Rank:
    """This process. All ranks of the run have to call this."""
    if WORLD == 1:
        return Rank({1: None})
    if torch.cuda.is_available():
        torch.cuda.set_device(_device("cuda"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    groups = {1: None, **{ranks: dist.new_group([*range(ranks)]) for ranks in range(2, WORLD + 1)}}
    if dist.get_rank() == 0:
        atexit.register(_end)
        _outlive_others()
    return Rank(groups, dist.new_group(backend="gloo"))


def _outlive_others() -> None:
    """Write the records after another rank has ended: `torchrun` signals this one, and waits for half a minute.

    The GPU and its host would wait for that rank, so a thread aborts their exchanges.
    """
    signal.signal(signal.SIGTERM, lambda *_: None)
    if not torch.cuda.is_available():
        return
    hearing, telling = socket.socketpair()
    telling.setblocking(False)
    signal.set_wakeup_fd(telling.detach())

    def abort() -> None:
        while signal.SIGTERM not in hearing.recv(1):
            pass
        for group in filter(None, rank().groups.values()):
            group._get_backend(torch.device("cuda")).abort()

    threading.Thread(target=abort, daemon=True).start()


def serve() -> None:
    """Execute the commands of the first rank, until it ends."""
    name = ""
    while name != "end":
        message: list[Any] = [None]
        dist.broadcast_object_list(message, 0, group=rank().control)
        name, arguments = message[0]
        getattr(rank(), name)(*arguments)


def _tell(name: str, *arguments: Any) -> None:
    try:
        dist.broadcast_object_list([(name, arguments)], 0, group=rank().control)
    except RuntimeError as error:
        raise RuntimeError(f"another rank has ended, or did not answer within the timeout: {error}") from error


def _end() -> None:
    with suppress(RuntimeError):
        _tell("end")
    rank().end()


def _together(name: str, *arguments: Any, ranks: int) -> None:
    """Call a method on all participating ranks, or only on this one."""
    if ranks > 1:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # A capture does not run the exchanges that other ranks would wait for.
            raise RuntimeError("a call of several processes cannot be captured in a CUDA graph")
        _tell(name, *arguments)
    getattr(rank(), name)(*arguments)


def together(make: MakePart, case: Any, ranks: int) -> Callable[..., Tensor]:
    """A function of the first rank's inputs that returns its output, while other ranks compute their parts.

    It is valid for calls until the first one of another case."""
    number = next(_numbers)

    @cache
    def prepare(device_type: str) -> None:
        _together("prepare", number, make, case, ranks, device_type, ranks=ranks)

    def function(**inputs: Tensor) -> Tensor:
        wanted = tuple(name for name, each in inputs.items() if each.requires_grad)
        prepare(next(iter(inputs.values())).device.type)
        rank().given = inputs
        if wanted:
            return _Step.apply(number, wanted, ranks, *(inputs[name] for name in wanted))
        return _forward(number, wanted, ranks).output

    return function


_numbers = count()


def _forward(number: int, wanted: tuple[str, ...], ranks: int) -> Graph:
    _together("forward", number, wanted, ranks=ranks)
    # No tensor of a call stays here after the caller has dropped it.
    graph, rank().graph = rank().graph, None
    assert graph is not None
    return graph


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, number: int, wanted: tuple[str, ...], ranks: int, *inputs: Tensor) -> Tensor:
        ctx.call, ctx.graph = (number, ranks), _forward(number, wanted, ranks)
        output: Tensor = ctx.graph.output.detach()
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        number, ranks = ctx.call
        rank().upstream, rank().graph, ctx.graph = grad, ctx.graph, None
        _together("backward", number, ranks=ranks)
        return None, None, None, *rank().taken()


def figures(ranks: int) -> dict[str, float]:
    """Figures of each rank in the latest call, by name, and the bytes that all ranks have sent."""
    _tell("figures")
    every = rank().figures()[:ranks]
    found = {f"rank_{number}_{name}": each for number, own in enumerate(every) for name, each in own.items()}
    return {**found, "bytes_sent": sum(own["bytes_sent"] for own in every)}
