"""Launches of kernels: compiled side by side, and known after the first call."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from contextvars import Context
from functools import partial
from inspect import getsource
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import AsyncCompileMode
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels._common.dry_run import dry_run_of, launches_of_layer
from kernels._common.plans import Plan
from kernels._common.tape import current_recorder
from kernels._common.tensors import INTERPRETED, address

COUNTS = [
    "n_rows", "n_tokens", "n_windows", "n_queries", "n_keys", "n_slots", "n_batches", "n_routed", "n_blocks",
    "blocks", "parts", "chunks", "tiles", "groups",
]  # fmt: skip
"""Arguments that Triton is not to specialize on. They are bounds, which change with the length of sequences and make no
address any better aligned. Strides and lengths of rows do that, and stay as they are."""


class Scratch:
    """Memory that the kernels of a launcher share. Each call allocates its own: zeros at first, or anything."""

    def __init__(self, *shape: int, dtype: torch.dtype, zeros: bool = False) -> None:
        self._allocate = partial(torch.zeros if zeros else torch.empty, shape, dtype=dtype)
        self.dtype = dtype

    def on(self, device: torch.device) -> Callable[[], Tensor]:
        return partial(self._allocate, device=device)


class Part(NamedTuple):
    """A pointer to an entry of contiguous memory that is not its first."""

    whole: Tensor | Scratch
    first: int


class _Pointer:
    """As much of a pointer as Triton compiles for.

    This is the dtype of its entries, and whether its address is aligned. Scratch memory is new, and so it is aligned.
    """

    def __init__(self, pointer: Tensor | Scratch | Part) -> None:
        whole, first = pointer if isinstance(pointer, Part) else (pointer, 0)
        self.dtype = whole.dtype
        self._address = (0 if isinstance(whole, Scratch) else address(whole)) + first * self.dtype.itemsize

    def data_ptr(self) -> int:
        return self._address


class Launch:
    """A launch of a kernel.

    Args:
        plan: its grid, constants and options.
        arguments: in the order of parameters, pointers first: each a Tensor, Scratch or Part.
        named: other numbers and constants.
    """

    def __init__(self, kernel: Any, plan: Plan, *arguments: Any, **named: Any) -> None:
        self.kernel, self.grid, self.named = kernel, plan.grid, {**named, **plan.settings}
        self.pointers = [each for each in arguments if isinstance(each, (Tensor, Scratch, Part))]
        self.numbers = arguments[len(self.pointers) :]

    def compile(self) -> None:
        """Have the kernel compiled, and launch nothing."""
        self.kernel.warmup(*map(_Pointer, self.pointers), *self.numbers, grid=self.grid, **self.named)

    def all_but_pointers(self) -> tuple[Any, ...]:
        """The other arguments, in the order of the kernel's parameters."""
        named = {name: value for name, value in self.named.items() if name in self.kernel.arg_names}
        bound = self.kernel.signature.bind(*self.pointers, *self.numbers, **named)
        bound.apply_defaults()
        return tuple(bound.arguments.values())[len(self.pointers) :]


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels side by side: Triton's passes and the programs it calls leave Python to others.

    Args:
        device: number of the GPU that kernels are loaded to; negative: they are compiled alone.
    """

    def __init__(self, device: int) -> None:
        set_device = () if device < 0 else (torch.cuda.set_device, (device,))
        super().__init__(None, "colt5-compile", *set_device)
        self._is_loading = device >= 0

    def submit(  # type: ignore[override]
        self, compile_kernel: Callable[[], CompiledKernel]
    ) -> Future[CompiledKernel | None]:
        return super().submit(self._compile, compile_kernel)

    def _compile(self, compile_kernel: Callable[[], CompiledKernel]) -> CompiledKernel | None:
        """None where there is an error, as if nothing had been compiled: the launch meets it again, and raises it."""
        kernel = None
        with suppress(Exception):
            kernel = compile_kernel()
            if self._is_loading:
                # Triton loads a kernel, and builds its launcher, when it is asked for the latter.
                attrgetter("run")(kernel)
        return kernel


def compile_side_by_side(launches: Iterable[Launch], later: Callable[[], Iterable[Launch]], device: int) -> None:
    """Compile what launches lack, and where they lack anything, what later ones lack."""
    with _Compilers(device) as compilers, AsyncCompileMode(compilers) as compiling:
        for each in launches:
            each.compile()
        if compiling.raw_futures:
            for each in later():
                each.compile()


class _Memory:
    """All memory of a call: tensors among its arguments, then scratch in the order of its first use."""

    def __init__(self, tensors: list[Tensor], device: torch.device) -> None:
        self._owners: list[Tensor | Scratch] = [*tensors]
        self._device = device
        self.tensors = tensors
        self.allocators: list[Callable[[], Tensor]] = []

    def place_of(self, pointer: Tensor | Scratch | Part) -> tuple[int, int]:
        """The number of a tensor, and the first entry."""
        whole, first = pointer if isinstance(pointer, Part) else (pointer, 0)
        if isinstance(whole, Scratch) and not any(each is whole for each in self._owners):
            self._owners.append(whole)
            self.allocators.append(whole.on(self._device))
            self.tensors.append(self.allocators[-1]())
        for number, owner in enumerate(self._owners):
            if owner is whole:
                return number, first
        raise TypeError("tensors of a launch must be arguments of its launcher")

    def tensor_at(self, number: int, first: int) -> Tensor:
        tensor = self.tensors[number]
        return tensor.view(-1)[first:] if first else tensor


class _Launched(NamedTuple):
    """A launch that went Triton's own way, and the compiled kernel that it came to."""

    launch: Launch
    places: list[tuple[int, int]]
    compiled: Any


class _Ready(NamedTuple):
    """A launch of which all is known but addresses and stream."""

    run: Callable[..., None]
    programs: int
    function: int
    metadata: Any

    take: Callable[[list[int]], tuple[int, ...]]
    """Chooses the addresses that the kernel takes from all of the call."""

    rest: tuple[Any, ...]

    compiled: CompiledKernel
    """The owner of the function."""


class _Call(NamedTuple):
    """A call whose launches are known."""

    scratch: list[Callable[[], Tensor]]

    parts: list[tuple[int, int]]
    """Other addresses that kernels take: the number of a tensor, and an offset in bytes."""

    launches: list[_Ready]


def _runs_as_known() -> bool:
    """True if this Triton runs a compiled kernel as launchers do. Triton 3.6 to 3.8 does."""
    call = (
        "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata,"
        " knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
    )
    return not INTERPRETED and call in " ".join(getsource(JITFunction.run).split())


_run = JITFunction.run if _runs_as_known() else None
"""Triton's own way to a launch, if a shorter one is known."""


def is_watched() -> bool:
    """True if all launches have to go Triton's own way: for hooks, a replacement of it, or kernels that debug."""
    runtime = triton.knobs.runtime
    return (
        JITFunction.run is not _run
        or _does_something(runtime.launch_enter_hook)
        or _does_something(runtime.launch_exit_hook)
        or runtime.debug
        or runtime.add_stages_inspection_hook is not None
        or triton.knobs.compilation.instrumentation_mode != ""
    )


def _does_something(hook: Any) -> bool:
    """True for a chain of hooks that has any, and for a function that somebody has put in its place."""
    return hook is not None and getattr(hook, "calls", True)


PLAIN_VALUES = frozenset({int, float, bool, type(None), torch.dtype})
"""Types of arguments of a launcher that are no tensors."""

LAUNCHERS: list["Launcher"] = []
"""All of them, for tests that change what they would launch."""

MOST_KEPT = 4096
"""Calls that a launcher keeps. It begins anew when there are more."""


class Launcher:
    """A function that launches kernels, and keeps what it launched for later calls.

    For each launch, Triton chooses a compiled kernel by the dtypes of tensors, by which addresses are multiples of 16,
    and by numbers; before that, we choose kernels and plans. All of this follows from a key: the device, type, shape,
    strides, dtype and alignment of tensors, and type and value of all else. The first call of a key goes Triton's own
    way, and its compiled kernels are kept. A later one allocates scratch memory and hands addresses to these, on the
    stream that is current then. Launches that somebody watches all go Triton's own way; see `is_watched`.

    Args:
        choose: yields launches. It is a pure function of positional arguments, the first of which is a tensor. Instead
            of tensors it gets others of the same memory; it does not compute with them.

    Raises:
        TypeError: a launch takes a tensor that is no argument.
    """

    def __init__(self, choose: Callable[..., Iterator[Launch]]) -> None:
        self.choose = choose
        """For another launcher, which yields these launches among its own."""
        self._kept: dict[tuple[Any, ...], _Call] = {}
        self.__doc__ = choose.__doc__
        LAUNCHERS.append(self)

    def forget(self) -> None:
        """Choose anew from the next call on."""
        self._kept.clear()

    def __call__(self, *arguments: Any) -> None:
        dry_run = dry_run_of(arguments[0])
        if dry_run is not None:
            dry_run.launches += self.choose(*arguments)
            return
        index = arguments[0].get_device()
        if index >= 0 and index != torch._C._cuda_getDevice():
            with torch.cuda.device(index):
                self(*arguments)
            return
        if is_watched():
            self._launch_by_triton(arguments)
            return
        active = driver.active
        # A test may have a driver that takes CPU tensors.
        device = index if index >= 0 else active.get_current_device()
        key: list[Any] = [device]
        addresses: list[int] = []
        for each in arguments:
            kind = type(each)
            if kind in PLAIN_VALUES:
                key += (kind, each)
            else:
                address = each.data_ptr()
                addresses.append(address)
                key += (kind, each.shape, each.stride(), each.dtype, each.get_device(), address % 16 == 0)
        known = self._kept.get(tuple(key))
        if known is None:
            # In a context of its own, where nobody else's mode of compiling is.
            Context().run(compile_side_by_side, self.choose(*arguments), launches_of_layer(), index)
            self._keep(tuple(key), *self._launch_by_triton(arguments))
            return
        # It lives until the kernels are in their stream, which its next owner comes after.
        scratch = [allocate() for allocate in known.scratch]
        addresses += [each.data_ptr() for each in scratch]
        recorder = current_recorder()
        if recorder is not None:
            tensors = [each for each in arguments if isinstance(each, Tensor)]
            recorder.launch([*tensors, *scratch], known.parts, known.launches)
        if known.parts:
            addresses += [addresses[number] + offset for number, offset in known.parts]
        stream = active.get_current_stream(device)
        for run, programs, function, metadata, take, rest, _ in known.launches:
            run(programs, 1, 1, stream, function, metadata, None, None, None, *take(addresses), *rest)

    def _launch_by_triton(self, arguments: tuple[Any, ...]) -> tuple[_Memory, list[_Launched]]:
        """Launch Triton's own way."""
        recorder = current_recorder()
        if recorder is not None:
            recorder.call(self, arguments, {}, ())
            # Triton's own steps are not taken down.
            with torch._C._DisableTorchDispatch():
                return self._launch(arguments)
        return self._launch(arguments)

    def _launch(self, arguments: tuple[Any, ...]) -> tuple[_Memory, list[_Launched]]:
        # Each a tensor of its own, so that it tells which argument it stands for.
        stand_ins = [each.detach() if isinstance(each, Tensor) else each for each in arguments]
        memory = _Memory([each for each in stand_ins if isinstance(each, Tensor)], arguments[0].device)
        launched = []
        for launch in self.choose(*stand_ins):
            places = [memory.place_of(each) for each in launch.pointers]
            tensors = [memory.tensor_at(*place) for place in places]
            compiled = launch.kernel[launch.grid](*tensors, *launch.numbers, **launch.named)
            launched.append(_Launched(launch, places, compiled))
        return memory, launched

    def _keep(self, key: tuple[Any, ...], memory: _Memory, launched: list[_Launched]) -> None:
        if not all(isinstance(each.compiled, CompiledKernel) for each in launched):
            return
        parts = list(dict.fromkeys(place for each in launched for place in each.places if place[1]))
        numbered = [*((number, 0) for number in range(len(memory.tensors))), *parts]
        ready = []
        for launch, places, compiled in launched:
            take = taker([numbered.index(place) for place in places])
            how = (compiled.run, *launch.grid, compiled.function, compiled.packed_metadata)
            ready.append(_Ready(*how, take, launch.all_but_pointers(), compiled))
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
        offsets = [(number, first * memory.tensors[number].itemsize) for number, first in parts]
        self._kept[key] = _Call(memory.allocators, offsets, ready)


def taker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes what stands at some places, in the time of one that is written out."""
    if len(places) == 1:
        return lambda given: (given[places[0]],)
    return itemgetter(*places) if places else lambda given: ()
