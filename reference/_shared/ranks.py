"""Processes that compute something together."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Ranks(NamedTuple):
    """One of several processes, as it sees them."""

    number: int
    """Number of this one, from 0."""

    size: int
    gather: Callable[[Tensor], list[Tensor]]
    """From a tensor to those of all of them, in their order. All call it."""
