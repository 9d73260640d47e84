"""Our own kernels as an implementation of a suite."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from colt5_bench.case import Case
from colt5_bench.suite import Implementation
from kernels._common.tensors import triton_for_cpu_tensors

C = TypeVar("C", bound=Case)


def by_kernels(build: Callable[[C], Callable[..., Tensor]], *, name: str = "ours", **options: Any) -> Implementation[C]:
    """An implementation whose kernels are compiled if there is no GPU to launch them."""
    return Implementation(name, build, launching=triton_for_cpu_tensors, **options)


def guest(
    call: Callable[[Callable[..., Any]], Callable[[C], Callable[..., Tensor]]], **options: Any
) -> Callable[[Callable[..., Any]], Implementation[C]]:
    """Implementations by functions of others, with the same arguments for `call` as ours."""
    return lambda function: by_kernels(call(function), name="guest", **options)
