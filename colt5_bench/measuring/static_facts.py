"""Facts about the compiled Triton kernels of a call. Without a GPU, kernels are only compiled."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from colt5_bench.measuring.sass import Usage, instructions, usage

WARP_SIZE = 32

ALLOCATING = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (Tensor, "new_empty")]
"""Functions that return uninitialised memory."""


class _CompileOnly:
    """The part of a Triton driver that a compilation needs, on a machine without that GPU."""

    def __init__(self, target: int) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._target, WARP_SIZE)

    def get_current_device(self) -> str:
        """A text instead of a number: kernels are cached by device, and a real GPU must not find this one."""
        return f"compile only: sm_{self._target}"

    def get_current_stream(self, device: str) -> int:
        return 0


def compiled_kernels(
    launch: Callable[[], object], target: int | None = None, *, disassemble: bool = True
) -> list[dict[str, object]]:
    """The facts of each distinct Triton kernel that `launch` launches, in the order of their first launch.

    Kernels are distinct if they are compiled with any difference. Kernels of `torch.compile` are not included, because
    PyTorch launches them.

    Args:
        launch: called once.
        target: None: kernels really run, on the GPU of their tensors. 80, 90, ...: kernels are compiled for that
            compute capability times ten and nothing is launched, so that their outputs stay as they were allocated,
            zeros where they were allocated empty; tensors may be on the CPU and no GPU is needed.
        disassemble: False leaves out `instructions`, which add half of the time of compilation on one core.

    Returns:
        For each kernel `name`, `target` (`sm_90`), `registers` (a thread), `spilled_bytes` (local memory a thread:
            spilled registers, and arrays that are not in registers), `shared_bytes` (a program), `num_warps`,
            `num_stages`, `cooperative`, `instructions`, how many there are by class (see `sass.CLASSES`), and
            `constants`, the values of its constexpr arguments by name.

    Raises:
        RuntimeError: Triton's interpreter is on (TRITON_INTERPRET=1), which compiles nothing.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("static facts need Triton's compiler: unset TRITON_INTERPRET")
    kernels: dict[str, Any] = {}
    with _observed(kernels, compile_only=target is not None), driver_for(target):
        launch()
    usage_of = _loaded_usage if target is None else _compiled_usage
    facts = [_facts(kernel, usage_of(kernel)) for kernel in kernels.values()]
    if disassemble:
        counted = instructions(kernel.asm["cubin"] for kernel in kernels.values())
        for each, counts in zip(facts, counted, strict=True):
            each["instructions"] = counts
    return facts


@contextmanager
def _observed(kernels: dict[str, Any], *, compile_only: bool) -> Iterator[None]:
    """Collect all kernels that run, by the hash of source, arguments and options."""
    run = JITFunction.run

    def observe(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=warmup or compile_only, **kwargs)
        kernels.setdefault(kernel.hash, kernel)
        return kernel

    JITFunction.run = observe
    try:
        yield
    finally:
        JITFunction.run = run


@contextmanager
def driver_for(target: int | None) -> Iterator[None]:
    """Compile for a compute capability times ten, and launch nothing. With None, keep the driver of Triton."""
    if target is None:
        yield
        return
    # Not `driver.active`: without a GPU, looking for the real driver is an error.
    active = driver._active
    driver.set_active(_CompileOnly(target))
    try:
        with ExitStack() as stack:
            for owner, name in ALLOCATING:
                stack.enter_context(patch.object(owner, name, _zeroed(getattr(owner, name))))
            yield
    finally:
        driver.set_active(active)


def _zeroed(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Fill memory with 0, because no kernel writes it. PyTorch goes on with the memory, and needs valid indices."""

    @wraps(allocate)
    def zeros(*args: Any, **kwargs: Any) -> Tensor:
        return allocate(*args, **kwargs).zero_()

    return zeros


def _facts(kernel: Any, usage: Usage) -> dict[str, object]:
    metadata, function = kernel.metadata, kernel.src.fn
    given = {function.arg_names[path[0]]: value for path, value in kernel.src.constants.items() if len(path) == 1}
    declared = [parameter.name for parameter in function.params if parameter.is_constexpr]
    return {
        "name": metadata.name,
        "target": f"sm_{metadata.target.arch}",
        "registers": usage.registers,
        "spilled_bytes": usage.spilled_bytes,
        "shared_bytes": metadata.shared,
        "num_warps": metadata.num_warps,
        "num_stages": metadata.num_stages,
        "cooperative": metadata.launch_cooperative_grid,
        "constants": {name: _plain(given[name]) for name in declared if name in given},
    }


def _plain(value: object) -> object:
    """The value as JSON can represent it."""
    value = getattr(value, "value", value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _loaded_usage(kernel: Any) -> Usage:
    """Bytes as counted by the driver of the GPU; Triton counts spills in words of four bytes."""
    return Usage(kernel.n_regs, 4 * kernel.n_spills)


def _compiled_usage(kernel: Any) -> Usage:
    return usage(kernel.asm["cubin"])
