"""The inputs of a case, with new values before each timed call."""

from collections.abc import Iterable, Mapping
from random import SystemRandom
from typing import NamedTuple

import torch
from torch import Tensor

from colt5_bench.case import Problem

UPSTREAM = "gradient of the output"
"""Name of the upstream gradient among the inputs."""

LEAST_FACTOR = 1 - 2**-5
"""Smallest random factor; the largest is 1. All calls get different values of the same kind."""


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integer dtypes by their bytes. Comparing elements as integers is much faster than comparing bytes."""


class Plan(NamedTuple):
    """A plan for one timed call of each implementation."""

    factor: float
    """Factor of the values of this call."""

    kept: bool
    """True if the results of this call replace the kept ones. Each call has the same probability of being the last kept
    one."""


class Inputs:
    """The input tensors of all implementations, and their values.

    At first they have the values of a problem. Timed calls get values that no call had before: those of another problem
    of the case, times a random factor near 1 if they need gradients. No implementation can know them in advance.

    Args:
        problem: owner of the tensors.
        other: a problem with the same shapes and other values. None if nothing is timed.
    """

    def __init__(self, problem: Problem, other: Problem | None) -> None:
        self.problem = problem
        self._tensors = _tensors(problem)
        self._first = {name: tensor.clone() for name, tensor in self._tensors.items()}
        self._others = {} if other is None else _tensors(other)
        self._held: Mapping[str, Tensor] = self._first
        self._factor = 1.0
        self._random = SystemRandom()
        self._plans: list[Plan] = []

    def are_in(self, result: Tensor) -> bool:
        """True if a result shares memory with an input."""
        return shares_memory([result], self._tensors.values())

    def plan(self, number: int) -> Plan:
        """The plan for a call by its number from 0. All implementations share it, so that they share truths."""
        while len(self._plans) <= number:
            kept = self._random.random() * (len(self._plans) + 1) < 1
            self._plans.append(Plan(self._random.uniform(LEAST_FACTOR, 1), kept))
        return self._plans[number]

    def renew(self, factor: float | None = None) -> None:
        """Set other values, with this factor or with a new one."""
        self._hold(self._others, factor)

    def renew_slightly(self) -> None:
        """Set the first values with a new factor, so that choices that depend on them stay the same."""
        self._hold(self._first, None)

    def restore(self) -> str:
        """Restore the first values, and name the inputs that were overwritten."""
        spoilt = self.spoilt()
        if spoilt or self._held is not self._first or self._factor != 1:
            self._hold(self._first, 1.0)
        return spoilt

    def _hold(self, values: Mapping[str, Tensor], factor: float | None) -> None:
        self._held = values
        self._factor = self._random.uniform(LEAST_FACTOR, 1) if factor is None else factor
        for name, tensor in self._tensors.items():
            if self._is_multiplied(name):
                torch.mul(values[name], self._factor, out=tensor)
            else:
                tensor.copy_(values[name])

    def spoilt(self) -> str:
        """Names of the inputs whose values were overwritten."""
        return ", ".join(name for name, tensor in self._tensors.items() if not same_bits(tensor, self._expected(name)))

    def _expected(self, name: str) -> Tensor:
        values = self._held[name]
        return values * self._factor if self._is_multiplied(name) else values

    def _is_multiplied(self, name: str) -> bool:
        """Inputs with gradients only: a factor would make positions, or masks of zeros and ones, invalid."""
        is_real = name in (UPSTREAM, *self.problem.differentiable) and self._tensors[name].is_floating_point()
        return is_real and self._factor != 1


def _tensors(problem: Problem) -> dict[str, Tensor]:
    """Inputs that can be written to. An expanded one keeps its values."""
    tensors = {**problem.inputs, UPSTREAM: problem.upstream}
    return {name: each for name, each in tensors.items() if torch._debug_has_internal_overlap(each) != 1}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """True for tensors of the same shape and the same bits, including NaN."""
    if (one.shape, one.itemsize) != (other.shape, other.itemsize):
        return False
    integers = INTEGERS.get(one.itemsize, torch.int64)
    # A reshaped tensor may still have holes between its elements.
    return torch.equal(*(each.detach().reshape(-1).contiguous().view(integers) for each in (one, other)))


def shares_memory(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """True if the storage of one of some tensors is that of one of the others."""
    addresses = [{each.untyped_storage().data_ptr() for each in tensors if each.numel()} for tensors in (some, others)]
    return bool(addresses[0] & addresses[1])
