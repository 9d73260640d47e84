"""Host time of a training step of a layer, measured without a GPU.

`python -m tests.measurements.host_time attention` measures a step that runs the code of the layer, and a step that is
played from tapes. CPU tensors go to the launchers, whose kernels are replaced by functions that do nothing; layers are
so small that the time of PyTorch's operators is negligible. The time is that of Python, autograd and PyTorch's
dispatcher. Launches of a driver add to it, and take longer on a slower host.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import kernels
from kernels._common import launch
from kernels._common.tensors import triton_for_cpu_tensors
from tests.measurements.launches import training_step

BATCH, LENGTH, DIM = 1, 256, 16

HEADS = {"light_dim_head": 16, "light_heads": 1, "heavy_dim_head": 8, "heavy_heads": 2}

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: kernels.ConditionalRoutedAttention(
        DIM, num_heavy_tokens_q=8, num_heavy_tokens_kv=8, use_triton=True, **HEADS
    ),
    "feed_forward": lambda: kernels.ConditionalRoutedFeedForward(
        DIM, num_heavy_tokens=8, heavy_ff_mult=1, use_triton=True
    ),
    "block": lambda: kernels.ConditionalRoutedTransformerBlock(
        DIM,
        num_heavy_attn_tokens_q=8,
        num_heavy_attn_tokens_kv=8,
        num_heavy_ff_tokens=8,
        heavy_ff_mult=1,
        use_triton=True,
        **HEADS,
    ),
    "autoregressive": lambda: kernels.ConditionalRoutedAutoregressiveAttention(
        DIM,
        num_heavy_tokens_q=2,
        num_heavy_tokens_kv=16,
        num_routed_kv=2,
        light_window_size=32,
        use_triton=True,
        **HEADS,
    ),
}


class _Nothing(CompiledKernel):
    """A compiled kernel that does nothing."""

    def __init__(self) -> None:
        self.function, self.packed_metadata, self.module = 0, (), None

    run = property(lambda self: lambda *arguments: None)


@contextmanager
def launching_nothing() -> Iterator[None]:
    """CPU tensors go to launchers, which keep their launches but start none."""

    def compile_nothing(*_: Any, **__: Any) -> CompiledKernel:
        return _Nothing()

    active = driver._active
    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", compile_nothing))
        stack.enter_context(patch.object(JITFunction, "warmup", compile_nothing))
        stack.enter_context(patch.object(launch, "_KNOWN_RUN", compile_nothing))
        driver.set_active(SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0))
        stack.callback(driver.set_active, active)
        stack.enter_context(triton_for_cpu_tensors())
        yield


def step_of(name: str, *, played: bool) -> Callable[[], None]:
    """A training step of a layer that leaves no state behind."""
    layer, x = LAYERS[name](), torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
    kernels.played(layer, played)
    grad_output, tensors = torch.ones(x.shape), [x, *layer.parameters()]

    def step() -> None:
        training_step(layer, x, grad_output)
        for each in tensors:
            each.grad = None

    return step


def microseconds(call: Callable[[], object], times: int = 200, rounds: int = 7) -> float:
    """Processor time of a call: the least of some rounds, each with a series of calls."""
    best = float("inf")
    for _ in range(rounds):
        begin = time.process_time()
        for _ in range(times):
            call()
        best = min(best, time.process_time() - begin)
    return best / times * 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="measure the host time of a training step where there is no GPU")
    parser.add_argument("name", choices=LAYERS)
    name = parser.parse_args().name
    torch.set_num_threads(1)
    small = torch.randn(16, 16)
    print(f"{microseconds(lambda: torch.nn.functional.linear(small, small)):8.1f} us  yardstick: linear, 16 x 16")
    with launching_nothing():
        for played in (False, True):
            print(f"{microseconds(step_of(name, played=played)):8.1f} us  as {'played' if played else 'written'}")
