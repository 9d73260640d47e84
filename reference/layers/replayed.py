"""Calls of layers that kernels may record and play, without the Python code between launches."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from torch import Tensor

Forward = TypeVar("Forward", bound=Callable[..., Tensor])


def replayed(forward: Forward) -> Forward:
    """A forward pass of a layer, which its `operations` may record and play."""

    @wraps(forward)
    def call(self: Any, *args: Any, **options: Any) -> Tensor:
        replay = self.operations.replay
        return cast(Tensor, forward(self, *args, **options) if replay is None else replay(forward, self, args, options))

    return cast(Forward, call)
