"""Operations that a call is made of. A call that does less when it is repeated uses results of an earlier one."""

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
"""Pairs of calls that have to agree before it is said that the second one does less."""


def left_out_in_repeats(call: Call, inputs: Inputs) -> list[str]:
    """Operations of a call with new inputs that the next call with the same ones does without, by name.

    They are the same in each pair. A call whose random numbers or order of summation make it shorter now and then has
    none. Whatever is kept by shape or by address is there in both calls.
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
