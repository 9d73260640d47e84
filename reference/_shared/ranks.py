"""Processes that compute something together."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Ranks(NamedTuple):
    """One of several processes, with its view of the group."""

    number: int
    """Number of this process, from 0."""

    size: int
    gather: Callable[[Tensor], list[Tensor]]
    """Function from a tensor to the tensors of all processes, in their order. All processes call it."""
