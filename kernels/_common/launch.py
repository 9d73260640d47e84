"""Launches of kernels: compiled in parallel, and kept after the first call."""

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
"""Common names for `do_not_specialize`, which each kernel passes itself. They are bounds, which change with the length
of sequences and do not affect the alignment of addresses. Strides and lengths of rows affect it, so Triton specializes
on them."""


class Scratch:
    """Memory that the kernels of a launcher share. Each call allocates its own, uninitialized or filled with zeros."""

    def __init__(self, *shape: int, dtype: torch.dtype, zeros: bool = False) -> None:
        self._allocate = partial(torch.zeros if zeros else torch.empty, shape, dtype=dtype)
        self.dtype = dtype

    def on(self, device: torch.device) -> Callable[[], Tensor]:
        return partial(self._allocate, device=device)


class Part(NamedTuple):
    """A pointer to an entry of contiguous memory other than the first."""

    whole: Tensor | Scratch
    first: int


class _Pointer:
    """The properties of a pointer that Triton compiles for.

    These are the dtype of its entries, and whether its address is aligned. Scratch memory is newly allocated, so it is
    aligned.
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
        """Compile the kernel without launching it."""
        self.kernel.warmup(*map(_Pointer, self.pointers), *self.numbers, grid=self.grid, **self.named)

    def all_but_pointers(self) -> tuple[Any, ...]:
        """The other arguments, in the order of the kernel's parameters."""
        named = {name: value for name, value in self.named.items() if name in self.kernel.arg_names}
        bound = self.kernel.signature.bind(*self.pointers, *self.numbers, **named)
        bound.apply_defaults()
        return tuple(bound.arguments.values())[len(self.pointers) :]


class _Compilers(ThreadPoolExecutor):
    """Threads that compile kernels in parallel. Triton's passes and its programs do not hold Python's lock.

    Args:
        device: number of the GPU that kernels are loaded to. If it is negative, kernels are compiled but not loaded.
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
        """Compile and load a kernel. The result is None if that fails; the launch then fails too, and raises the
        error."""
        kernel = None
        with suppress(Exception):
            kernel = compile_kernel()
            if self._is_loading:
                # Triton loads a kernel, and builds its launcher, when this attribute is read.
                attrgetter("run")(kernel)
        return kernel


def compile_side_by_side(launches: Iterable[Launch], later: Callable[[], Iterable[Launch]], device: int) -> None:
    """Compile the missing kernels of launches. If any was missing, also compile those of later launches."""
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
    """A launch by Triton, and the compiled kernel that Triton chose."""

    launch: Launch
    places: list[tuple[int, int]]
    compiled: Any


class _Ready(NamedTuple):
    """A launch without its addresses and its stream. All else is known."""

    run: Callable[..., None]
    programs: int
    function: int
    metadata: Any

    take: Callable[[list[int]], tuple[int, ...]]
    """Chooses the addresses that the kernel takes, from all addresses of the call."""

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
    """True if this version of Triton runs a compiled kernel as launchers do. Versions 3.6 to 3.8 do."""
    call = (
        "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata,"
        " knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
    )
    return not INTERPRETED and call in " ".join(getsource(JITFunction.run).split())


_KNOWN_RUN = JITFunction.run if _runs_as_known() else None
"""Triton's function that launches a kernel. None if launchers cannot replace it."""


def is_watched() -> bool:
    """True if Triton itself has to do all launches.

    This is so if there are hooks, if Triton's function was replaced, or if kernels are debugged. It is also so if this
    version of Triton is unknown, or interprets kernels.
    """
    runtime = triton.knobs.runtime
    return (
        JITFunction.run is not _KNOWN_RUN
        or _does_something(runtime.launch_enter_hook)
        or _does_something(runtime.launch_exit_hook)
        or runtime.debug
        or runtime.add_stages_inspection_hook is not None
        or triton.knobs.compilation.instrumentation_mode != ""
    )


def _does_something(hook: Any) -> bool:
    """True for a chain with at least one hook, and for a function that replaces the chain."""
    return hook is not None and getattr(hook, "calls", True)


PLAIN_VALUES = frozenset({int, float, bool, type(None), torch.dtype})
"""Types of the arguments of a launcher other than tensors."""

LAUNCHERS: list["Launcher"] = []
"""All launchers, for tests that change their launches."""

MOST_KEPT = 4096
"""Most calls that a launcher keeps. When there are more, it forgets all of them."""


class Launcher:
    """A function that launches kernels, and keeps its launches for later calls.

    We choose kernels and plans. For each launch, Triton then chooses a compiled kernel by the dtypes of tensors, by
    numbers, and by which addresses are multiples of 16. All of this follows from a key: the device, type, shape,
    strides, dtype and alignment of tensors, and the type and value of all other arguments. Triton does the launches of
    the first call with a key, and the launcher keeps the compiled kernels. A later call with the same key allocates
    scratch memory, and calls these kernels with its own addresses on the current stream. If launches are watched,
    Triton does all of them; see `is_watched`.

    Args:
        choose: yields launches. It is a pure function of positional arguments, the first of which is a tensor. It gets
            other tensors with the same memory, and does not compute with them.

    Raises:
        TypeError: a launch takes a tensor that is not an argument.
    """

    def __init__(self, choose: Callable[..., Iterator[Launch]]) -> None:
        self.choose = choose
        """The function, for another launcher that yields these launches among its own."""
        self._kept: dict[tuple[Any, ...], _Call] = {}
        self.__doc__ = choose.__doc__
        LAUNCHERS.append(self)

    def forget(self) -> None:
        """Drop all kept calls, so that the next call chooses its launches again."""
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
                pointer = each.data_ptr()
                addresses.append(pointer)
                key += (kind, each.shape, each.stride(), each.dtype, each.get_device(), pointer % 16 == 0)
        known = self._kept.get(tuple(key))
        if known is None:
            # In a separate context, where no mode of compiling is active.
            Context().run(compile_side_by_side, self.choose(*arguments), launches_of_layer(), index)
            self._keep(tuple(key), *self._launch_by_triton(arguments))
            return
        # Scratch memory lives until the kernels are queued on the stream. Its next use is queued after them.
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
        """Let Triton do the launches, and return them with their memory."""
        recorder = current_recorder()
        if recorder is not None:
            recorder.call(self, arguments, {}, ())
            # The recorder must not record Triton's own operations.
            with torch._C._DisableTorchDispatch():
                return self._launch(arguments)
        return self._launch(arguments)

    def _launch(self, arguments: tuple[Any, ...]) -> tuple[_Memory, list[_Launched]]:
        # New tensor objects, because an argument that is passed twice must have two identities.
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
        # Triton returns None if `jit_cache_hook` refuses to compile, and a `FutureKernel` while another thread compiles
        # the kernel. Then a later call is kept.
        if not all(isinstance(each.compiled, CompiledKernel) for each in launched):
            return
        parts = list(dict.fromkeys(place for each in launched for place in each.places if place[1]))
        numbered = [*((number, 0) for number in range(len(memory.tensors))), *parts]
        ready = []
        for launch, places, compiled in launched:
            ready.append(
                _Ready(
                    run=compiled.run,
                    programs=launch.grid[0],
                    function=compiled.function,
                    metadata=compiled.packed_metadata,
                    take=taker([numbered.index(place) for place in places]),
                    rest=launch.all_but_pointers(),
                    compiled=compiled,
                )
            )
        if len(self._kept) >= MOST_KEPT:
            self._kept.clear()
        offsets = [(number, first * memory.tensors[number].itemsize) for number, first in parts]
        self._kept[key] = _Call(memory.allocators, offsets, ready)


def taker(places: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that takes the entries at some places, as fast as written-out code."""
    if len(places) == 1:
        return lambda given: (given[places[0]],)
    return itemgetter(*places) if places else lambda given: ()
