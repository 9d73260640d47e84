"""The inputs of a case, which get new values before each call that is timed."""

from collections.abc import Iterable, Mapping
from random import SystemRandom
from typing import NamedTuple

import torch
from torch import Tensor

from colt5_bench.case import Problem

UPSTREAM = "gradient of the output"
"""Name of the upstream gradient among the inputs."""

LEAST_FACTOR = 1 - 2**-5
"""Random factors are from here to 1. No two calls get the same values, and all are of the same kind."""


INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
"""Integers by their bytes. To compare those of an element takes a fraction of the time of its bytes."""


class Plan(NamedTuple):
    """A plan for one timed call of each implementation."""

    factor: float
    """Factor of the other values, for this call alone."""

    kept: bool
    """True if its results are kept, in place of those that were kept before. Each call is as probable to be the last
    one that is."""


class Inputs:
    """The tensors that all implementations are given, and the values that they hold.

    At first they hold those of a problem. Calls that are timed get values that no call had before: those of another
    problem of the case, times a random factor near 1 where gradients are asked for. Nobody can know them beforehand.

    Args:
        problem: whose tensors these are.
        other: one of the same shapes and other values. None if nothing is timed.
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
        """True if a result is in the memory of one of them."""
        return shares_memory([result], self._tensors.values())

    def plan(self, number: int) -> Plan:
        """The plan for the call of a number from 0: the same for all implementations, so that truths are shared."""
        while len(self._plans) <= number:
            kept = self._random.random() * (len(self._plans) + 1) < 1
            self._plans.append(Plan(self._random.uniform(LEAST_FACTOR, 1), kept))
        return self._plans[number]

    def renew(self, factor: float | None = None) -> None:
        """Put other values in, with this factor or with one of their own."""
        self._hold(self._others, factor)

    def renew_slightly(self) -> None:
        """Put the first values in, with a factor of their own. Whatever is chosen by them stays the same."""
        self._hold(self._first, None)

    def restore(self) -> str:
        """Put the first values back, and name the inputs that somebody else has written to."""
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
        """Names of the inputs that hold other values than were put in."""
        return ", ".join(name for name, tensor in self._tensors.items() if not same_bits(tensor, self._expected(name)))

    def _expected(self, name: str) -> Tensor:
        values = self._held[name]
        return values * self._factor if self._is_multiplied(name) else values

    def _is_multiplied(self, name: str) -> bool:
        """Others may be of kinds that a factor would take them out of: positions, or masks of zeros and ones."""
        is_real = name in (UPSTREAM, *self.problem.differentiable) and self._tensors[name].is_floating_point()
        return is_real and self._factor != 1


def _tensors(problem: Problem) -> dict[str, Tensor]:
    """Those that can be written to: one that repeats its memory stays as it is."""
    tensors = {**problem.inputs, UPSTREAM: problem.upstream}
    return {name: each for name, each in tensors.items() if torch._debug_has_internal_overlap(each) != 1}


def same_bits(one: Tensor, other: Tensor) -> bool:
    """True for tensors of one shape and equal bits, those of NaN as well."""
    if (one.shape, one.itemsize) != (other.shape, other.itemsize):
        return False
    integers = INTEGERS.get(one.itemsize, torch.int64)
    # A reshaped tensor may still have holes between its elements.
    return torch.equal(*(each.detach().reshape(-1).contiguous().view(integers) for each in (one, other)))


def shares_memory(some: Iterable[Tensor], others: Iterable[Tensor]) -> bool:
    """True if the storage of one of some tensors is that of one of the others."""
    addresses = [{each.untyped_storage().data_ptr() for each in tensors if each.numel()} for tensors in (some, others)]
    return bool(addresses[0] & addresses[1])
