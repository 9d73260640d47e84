"""Operations of a call. If a repeated call has fewer, it uses results of an earlier call."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.runtime.jit import JITFunction

from colt5_bench.measuring.call import Call
from colt5_bench.measuring.inputs import Inputs
from colt5_bench.measuring.memory import SILENT

REPEATS = 3
"""Pairs of calls that have to agree before the second one counts as doing less."""


def left_out_in_repeats(call: Call, inputs: Inputs) -> list[str]:
    """Names of operations that a call with new inputs has, and a second call with the same inputs lacks.

    They must be the same in each pair, so a call that is sometimes shorter, because of random numbers or the order of a
    sum, has none. Results that are kept by shape or by address are used in both calls, and are not found here.
    """
    found: Counter[str] | None = None
    for _ in range(REPEATS):
        inputs.renew()
        call.renew()
        less = work(call) - work(call)
        if not less or found not in (None, less):
            return []
        found = less
    return sorted(found or ())


def work(call: Callable[[], object]) -> Counter[str]:
    """The number of operations of PyTorch, and of launches of Triton kernels, by name."""
    os.environ.setdefault("KINETO_LOG_LEVEL", SILENT)
    with torch.autograd.profiler.profile() as profiler, _launches() as launches:
        result = call()
    del result
    assert profiler.kineto_results is not None
    return Counter([event.name() for event in profiler.kineto_results.events()] + launches)


@contextmanager
def _launches() -> Iterator[list[str]]:
    names: list[str] = []
    run = JITFunction.run

    def count(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        names.append(self.__name__)
        return run(self, *args, **kwargs)

    JITFunction.run = count
    try:
        yield names
    finally:
        JITFunction.run = run
