"""Kernels and copies that a step of a layer would launch on a GPU, counted without one.

`python -m tests.measurements.launches attention` lists them. Kernels of Triton are counted at their launches, and
nothing is compiled; operators of PyTorch are counted as they run on the CPU, below autocast and autograd. Both follow
the path of an eager call. A matrix product may need one more kernel on a GPU, if cuBLAS divides a long sum. With
`--gpu` PyTorch's profiler counts them there.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

import kernels
from kernels._common import operation
from kernels._common.tensors import triton_for_cpu_tensors

BATCH, LENGTH, DIM = 2, 8192, 64
"""Enough tokens for kernels to divide a row; few features, because PyTorch computes with them."""

ROUTED = LENGTH // 32

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: kernels.ConditionalRoutedAttention(
        DIM, num_heavy_tokens_q=ROUTED, num_heavy_tokens_kv=ROUTED, use_triton=True
    ),
    "feed_forward": lambda: kernels.ConditionalRoutedFeedForward(DIM, num_heavy_tokens=ROUTED, use_triton=True),
    "block": lambda: kernels.ConditionalRoutedTransformerBlock(
        DIM,
        num_heavy_attn_tokens_q=ROUTED,
        num_heavy_attn_tokens_kv=ROUTED,
        num_heavy_ff_tokens=ROUTED,
        use_triton=True,
    ),
    "autoregressive": lambda: kernels.ConditionalRoutedAutoregressiveAttention(
        DIM, num_heavy_tokens_q=32, num_heavy_tokens_kv=1024, num_routed_kv=2, use_triton=True, use_flash_attn=True
    ),
}
"""Layers with as many routed tokens as in the examples of colt5-attention's README."""

FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "detach"),
    *("promote_types", "result_type", "resize_", "lift_fresh"),
}
"""Operators that launch nothing, besides views."""

SHORT = 4096
"""Longest row that PyTorch sorts by one kernel in shared memory."""

SEVERAL = {
    # A scan in two kernels.
    "cumsum": 2,
    # One kernel fills or copies the memory, another one writes to it.
    "constant_pad_nd": 2,
    "index_put": 8,
    "masked_fill": 2,
    "scatter": 2,
    "scatter_add": 2,
    "select_backward": 2,
    "slice_backward": 2,
}
"""Operators that launch more than one kernel on a GPU, and their numbers."""


def _launches_of_sort(x: Tensor) -> int:
    """PyTorch sorts copies of short rows and of indices, and longer ones by a radix sort.

    A radix sort has a histogram, its sum, and a pass for each byte of the keys. Before it the indices are written. Up
    to 127 rows are sorted together by value, and then by row, by one byte of it; a last kernel separates them.
    """
    rows = x.numel() // x.shape[-1]
    if x.shape[-1] <= SHORT:
        return 4
    return 1 + 2 + x.itemsize + (0 if rows == 1 else 2 + 1 + 1)


class _Operators(TorchDispatchMode):
    """Count operators, and fill new memory with 0: no kernel writes it, and PyTorch may use it as indices."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if "empty" in name:
            result.zero_()
        elif not (name in FREE or func.is_view):
            self.counts[name] += _launches_of_sort(args[0]) if name == "sort" else SEVERAL.get(name, 1)
        return result


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count launches by the names of kernels and operators. CPU tensors go to the kernels, which write nothing."""
    counts: Counter[str] = Counter()

    def launch(self: JITFunction, *_: Any, **__: Any) -> None:
        counts[f"{self.__module__.removeprefix('kernels.')}.{self.__name__}"] += 1

    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", launch))
        # The counting mode must not send a call to its operator, which an eager call bypasses.
        stack.enter_context(patch.object(operation, "is_in_torch_dispatch_mode", lambda: False))
        stack.enter_context(triton_for_cpu_tensors())
        stack.enter_context(_Operators(counts))
        yield counts


def training_step(layer: nn.Module, x: Tensor, grad_output: Tensor, **options: Tensor) -> None:
    """Forward and backward pass under autocast, with gradients of tokens and parameters."""
    with torch.autocast(x.device.type, torch.bfloat16):
        output = layer(x, **options)
    output.backward(grad_output)


def launches(name: str, *, masked: bool = False) -> Counter[str]:
    """Number of launches of each kernel and operator of PyTorch in a training step of a layer."""
    layer, x = LAYERS[name](), torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
    grad_output = torch.ones(x.shape)
    options = {"mask": torch.ones(BATCH, LENGTH, dtype=torch.bool)} if masked else {}
    with counted() as counts:
        training_step(layer, x, grad_output, **options)
    return counts


def launches_on_a_gpu(name: str) -> Counter[str]:
    """The same, without a mask, from PyTorch's profiler: kernels and copies of a step by their names."""
    layer, x = LAYERS[name]().cuda(), torch.randn(BATCH, LENGTH, DIM, device="cuda", requires_grad=True)
    grad_output = torch.ones(x.shape, device="cuda")
    for _ in range(4):
        # The first step compiles kernels, the second is recorded, and later ones are played.
        layer.zero_grad()
        x.grad = None
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            training_step(layer, x, grad_output)
            torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
    # PyTorch's sums and sorts set counters to 0 by a separate command, which is neither a kernel nor a copy.
    return Counter(name for name in names if not name.startswith("Memset"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="count the kernels that a training step of a layer would launch")
    parser.add_argument("name", choices=LAYERS)
    parser.add_argument("--masked", action="store_true", help="with a mask")
    parser.add_argument("--gpu", action="store_true", help="as PyTorch's profiler counts them on a GPU, without a mask")
    options = parser.parse_args()
    if options.gpu and options.masked:
        parser.error("--gpu counts without a mask: leave out --masked")
    found = launches_on_a_gpu(options.name) if options.gpu else launches(options.name, masked=options.masked)
    for kernel, count in found.most_common():
        print(f"{count:4}  {kernel}")
    print(f"{found.total():4}  in all")
