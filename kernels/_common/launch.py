"""Launchers share this: tensors as rows, which path and how much of a machine a tensor gets, plans and launches."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import Context
from functools import cache, lru_cache, partial, wraps
from inspect import getsource, signature
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple, ParamSpec

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton import AsyncCompileMode
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from kernels._common.dry_run import dry_run_of, launches_of_layer
from kernels._common.tape import current_recorder

INTERPRETED: bool = triton.knobs.runtime.interpret
"""True if kernels run in Triton's interpreter, which is settled when they are defined."""

_compiling_for = 0
"""Multiprocessors of the GPU that kernels are only compiled for; 0: they run."""

MOST_PROGRAMS = 2**31 - 1
"""Programs of a launch, in the first dimension of a grid. The other two dimensions end at 65535."""

MOST_THREADS = 1024
"""Threads of a program."""

REGISTERS = 65536
"""Registers of a multiprocessor, and so of a program."""

MOST_REGISTERS = 255
"""Registers of a thread."""

LARGEST = 2**30
"""Largest size that kernels count in 32 bits, where a tile may overhang. Numbers of rows and sequences may be larger.
"""

COUNTS = [
    "n_rows", "n_tokens", "n_windows", "n_queries", "n_keys", "n_slots", "n_batches", "n_routed", "n_blocks",
    "blocks", "parts", "chunks", "tiles", "groups",
]  # fmt: skip
"""Arguments that Triton is not to specialize on. They are bounds, which change with the length of sequences and make no
address any better aligned. Strides and lengths of rows do that, and stay as they are."""

P = ParamSpec("P")


def as_rows(x: Tensor) -> Tensor:
    """`... n` as `rows n` whose last stride is 1: a view where the strides allow one, else a copy."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def in_shape(rows: Tensor, shape: torch.Size) -> Tensor:
    """A result of rows in the shape of its input. Where it has that shape, no view is made that autograd records."""
    return rows if rows.shape == shape else rows.view(shape)


def mask_as_rows(mask: Tensor | None, shape: torch.Size) -> Tensor | None:
    """A mask that broadcasts to `shape` as `rows n`; rows that it repeats are not copied where strides allow that."""
    return None if mask is None else as_rows(mask.expand(shape))


def k_as_rows(k: float | Tensor, shape: torch.Size) -> tuple[Tensor | None, float]:
    """k as one entry a row, next to each other, if it is a tensor, else as a number. A kernel reads one of the two."""
    if isinstance(k, Tensor):
        return k.expand(shape[:-1]).reshape(-1).contiguous(), 0.0
    return None, float(k)


def runs_triton(x: Tensor) -> bool:
    """True if a tensor goes to the Triton kernel: on a GPU, in Triton's interpreter, or to be compiled only."""
    return x.is_cuda or INTERPRETED or _compiling_for > 0


def has_values(x: Tensor) -> bool:
    """True if there is something to compute with. An empty tensor has nothing, and one of a compiler or of the meta
    device has a shape alone. A dry run goes on as with values, to the launches."""
    is_shape = type(x) is FakeTensor and dry_run_of(x) is None
    return not is_shape and not x.is_meta and x.numel() > 0


def address(x: Tensor) -> int:
    """Where the memory of a tensor begins. New memory is aligned, as 0 is, and a dry run has no other."""
    return 0 if type(x) is FakeTensor else x.data_ptr()


def multiprocessors(device: torch.device) -> int:
    """Least number of programs that can run at the same time. The interpreter runs one after the other."""
    if device.type == "cuda":
        return _multiprocessors_of_gpu(device.index if device.index is not None else torch.cuda.current_device())
    return max(_compiling_for, 1)


@cache
def _multiprocessors_of_gpu(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


class Plan(NamedTuple):
    """Launch settings of a kernel, which depend on sizes alone."""

    programs: int

    settings: Mapping[str, Any]
    """Tile sizes, and options of the launch."""

    pieces: int = 1
    """Into how many a row is divided, or what else programs share."""

    @property
    def grid(self) -> tuple[int]:
        """Programs in one direction: the other two have too few."""
        return (self.programs,)


PLANNERS: list[Any] = []
"""All functions that plan, for tests to try all that they may choose."""


def planner(function: Callable[P, Plan]) -> Callable[P, Plan]:
    """Remember what a pure function from sizes to a plan returned, and refuse what no GPU can launch."""
    names = tuple(signature(function).parameters)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> Plan:
        sizes = {**dict(zip(names, args, strict=False)), **kwargs}
        check_sizes(sizes)
        plan = function(*args, **kwargs)
        check_plan(plan, sizes)
        return plan

    remembering: Any = lru_cache(maxsize=4096)(checked)
    PLANNERS.append(remembering)
    return remembering


def check_sizes(sizes: Mapping[str, Any]) -> None:
    """Raise a NotImplementedError that names a size that kernels cannot count."""
    for name, size in sizes.items():
        if name not in ("n_rows", "batch", "n_entries", "total") and size > LARGEST:
            raise NotImplementedError(f"{name} must be at most {LARGEST} for a kernel, got {size}")


def check_plan(plan: Plan, sizes: Mapping[str, Any]) -> None:
    """Raise a NotImplementedError where no GPU has what a plan for these sizes asks for."""
    threads = 32 * plan.settings.get("num_warps", 4)
    # Without a limit of their own, the assembler gives threads what a multiprocessor has.
    registers = plan.settings.get("maxnreg", most_registers(threads // 32))
    wanted = {
        "programs": (plan.programs, MOST_PROGRAMS),
        "threads of a program": (threads, MOST_THREADS),
        "registers of a thread": (registers, MOST_REGISTERS),
        "registers of a program": (threads * registers, REGISTERS),
    }
    for what, (number, most) in wanted.items():
        if number > most:
            given = ", ".join(f"{name} = {size}" for name, size in sizes.items())
            raise NotImplementedError(f"{what} must be at most {most} on a GPU, got {number} for {given}")


def most_registers(num_warps: int) -> int:
    """Registers that a thread can have where a program has a multiprocessor to itself."""
    return min(MOST_REGISTERS, REGISTERS // (32 * num_warps))


@cache
def tile_settings(entries: int, in_thread: int) -> Mapping[str, int]:
    """Launch settings for rows of up to `entries`, `in_thread` of them in each thread.

    At least 4 threads share a row, and rows that leave threads of a warp free share the warp.
    """
    threads = max(triton.next_power_of_2(entries) // in_thread, 4)
    width = 4 * threads
    return {
        "REPEATS": triton.cdiv(triton.next_power_of_2(entries), width),
        "ROWS": max(32 // threads, 1),
        "WIDTH": width,
        "num_warps": max(threads // 32, 1),
    }


def registers_of_addresses(tile: Mapping[str, int], aligned: bool) -> int:
    """Additional registers of a thread of a tile where rows are not aligned. Entries are loaded one by one, with
    addresses for each of them. More where a program has several rows, and eight warps leave room for no second one."""
    if aligned:
        return 0
    return 16 if tile["ROWS"] == 1 and tile["num_warps"] < 8 else 96


def _feature_tile(d: int) -> dict[str, int]:
    """Launch settings for rows of d features, each row in a tile as a whole. A tile has 2048 entries, of which a thread
    has 16, or a longer row."""
    block = triton.next_power_of_2(d)
    return {"ROWS": max(2048 // block, 1), "BLOCK_D": block, "num_warps": max(block, 2048) // 512}


@planner
def plan_rows(n_rows: int, d: int) -> Plan:
    """A program for each tile of rows of d features."""
    tile = _feature_tile(d)
    return Plan(triton.cdiv(n_rows, tile["ROWS"]), tile)


@planner
def plan_sweep(n_rows: int, d: int, available: int) -> Plan:
    """Eight programs for each multiprocessor, which go through the tiles of all rows and add up."""
    tile = _feature_tile(d)
    return Plan(min(triton.cdiv(n_rows, tile["ROWS"]), 8 * available), tile)


@planner
def plan_wide_sweep(n_rows: int, d: int, available: int) -> Plan:
    """As `plan_sweep`, with half as many entries in a thread, for kernels that need more registers for each. Half as
    many programs then have all registers."""
    sweep = plan_sweep(n_rows, d, available)
    tile = {**sweep.settings, "num_warps": 2 * sweep.settings["num_warps"]}
    return Plan(min(sweep.programs, 4 * available), tile)


@contextmanager
def triton_for_cpu_tensors(multiprocessors: int = 132) -> Iterator[None]:
    """Send CPU tensors to the Triton kernels, to compile them where there is no GPU. Launch settings are those of a GPU
    with so many multiprocessors, by default an H200.

    Launching is up to the caller to prevent, as `colt5_bench.measuring.static_facts` does.
    """
    global _compiling_for
    _compiling_for = multiprocessors
    try:
        yield
    finally:
        _compiling_for = 0


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
