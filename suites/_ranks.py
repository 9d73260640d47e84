"""Calls of a layer that all ranks of a `torchrun` make together, as a function that the first rank calls.

The first rank measures, and tells the others what to do: each serves until the first has ended.
"""

import atexit
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from resource import RUSAGE_SELF, getrusage
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from colt5_bench.records.environment import gpu_state

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
"""Processes that `torchrun` has started."""

Inputs = Mapping[str, Tensor]

Part = Callable[[Any, ProcessGroup, torch.device, bool], tuple[Callable[..., Tensor], Inputs, Tensor]]
"""Makes a rank's function, its inputs and the gradient of its output. It takes a case, a group, a device and
`use_triton`.

It is a function of a module, so that other ranks can be told of it."""


@dataclass
class Rank:
    """One of the processes, and the call that it makes at present."""

    device: torch.device
    groups: dict[int, ProcessGroup]
    """Those of the first so many ranks."""

    control: ProcessGroup
    group: ProcessGroup | None = None
    """The ranks of the call; None if this one has no part in it."""

    function: Callable[..., Tensor] | None = None
    inputs: dict[str, Tensor] = field(default_factory=dict)
    upstream: Tensor | None = None
    shared: tuple[str, ...] = ()
    """Inputs that are the same on all ranks: parameters."""

    output: Tensor | None = None
    sources: list[Tensor] = field(default_factory=list)
    seconds: float = 0.0
    """Time of the latest pass, forward or backward."""

    bytes_sent: int = 0
    """By this rank to others, since the latest forward pass began."""

    def prepare(self, part: Part, case: Any, ranks: int, use_triton: bool) -> None:
        self.group, self.output, self.sources = None, None, []
        if dist.get_rank() < ranks:
            self.group = self.groups[ranks]
            self.function, inputs, self.upstream = part(case, self.group, self.device, use_triton)
            self.inputs = dict(inputs)

    def share(self, names: tuple[str, ...]) -> None:
        """Take the first rank's values of some inputs."""
        self.shared = names
        for name in names if self.group is not None else ():
            dist.broadcast(self.inputs[name].detach(), 0, group=self.group)

    def forward(self, wanted: tuple[str, ...]) -> None:
        """Call the function. Inputs that are wanted will have gradients."""
        if self.group is None:
            return
        assert self.function is not None
        self.bytes_sent = 0
        leaves = {name: each.detach().requires_grad_(name in wanted) for name, each in self.inputs.items()}
        self.sources = [leaves[name] for name in wanted]
        with self._watched(), torch.set_grad_enabled(bool(wanted)):
            self.output = self.function(**leaves)

    def backward(self, wanted: tuple[str, ...]) -> None:
        """Gradients of the wanted inputs. Those of parameters are summed over ranks, as data parallel training does."""
        if self.group is None:
            return
        assert self.output is not None
        with self._watched():
            grads = dict(zip(wanted, torch.autograd.grad(self.output, self.sources, self.upstream), strict=True))
            shared = [grads[name] for name in wanted if name in self.shared]
            if shared:
                flat = torch.cat([each.flatten() for each in shared])
                dist.all_reduce(flat, group=self.group)
                for each, total in zip(shared, flat.split([each.numel() for each in shared]), strict=True):
                    each.copy_(total.view_as(each))
        self.output, self.sources = None, [*grads.values()]

    def figures(self) -> list[dict[str, float]]:
        """Figures of all ranks, for the first."""
        state = gpu_state(self.device) if self.device.type == "cuda" else None
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
        own = {"seconds": self.seconds, "bytes_sent": float(self.bytes_sent), "process_peak_bytes": float(peak)}
        own |= {} if state is None else {"sm_clock_mhz": float(state.sm_clock_mhz)}
        every: list[Any] = [None] * WORLD
        dist.all_gather_object(every, own, group=self.control)
        return every

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """Take the time, and count the bytes that go to other ranks."""
        gather, to_all = dist.all_gather, dist.all_to_all_single
        others = self.group.size() - 1 if self.group is not None else 0

        def counted_gather(parts: list[Tensor], x: Tensor, **options: Any) -> Any:
            self.bytes_sent += others * x.nbytes
            return gather(parts, x, **options)

        def counted_to_all(taken: Tensor, sent: Tensor, takes: list[int], sends: list[int], **options: Any) -> Any:
            own = sends[self.group.rank()] if self.group is not None else 0
            self.bytes_sent += (sent.numel() - own) * sent.itemsize
            return to_all(taken, sent, takes, sends, **options)

        with patch.object(dist, "all_gather", counted_gather), patch.object(dist, "all_to_all_single", counted_to_all):
            start = time.perf_counter()
            yield
            self.seconds = time.perf_counter() - start


@cache
def rank() -> Rank:
    """This process. All ranks of the run have to ask for it."""
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    groups = {ranks: dist.new_group([*range(ranks)]) for ranks in range(1, WORLD + 1)}
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


def _together(name: str, *arguments: Any) -> Any:
    """Call a method of all ranks."""
    _tell(name, *arguments)
    return getattr(rank(), name)(*arguments)


def together(part: Part, case: Any, ranks: int, use_triton: bool, shared: tuple[str, ...]) -> Callable[..., Tensor]:
    """A function of the first rank's inputs that gives its output, while others call theirs.

    Args:
        shared: inputs that are the same on all ranks.
    """
    _together("prepare", part, case, ranks, use_triton)
    latest: list[object] = []

    def function(**inputs: Tensor) -> Tensor:
        versions: list[object] = [(inputs[name].data_ptr(), inputs[name]._version) for name in shared]
        rank().inputs = dict(inputs)
        if versions != latest:
            _together("share", shared)
            latest[:] = versions
        names = tuple(name for name in inputs if inputs[name].requires_grad)
        return _Step.apply(names, *(inputs[name] for name in names)) if names else _without_gradient()

    return function


def _without_gradient() -> Tensor:
    _together("forward", ())
    output = rank().output
    assert output is not None
    return output


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, names: tuple[str, ...], *inputs: Tensor) -> Tensor:
        ctx.names = names
        _together("forward", names)
        output = rank().output
        assert output is not None
        return output.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rank().upstream = grad
        _together("backward", ctx.names)
        return None, *rank().sources


def figures(ranks: int) -> dict[str, float]:
    """Figures of each rank of the latest call, by name, and the bytes that all have sent."""
    every = _together("figures")[:ranks]
    found = {f"rank_{number}_{name}": each for number, own in enumerate(every) for name, each in own.items()}
    return {**found, "bytes_sent": sum(own["bytes_sent"] for own in every)}
