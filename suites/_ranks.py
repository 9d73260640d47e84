"""Calls of a layer that all ranks of a `torchrun` make together, as a function that the first rank calls.

The first rank measures, and tells the others what to do: each serves until the first has ended.
"""

import atexit
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from resource import RUSAGE_SELF, getrusage
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from colt5_bench.records.environment import gpu_state

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
"""Processes that `torchrun` has started."""

Part = Callable[[Any, ProcessGroup | None, torch.device, bool], tuple[nn.Module, dict[str, Tensor], Tensor]]
"""Makes a rank's module, its inputs and the gradient of its output. It takes a case, a group, a device and
`use_triton`. There is no group for one process.

It is a function of a file, so that other ranks can be told of it."""


@dataclass
class Rank:
    """One of the processes, and the call that it makes at present."""

    device: torch.device
    groups: dict[int, ProcessGroup | None]
    """Those of the first so many ranks."""

    control: ProcessGroup | None = None
    ranks: int = 1
    """Number of those that take part in the call."""

    module: nn.Module | None = None
    """None if this rank takes no part."""

    inputs: dict[str, Tensor] = field(default_factory=dict)
    upstream: Tensor | None = None
    output: Tensor | None = None
    leaves: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    """Those of the leaves, which are the inputs that have one."""

    latest: "tuple[Moment, Moment]" = (0.0, 0.0)
    """Begin and end of the latest pass, forward or backward."""

    bytes_sent: int = 0
    """By this rank to others, since the latest forward pass began."""

    def prepare(self, part: Part, case: Any, ranks: int, use_triton: bool) -> None:
        """Get ready for calls of another kind."""
        self.ranks, self.module, self.inputs, self.upstream = ranks, None, {}, None
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        if self.number < ranks:
            self.module, self.inputs, self.upstream = part(case, self.groups[ranks], self.device, use_triton)

    @property
    def number(self) -> int:
        """This process among all."""
        return dist.get_rank() if WORLD > 1 else 0

    def forward(self, wanted: tuple[str, ...]) -> None:
        """Call the module. Inputs that are wanted will have gradients."""
        if self.module is None:
            return
        self.bytes_sent = 0
        given = {name: each.detach().requires_grad_(name in wanted) for name, each in self.inputs.items()}
        self.leaves = [given[name] for name in wanted]
        with self._watched(), torch.set_grad_enabled(bool(wanted)):
            self.output = self.module(**given)

    def backward(self) -> None:
        """Gradients of inputs and parameters. Those of parameters are summed over ranks, as in training."""
        if self.module is None:
            return
        assert self.output is not None
        parameters = [*self.module.parameters()]
        with self._watched():
            grads = torch.autograd.grad(self.output, [*self.leaves, *parameters], self.upstream)
            if self.ranks > 1:
                flat = torch.cat([each.flatten() for each in grads[len(self.leaves) :]])
                dist.all_reduce(flat, group=self.groups[self.ranks])
        self.gradients = [*grads[: len(self.leaves)]]
        self.output, self.leaves = None, []

    def figures(self) -> list[dict[str, float]]:
        """Figures of all ranks, for the first."""
        on_gpu = self.device.type == "cuda"
        begin, end = self.latest
        state = gpu_state(self.device) if on_gpu else None
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
        own = {"seconds": _seconds(begin, end), "bytes_sent": float(self.bytes_sent), "process_peak_bytes": float(peak)}
        own |= {} if state is None else {"sm_clock_mhz": float(state.sm_clock_mhz)}
        every: list[Any] = [None] * WORLD
        dist.all_gather_object(every, own, group=self.control)
        return every

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Take the time, and count the bytes that go to other ranks."""
        gather, to_all = dist.all_gather, dist.all_to_all_single
        others = self.ranks - 1

        def counted_gather(parts: list[Tensor], x: Tensor, **options: Any) -> Any:
            self.bytes_sent += others * x.nbytes
            return gather(parts, x, **options)

        def counted_to_all(taken: Tensor, sent: Tensor, takes: list[int], sends: list[int], **options: Any) -> Any:
            self.bytes_sent += (sent.numel() - sends[self.number]) * sent.itemsize
            return to_all(taken, sent, takes, sends, **options)

        with patch.object(dist, "all_gather", counted_gather), patch.object(dist, "all_to_all_single", counted_to_all):
            begin = _moment(self.device)
            yield
            self.latest = begin, _moment(self.device)


Moment = float | torch.cuda.Event
"""On a GPU, where its stream is: a pass is not done when the host is."""


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


@cache
def rank() -> Rank:
    """This process. All ranks of the run have to ask for it."""
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
    if WORLD == 1:
        return Rank(device, {1: None})
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    groups = {1: None, **{ranks: dist.new_group([*range(ranks)]) for ranks in range(2, WORLD + 1)}}
    if dist.get_rank() == 0:
        atexit.register(_end)
        # When another rank has ended, `torchrun` gives this one half a minute: it writes its records.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return Rank(device, groups, dist.new_group(backend="gloo"))


def serve() -> None:
    """Do as the first rank says, until it ends."""
    me = rank()
    while True:
        message: list[Any] = [None]
        dist.broadcast_object_list(message, 0, group=me.control)
        name, arguments = message[0]
        if name == "end":
            dist.destroy_process_group()
            return
        getattr(me, name)(*arguments)


def _tell(name: str, *arguments: Any) -> None:
    try:
        dist.broadcast_object_list([(name, arguments)], 0, group=rank().control)
    except RuntimeError as error:
        raise RuntimeError(f"another rank has ended, or does not answer within the timeout: {error}") from error


def _end() -> None:
    with suppress(RuntimeError):
        _tell("end")
    dist.destroy_process_group()


def _together(name: str, *arguments: Any, ranks: int) -> None:
    """Call a method of all ranks that take part, or of this one alone."""
    if ranks > 1:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # Others would wait for what this one leaves out.
            raise RuntimeError("a call of several processes is not captured")
        _tell(name, *arguments)
    getattr(rank(), name)(*arguments)


def together(part: Part, case: Any, ranks: int, use_triton: bool) -> Callable[..., Tensor]:
    """A function of the first rank's inputs that gives its output, while other ranks do their part."""
    _together("prepare", part, case, ranks, use_triton, ranks=ranks)

    def function(**inputs: Tensor) -> Tensor:
        rank().inputs = inputs
        wanted = tuple(name for name, each in inputs.items() if each.requires_grad)
        if wanted:
            return _Step.apply(wanted, ranks, *(inputs[name] for name in wanted))
        return _forward(wanted, ranks)

    return function


def _forward(wanted: tuple[str, ...], ranks: int) -> Tensor:
    _together("forward", wanted, ranks=ranks)
    output = rank().output
    assert output is not None
    return output


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, wanted: tuple[str, ...], ranks: int, *inputs: Tensor) -> Tensor:
        ctx.ranks = ranks
        return _forward(wanted, ranks).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rank().upstream = grad
        _together("backward", ranks=ctx.ranks)
        return None, None, *rank().gradients


def figures(ranks: int) -> dict[str, float]:
    """Figures of each rank of the latest call, by name, and the bytes that all have sent."""
    _tell("figures")
    every = rank().figures()[:ranks]
    found = {f"rank_{number}_{name}": each for number, own in enumerate(every) for name, each in own.items()}
    return {**found, "bytes_sent": sum(own["bytes_sent"] for own in every)}
