"""A case, its inputs, and the fewest bytes and operations that it needs."""

import dataclasses
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from colt5_bench.texts import Plain

FORWARD = "forward"
FORWARD_BACKWARD = "forward+backward"
DIRECTIONS = (FORWARD, FORWARD_BACKWARD)

TRAINING = "training"
"""Takes the place of a direction if a model is trained."""


_salt = ContextVar("salt", default="")


@contextmanager
def other_values(secret: str) -> Iterator[None]:
    """Within this context, cases draw other random numbers, which cannot be known without the secret."""
    token = _salt.set(f":{secret}")
    try:
        yield
    finally:
        _salt.reset(token)


MOST_KEPT = 2**29
"""Most random numbers of a case that are kept: two gigabytes."""


# Two entries: the values of a case for both directions and all operations, and the other values of a direction.
@lru_cache(maxsize=2)
def _drawn(seed: int, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@dataclass(frozen=True)
class Case:
    """A point in the grid of a suite. A suite subclasses this with the fields of its operation, all plain values."""

    @property
    def id(self) -> str:
        """`rows=8,n=512`: made from the fields, so that it always matches them."""
        return ",".join(f"{f.name}={_text(getattr(self, f.name))}" for f in dataclasses.fields(self))

    def fields(self) -> dict[str, Plain]:
        """The fields by name, for the record."""
        return dataclasses.asdict(self)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Random numbers that depend only on the fields of the case; within `other_values`, other ones."""
        digest = hashlib.sha256(f"{type(self).__name__}:{self.id}{_salt.get()}".encode()).digest()
        return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:7], "big"))

    def normal(self, device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
        """Normally distributed float32 tensors, drawn one after the other; the caller owns them.

        They depend only on the fields of the case, on any device. Within `other_values` they may depend on the device,
        and a GPU draws them itself: for a long sequence, the host draws longer than the GPU computes the truth.
        """
        if _salt.get() and device.type == "cuda":
            generator = self.generator(device)
            return [torch.randn(shape, generator=generator, device=device) for shape in shapes]
        draw = _drawn if sum(map(prod, shapes)) <= MOST_KEPT else _drawn.__wrapped__
        return [each.to(device, copy=True) for each in draw(self.generator().initial_seed(), shapes)]


def _text(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value).removeprefix("torch.")


@dataclass
class Problem:
    """The inputs of one case."""

    inputs: dict[str, Tensor]
    """Every tensor that an implementation receives, by the name of its argument."""

    upstream: Tensor
    """The gradient of the output, prepared outside of any timed region."""

    differentiable: tuple[str, ...] = ("scores",)
    """The inputs whose gradients are computed in forward+backward."""


@dataclass(frozen=True)
class Cost:
    """The least work of any implementation: the numerator of the roofline."""

    bytes: int
    """Every input read once and every output written once."""

    exponentials: int = 0
    """Number of exponentials that have to be evaluated."""

    flops: int = 0
    """Floating-point operations of matrix products."""

    flops_dtype: str = "float32"
    """Dtype of the factors of the products: float32, bfloat16 or float16."""


@dataclass(frozen=True)
class Truth:
    """Right results of a case, in fp64 from the same inputs."""

    output: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """By input name; empty if only the forward direction is measured."""

    at_kink: dict[str, Tensor] = field(default_factory=dict)
    """By input name, bool: elements of a gradient where the definition is not differentiable. Any value between the
    one-sided derivatives is right there. They are reported separately and never gated."""

    def tensors(self) -> dict[str, Tensor]:
        """The output and, by the names of the inputs, the gradients."""
        return {"output": self.output, **self.gradients}
